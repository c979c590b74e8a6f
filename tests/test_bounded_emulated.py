"""The bounded permutation's CUDA kernels on the emulated machine: plain torch's result, and the CPU operators' bits."""

from __future__ import annotations

import pytest

from reference import bounded_c, bounded_case
from reference.bounded_case import CASES, Case
from sglang_macs import ops
from tests.support import emulated
from tests.support.emulated import Kernels

pytestmark = pytest.mark.emulated
SOURCES = [emulated.CUDA / f"bounded_{name}.cu" for name in ("permute", "gather", "capi")]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "watched"])
def machine(request) -> emulated.Library:
    return emulated.build("bounded", *SOURCES, defines=["MACS_C_API"], races=request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_rows_lie_by_expert_in_the_order_of_tokens(machine: emulated.Library, case: Case, format: str) -> None:
    permute, _ = bounded_c.operators(Kernels(machine))
    for seed in range(2):
        machine.configure(seed)
        bounded_case.check_permute(permute, case, format, seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_come_back_with_the_cpus_bits(machine: emulated.Library, case: Case) -> None:
    _, gather = bounded_c.operators(Kernels(machine))
    for seed in range(2):
        machine.configure(seed)
        bounded_case.check_gather(gather, case, seed, reference=ops.bounded_gather)


def test_what_has_no_row_is_counted_and_nothing_is_written_for_it(machine: emulated.Library) -> None:
    permute, _ = bounded_c.operators(Kernels(machine))
    bounded_case.check_lost(permute)


def test_sizes_that_are_none_are_refused(machine: emulated.Library) -> None:
    given = bounded_case.arguments(Case(4, 2, 3, rows=12), "bf16", 0)
    wrong = {"top_k": 33, "num_experts": 1025, "row_bytes": 8, "tile": 0, "max_rows": 2**31}
    for name, value in wrong.items():
        params = bounded_c.permute_params(**given)
        setattr(params, name, value)
        with pytest.raises(emulated.Failure, match="refused before the launch"):
            machine("macs_bounded_permute", params)


def test_structures_agree(machine: emulated.Library) -> None:
    for i, kind in enumerate(bounded_c.STRUCTS):
        assert machine.cdll.macs_bounded_sizeof(i) == bounded_c.ctypes.sizeof(kind)
