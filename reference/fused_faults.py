"""What a rank does when its peer dies, stalls or sends nonsense: named, nothing delivered, nothing written beside the
buffers, and the next epoch works.

Rank 0 of a pair goes on alone; what rank 1 would have sent is written into rank 0's region by hand, or is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import fused_c as fc
from .comparison import Mismatch
from .fused_case import LAYER, FusedConfig, Group, make_group
from .fused_checks import check_guards, describe, play
from .kernel_case import POISON, Config

# Everything goes to rank 0, so that its bound is exceeded, whatever rank 1 says.
PLAN = Config(T=12, H=2048, E=16, K=4, R=2, hot=60.0, visual=0.8, gamma=1.0)
PAIR = FusedConfig(PLAN, (12, 12), blocks=2)
PAIRS = {"": PAIR, ", scales with rows": replace(PAIR, blocks=4, format="fp8", scales_with_rows=True)}


@dataclass(frozen=True)
class Scenario:
    """inject(group): what happens instead of a dispatch of both; then rank 0 has to know `fault` of rank `peer`."""

    fault: str
    inject: Callable[[Group], None]
    seen: int | None = None
    peer: int = 1
    gamma: float = 1.0
    decided: bool = False  # the plan stands
    delivered: bool = False  # and all rows are here: only what is reported of the group is missing


def ll_words(group: Group, name: str, *shape: int) -> torch.Tensor:
    """[source, ..., (value, epoch)] i32 of rank 0's LL words from rank 1, now of the coming epoch."""
    found = group.part(0, name, torch.int32, 2, *shape, 2)[1]
    found[..., 1] = group.epoch(0) + 1
    return found[..., 0]


EXPERTS = (0, 1, 2, 3)


def _entry(expert: int, *, leads: bool, bucket: int = 0, fixed: int = 0) -> int:
    """A visual token's assignment as csrc/cuda/fused_entry.cuh packs it."""
    flags = 1 | leads << 1
    return flags | flags << 13 | expert << 2 | bucket << 15 | fixed << 23


def forge_assignments(
    group: Group, tokens: int = 12, experts: tuple[int, ...] = EXPERTS, weighed: tuple[int, ...] | None = EXPERTS
) -> None:
    """What rank 1 would have sent rank 0: visual tokens of one weight and one importance.

    weighed: the experts of what it sends once more, with the weights; None: it does not.
    """
    ll_words(group, "tokens").fill_(tokens)
    words = [_entry(expert, leads=slot == 0) for slot, expert in enumerate(experts)]
    ll_words(group, "entries", 12, 4).copy_(torch.tensor(words).to(torch.int32))
    if weighed is not None:
        words = [_entry(expert, leads=slot == 0, bucket=64, fixed=128) for slot, expert in enumerate(weighed)]
        ll_words(group, "weighed", 12, 4).copy_(torch.tensor(words).to(torch.int32))


def forge_weight(group: Group) -> None:
    """What all of rank 1's tokens weigh."""
    now = group.epoch(0) + 1
    weights = group.part(0, "weights", torch.int32, 2, 2, 2)[now & 1, 1]
    weights.copy_(torch.tensor([12 * 128, now]))


def forge_counts(group: Group, counts: list[int]) -> None:
    """Rank 1's rows per expert, which have two places, by the epoch's parity."""
    now = group.epoch(0) + 1
    words = group.part(0, "counts", torch.int32, 2, 2, 16, 2)[now & 1, 1]
    words[:, 0], words[:, 1] = torch.tensor(counts), now


def forge_rows(group: Group, scales: bool = True) -> None:
    """Rank 1's signal that its rows are here, and their scales (they are the poison)."""
    if scales:
        group.bytes_of(0, "row_scales").fill_(POISON)
    flags = group.part(0, "flags", torch.int32, 2, 2, group.config.blocks)
    flags[0, 1] = group.epoch(0) + 1


def _alone(group: Group) -> None:
    group.dispatch(only=0)


def _assigned(**forged) -> Callable[[Group], None]:
    def inject(group: Group) -> None:
        forge_assignments(group, **forged)
        group.dispatch(only=0)

    return inject


def _weighed(group: Group) -> None:
    forge_assignments(group)
    forge_weight(group)
    group.dispatch(only=0)


def _sent(group: Group) -> None:
    forge_assignments(group)
    forge_rows(group)
    group.dispatch(only=0)


def _counted(count: int) -> Callable[[Group], None]:
    def inject(group: Group) -> None:
        forge_assignments(group)
        forge_counts(group, [count if expert == 5 else 0 for expert in range(16)])
        group.dispatch(only=0)

    return inject


def _own_expert(group: Group) -> None:
    group.tensors[0].inputs["topk_ids"][4, 2] = 16
    group.dispatch()


I32_MAX = 2**31 - 1
SCENARIOS = {
    "dead rank": Scenario("assignments", _alone),
    "dead before its weights": Scenario("assignments", _assigned(weighed=None)),
    "dead before its counts": Scenario("counts", _assigned()),
    "dead before its rows": Scenario("rows", _weighed, gamma=float("inf"), decided=True),
    "dead before its weight": Scenario("entropies", _sent, gamma=float("inf"), decided=True, delivered=True),
    **{f"{n} tokens": Scenario("bad tokens", _assigned(tokens=n), seen=n) for n in (-1, 13, I32_MAX)},
    **{f"expert {e}": Scenario("bad expert", _assigned(experts=(0, 1, e, 3)), seen=e) for e in (16, 510)},
    "expert 16, sent with weights": Scenario("bad expert", _assigned(weighed=(0, 1, 16, 3)), seen=16),
    **{f"{n} rows of an expert": Scenario("bad count", _counted(n), seen=n) for n in (-1, 13, I32_MAX)},
    "own expert 16": Scenario("bad expert", _own_expert, seen=16, peer=0),
}


def check_fault(kernels, device: str, scenario: Scenario, timeout_ns: int, pair: FusedConfig = PAIR) -> None:
    """Two good rounds, the fault, recovery, two good rounds."""
    group = Group(kernels, replace(pair, timeout_ns=timeout_ns), device)
    for seed in range(2):
        play(group, seed)
    usual = group.config
    group.config = replace(usual, plan=replace(PLAN, gamma=scenario.gamma))
    group.load(make_group(group.config, 7))
    group.poison()
    scenario.inject(group)
    expect_fault(group, scenario)
    group.config = usual
    group.recover()
    for seed in range(2):
        play(group, 50 + seed)


def expect_fault(group: Group, scenario: Scenario) -> None:
    status = group.status(0)
    named = fc.FAULTS[status.fault] == scenario.fault and status.peer == scenario.peer and status.epoch == 3
    require(named and scenario.seen in (None, status.seen), group, f"expected {scenario}")
    where = status.layer, status.limit_ms
    require(where == (LAYER, group.config.timeout_ns // 10**6), group, f"layer and limit are {where}")
    received = group.part(0, "received", torch.int32, group.config.local).any()
    require(bool(received) == scenario.delivered, group, "rows are delivered, or are not")
    if not scenario.decided:
        require((group.part(0, "positions", torch.int32, 12, 4) == -1).all(), group, "positions are delivered")
        ids, weights = (group.tensors[0].outputs[name] for name in ("new_ids", "new_weights"))
        require((ids == -1).all() and (weights == 0).all(), group, "tokens are delivered")
        require((group.bytes_of(1, "rows") == POISON).all(), group, "a row was sent")
    check_guards(group)


def require(holds: object, group: Group, what: str) -> None:
    if not holds:
        raise Mismatch(f"{what}; {describe(group.status(0))}")
