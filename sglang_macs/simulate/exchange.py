"""What summing the histogram costs a plan, by NCCL and by the kernel over peers' memory, at every size of the group."""

from dataclasses import dataclass, replace

from .machines import Machine, Model
from .times import Cluster, exchange_us

# Medians of all cases of these files, us: (ranks, NCCL, over peers' memory).
SOURCE = "docs/results/overhead_h200x2.json and overhead_h200x4.json"
MEASURED_US = ((2, 11.6, 5.7), (4, 18.3, 9.6))
MEASURED_EXPERTS, BUCKETS = 128, 128
MOST_PEERS = 16  # kMaxPeers of csrc/include/macs/fused.h
MOST_RANKS_OF_ONE_HOP = 4  # kMostRanksOfOneHop of csrc/include/macs/peer_all_reduce.h


@dataclass(frozen=True)
class Exchange:
    """One size of the group. us; None where the ranks do not address each other's memory. Bytes: sent by a rank."""

    ep: int
    nccl_model_us: float
    nccl_us: tuple[float, float]  # the model, by the least and the most that it was short of what was measured
    peer_us: float | None
    nccl_bytes: int
    peer_bytes: int | None


def exchange(machine: Machine, model: Model, ep: int) -> Exchange:
    """NCCL: its latency model, scaled. Peers: a line through what was measured, its slope by the bytes of a rank.

    With more ranks than four, values go over the rank that adds them up: one way more. It counts as the line's start
    does, a launch and one way.
    """
    by_model = _nccl_us(machine, model, ep)
    on = {ranks: _nccl_us(machine, model, ranks, MEASURED_EXPERTS) for ranks, _, _ in MEASURED_US}
    ratios = [us / on[ranks] for ranks, us, _ in MEASURED_US]
    size = (2 * model.experts * BUCKETS + 4) * 4
    direct = ep <= min(MOST_PEERS, machine.gpus_per_node)
    return Exchange(
        ep,
        by_model,
        (by_model * min(ratios), by_model * max(ratios)),
        _peer_us(model, ep) if direct else None,
        round(2 * size * (ep - 1) / ep),
        round(2 * size * _histograms(ep)) if direct else None,
    )


def _nccl_us(machine: Machine, model: Model, ep: int, experts: int | None = None) -> float:
    cluster = Cluster(machine, replace(model, experts=experts or model.experts), ep, tokens=1)
    return float(exchange_us(cluster, BUCKETS, "flat"))


def _histograms(ep: int) -> float:
    """How many whole ones a rank sends over peers' memory."""
    return ep - 1 if ep <= MOST_RANKS_OF_ONE_HOP else 2 * (ep - 1) / ep


def _peer_us(model: Model, ep: int) -> float:
    (few, _, least), (more, _, most) = MEASURED_US
    each = (most - least) / (more - few)
    start = least - each * (few - 1)
    hops = 1 if ep <= MOST_RANKS_OF_ONE_HOP else 2
    return hops * start + each * _histograms(ep) * model.experts / MEASURED_EXPERTS


def table(machine: Machine, model: Model, eps: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Lines of cells, the header first: docs/guide/simulate.md and `sglang-macs simulate --exchange`."""
    lines = [("ranks", "NCCL by its model, us", "NCCL as measured, us", "over peers' memory, us", "kB a rank sends")]
    for ep in eps:
        e = exchange(machine, model, ep)
        known = {ranks: us for ranks, *us in MEASURED_US} if model.experts == MEASURED_EXPERTS else {}
        nccl = f"{known[ep][0]:.1f}" if ep in known else f"{e.nccl_us[0]:.0f} to {e.nccl_us[1]:.0f}"
        peer = "none" if e.peer_us is None else f"{e.peer_us:.1f}" if ep in known else f"{e.peer_us:.0f}"
        sent = f"{e.nccl_bytes / 1e3:.0f}" + ("" if e.peer_bytes is None else f"; {e.peer_bytes / 1e3:.0f} to peers")
        lines.append((f"{ep}{' (measured)' if ep in known else ''}", f"{e.nccl_model_us:.1f}", nccl, peer, sent))
    return lines
