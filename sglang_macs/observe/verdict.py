"""Whether a bound would pay, from a server's counters: what is above it on the most loaded rank, what a plan costs, and
what a row costs its rank. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..choices import GAMMAS

WORTH = 0.01  # of a prefill pass


@dataclass(frozen=True)
class Gain:
    """What bounds would buy. of: the time whose share is taken, in words; shares: by gamma, behind what plans cost;
    balance: of perfect balance at no cost.
    """

    imbalance: float
    of: str
    shares: Mapping[float, float]
    balance: float

    @property
    def gamma(self) -> float | None:
        """The largest that is worth it; None: no bound is."""
        return max((gamma for gamma, share in self.shares.items() if share >= WORTH), default=None)


def gain(state: Mapping[str, Any]) -> Gain | None:
    """Of one rank's counters, which are the group's; None where nothing was measured. Raises TypeError, ValueError,
    LookupError for what are no counters.
    """
    layers = [layer for layer in state["layers"].values() if layer["dispatches"]]
    if not layers:
        return None
    dispatches = sum(layer["dispatches"] for layer in layers)
    imbalance = sum(layer["max_over_mean_before"] for layer in layers) / dispatches
    known = state.get("observe", {})
    cost, row_us, passes = known.get("plan_rows", 0), known.get("row_us", 0), state.get("observed_passes", 0)
    above = [[rows / layer["dispatches"] for rows in layer["excess"]] for layer in layers]  # of a dispatch
    saved = {gamma: sum(max(0.0, rows[i] - cost) for rows in above) for i, gamma in enumerate(GAMMAS)}
    balanced = sum(rows[0] for rows in above)
    if row_us and passes:
        whole, of = state["observed_seconds"] / passes * 1e6 / row_us, "a prefill pass"
    else:
        means = [sum(layer["rows_before"]) / len(layer["rows_before"]) / layer["dispatches"] for layer in layers]
        whole, of = sum(means) + balanced, "the experts' time, a row's not being known"
    if not whole > 0:
        return None
    return Gain(imbalance, of, {gamma: rows / whole for gamma, rows in saved.items()}, balanced / whole)


def verdict(states: Sequence[Mapping[str, Any]]) -> str:
    """In one line."""
    try:
        found = gain(states[0])
        if found is None:
            return "imbalance: nothing measured yet; send prefill batches of --macs-min-tokens and more"
        head = f"most loaded rank over mean {found.imbalance:.2f}"
        if found.gamma is None:
            return f"{head}: not worth it; perfect balance would save {found.balance:.1%} of {found.of}"
        share = found.shares[found.gamma]
        return (
            f"{head}: worth it, at gamma {found.gamma:g} {share:.1%} of {found.of} "
            f"(at 1 {found.shares[1.0]:.1%}, perfect balance {found.balance:.1%})"
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return "imbalance: not among this server's counters"
