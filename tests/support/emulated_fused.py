"""The kernels of the fused dispatch on the emulated machine, a plan for them, and ways to launch them."""

from __future__ import annotations

from reference import fused_c as fc
from reference.fused_case import Group
from reference.kernel_case import Config
from tests.support import emulated
from tests.support.emulated import Kernels

SOURCES = ("fused_dispatch.cu", "fused_carry.cu", "fused_combine.cu", "fused_capi.cu")
SOON_NS = 300_000  # of simulated time
PLAN = Config(T=12, H=2048, E=16, K=4, R=4, hot=1.5, visual=0.8, gamma=1.0)


def build() -> Kernels:
    sources = [emulated.CUDA / name for name in SOURCES]
    made = Kernels(emulated.build("fused", *sources, defines=["MACS_C_API"]))
    fc.check_sizes(made.library)
    return made


def each_by_itself(group: Group) -> None:
    """Every rank launched on a stream of its own, as processes would."""
    with group.kernels.machine.together():
        for rank in group.ranks:
            group.kernels.stream = rank + 1
            group.dispatch(only=rank)
    group.kernels.stream = 0


def in_two_phases(group: Group) -> None:
    group.dispatch(fc.SEND)
    group.dispatch(fc.RECEIVE)


def each_by_itself_in_two_phases(group: Group) -> None:
    """A rank may receive before another has sent."""
    with group.kernels.machine.together():
        for rank in group.ranks:
            group.kernels.stream = rank + 1
            group.dispatch(fc.SEND, only=rank)
            group.dispatch(fc.RECEIVE, only=rank)
    group.kernels.stream = 0
