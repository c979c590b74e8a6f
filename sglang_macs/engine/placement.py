"""Experts that are replicated or moved: where plans know of them, and which launches are refused on their account."""

from collections.abc import Callable

from .launch import Launch, experimental


def placed(launch: Launch) -> bool:
    """Whether experts do not, or not for long, lie linearly and once each."""
    moved = (launch.flag("init_expert_location") or "trivial") != "trivial"
    return moved or any(launch.flag(name) for name in ("enable_eplb", "ep_num_redundant_experts"))


def replicas_on(device: object, deepep_mode: object) -> bool:
    """Whether plans know replicas there: on GPUs, servers with them have run in DeepEP's normal mode."""
    return device == "cpu" or deepep_mode == "normal" or experimental("replicas")


def _known(launch: Launch) -> bool:
    return replicas_on(launch.flag("device"), launch.flag("deepep_mode", "auto"))


def balances(launch: Launch) -> bool:
    """Whether plans choose among replicas, by logical expert."""
    config = launch.config
    return placed(launch) and _known(launch) and config.replicas == "balance" and not config.is_off


def where_unknown(condition: Callable[[Launch], bool], got: str) -> Callable[[Launch], str]:
    """For replicas where plans do not know them."""
    return lambda launch: got if not _known(launch) and condition(launch) else ""


def dispatch_algorithm(launch: Launch) -> str:
    """SGLang's choice of replicas where plans could not make it themselves, or ""."""
    algorithm = launch.flag("ep_dispatch_algorithm")
    if algorithm == "lp":
        return "lp, which solves for every batch what MACS solves itself"
    known = _known(launch)
    if not algorithm or launch.config.changes_nothing or (known and algorithm != "fake"):
        return ""
    return f"{algorithm}, experts that the router did not choose" if known else "physical experts"


def choice_of_replicas(launch: Launch) -> str:
    """The options that plans with replicas, or beside them, do not know, or ""."""
    config = launch.config
    if balances(launch):
        return config.no_replicas
    if not placed(launch) or config.is_off:
        return ""
    if config.reroute != "none" and not config.changes_nothing:
        return f"keep with --macs-reroute {config.reroute}, which knows no replicas"
    return "keep with --macs-profile, which knows no replicas" if config.profile else ""
