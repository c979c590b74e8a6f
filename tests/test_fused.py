"""The fused dispatch around its kernels, on the CPU: sizes, launches, and where rows and outputs lie.

The kernels themselves run in test_fused_emulated.py; here stand-ins record what they are handed.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reference import fused_c as fc
from sglang_macs import ops
from sglang_macs.comm import peer_status
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import fused, transport
from sglang_macs.dispatch.fused import FusedDispatch, Sizes, region_shape, unsupported
from sglang_macs.errors import MacsError
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.fused_dispatch import MEDIUM, SIZES, dispatch_of


def test_layout_and_faults_are_those_of_the_kernels():
    assert ops.RegionShape._fields == tuple(name for name, _ in fc.FusedShape._fields_)
    assert ops.RegionLayout._fields == tuple(name for name, _ in fc.FusedLayout._fields_)
    assert len(peer_status.FAULTS) == len(fc.FAULTS) and ctypes.sizeof(fc.FusedStatus) == peer_status.SIZE
    layout = ops.fused_layout(region_shape(SIZES, "fp8", 4))
    assert list(layout) == sorted(layout) and all(offset % 256 == 0 for offset in layout)


@pytest.mark.parametrize(("tokens", "rows"), [(128, 1024), (1, 8)])
def test_an_expert_has_room_for_every_token_of_every_rank(tokens, rows):
    """A batch that is not planned may send all of them there."""
    sizes = Sizes(**{**vars(MEDIUM), "max_tokens": tokens})
    shape = region_shape(sizes, "bf16", 4)
    assert (shape.expert_rows, shape.max_rows) == (rows, rows * 16)
    bytes_of_rows = 2 * 2 * rows * 16 * 2048  # the rows and the experts' outputs, in bf16
    assert bytes_of_rows < FusedDispatch.region_bytes(sizes, 4) < 1.05 * bytes_of_rows + 2**20


def test_rows_of_an_expert_are_whole_columns_of_scales():
    sizes = Sizes(num_ranks=3, num_experts=9, top_k=2, max_tokens=5, hidden_size=2048)
    assert region_shape(sizes, "fp8", 4).expert_rows == 16


@pytest.mark.parametrize(
    ("options", "sizes", "words"),
    [
        ({"exchange": "local"}, {}, "--macs-exchange local"),
        ({"reroute_rounds": 61}, {}, "61 rounds"),
        ({}, {"num_ranks": 32}, "32 ranks"),
        ({}, {"num_experts": 384}, "384 experts"),
        ({}, {"top_k": 17}, "top-17"),
        ({}, {"max_tokens": 1024}, "1024 tokens"),
        ({}, {"max_tokens": 1023, "top_k": 16}, "16368 assignments"),
        ({}, {"hidden_size": 2880}, "hidden size 2880"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(options, sizes, words):
    assert not unsupported(MacsConfig(), MEDIUM)
    assert words in unsupported(MacsConfig.from_preset(**options), Sizes(**{**vars(MEDIUM), **sizes}))


def test_operators_trace():
    """Shapes and dtypes of the Meta kernels, as a compiler asks for them."""
    shape = region_shape(SIZES, "bf16", 4)
    plan = Plan(MacsConfig(), SIZES.num_experts, SIZES.num_ranks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        region = torch.empty(ops.fused_layout(shape).bytes, dtype=torch.uint8, device="meta")
        hidden = torch.empty((5, 2048), dtype=torch.bfloat16, device="meta")
        ids, weights = torch.empty((5, 2), dtype=torch.int64, device="meta"), torch.empty((5, 2), device="meta")
        segment = torch.empty(5, dtype=torch.int32, device="meta")
        options = plan.fused_options(region.device) | {"num_segments": 1, "phase": "send", "timeout_ns": 1, "layer": 0}
        out = ops.fused_dispatch(region, [0, 0], 0, shape, hidden, ids, weights, segment, None, **options)
        ops.fused_carry(region, [0, 0], 0, shape, hidden, ids, phase="both", timeout_ns=1, layer=0)
        combined = ops.fused_combine(region, [0, 0], 0, shape, ids, weights, None, phase="both", timeout_ns=1, layer=0)
    assert [tuple(t.shape) for t in out] == [(5, 2), (5, 2), (5,), (2, 4), (3, 8, 2), (4,)]
    assert out[0].dtype == torch.int64 and combined.shape == (5, 2048) and combined.dtype == torch.bfloat16


@pytest.fixture
def dispatched() -> FusedDispatch:
    return dispatch_of()


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """(operator, phase, layer, seconds) of every launch, in place of the kernels."""
    made = []

    def note(name: str, phase: str, given: dict) -> None:
        made.append((name, phase, given["layer"], given["timeout_ns"] // 10**9))

    def dispatch(*_, phase, **given):
        note("dispatch", phase, given)
        return (torch.zeros(1, 4),) * 6

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ops, "fused_dispatch", dispatch)
    monkeypatch.setattr(ops, "fused_carry", lambda *_, phase, **given: note("carry", phase, given))
    monkeypatch.setattr(ops, "fused_receive", lambda *_, **given: note("receive", "", given))
    monkeypatch.setattr(ops, "fused_combine", lambda *_, phase, **given: note("combine", phase, given))
    return made


ROUTING = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4)


def a_dispatch(carrier: FusedDispatch, layer: int = 0, awaits: bool = False) -> None:
    carrier.carry(layer, "fp8", torch.zeros(1, 2048), ROUTING[0], awaits=awaits)
    carrier.receive()
    carrier.combine(*ROUTING)


def test_a_whole_batch_is_one_launch_each_way(dispatched, launches):
    def planned(layer: int, awaits: bool) -> None:
        plan = SimpleNamespace(fused_options=lambda device: {})
        tokens = RoutedTokens(torch.zeros(1, 2048), *ROUTING, None, torch.zeros(1), 1)
        dispatched.send(plan, layer, "fp8", tokens, awaits=awaits)
        dispatched.receive()

    planned(3, awaits=True)
    a_dispatch(dispatched, 4, awaits=True)
    dispatched.combine(*ROUTING, torch.zeros(4, 128, 2048))
    assert launches == [
        *(("dispatch", "both", 3, 200), ("carry", "both", 4, 200)),
        *(("combine", "receive", 4, 200), ("combine", "both", 4, 200)),
    ]
    launches.clear()
    planned(5, awaits=False)
    a_dispatch(dispatched, layer=6)
    assert launches[:2] == [("dispatch", "send", 5, 200), ("receive", "", 5, 200)]
    assert launches[2:] == [("carry", "send", 6, 200), ("receive", "", 6, 200), ("combine", "receive", 6, 200)]


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("intermediate", [512, 1024], ids=["", "first result as wide"])
def test_experts_write_where_combine_reads(dispatched, launches, monkeypatch, format, intermediate):
    """Of the two GEMMs of a layer the second one's result; a first one as wide as the model is not taken for it."""
    given = []
    monkeypatch.setattr(ops, "fused_combine", lambda *args, **_: given.append(args[-1]))
    transports = transport.Transports(MacsConfig.from_preset(dispatch="fused"))
    transports._made = [FusedDispatch(MacsConfig(), SIZES, dispatched.memory, 4), dispatched]  # one for each half
    transports.place_outputs(torch.zeros(2), torch.zeros(2))  # of a layer before any dispatch
    for _ in range(2):
        dispatched.carry(0, format, torch.zeros(1, 2048), ROUTING[0], awaits=True)
        rows, _, _ = dispatched.receive()
        first = torch.full((4, 128, 2 * intermediate), 1.0, dtype=torch.bfloat16)
        activated, outputs = first[..., :intermediate].clone(), torch.full((4, 128, 2048), 3.0, dtype=torch.bfloat16)
        transports.place_outputs(rows, first)
        assert (first == 1.0).all()
        transports.place_outputs(activated, outputs)
        outputs.fill_(5.0)  # the GEMM
        assert (dispatched._outputs() == 5.0).all() and outputs.shape == (4, 128, 2048)
        dispatched.combine(*ROUTING, outputs)
        assert given.pop() is None, "nothing is left to copy"
        dispatched._outputs().zero_()
    elsewhere = torch.full((4, 128, 2048), 3.0, dtype=torch.bfloat16)
    transports.place_outputs(activated, elsewhere)  # of a layer that DeepEP has fed
    assert (elsewhere == 3.0).all() and elsewhere.data_ptr() != outputs.data_ptr()
    dispatched.combine(*ROUTING, elsewhere)
    assert given.pop() is elsewhere, "another runner's outputs are copied"


def test_how_long_a_rank_is_waited_for(dispatched, launches, monkeypatch):
    """Three ranks of four died while one compiled, with empty caches, before its first dispatch. In a graph nobody
    compiles, and the limit is that of its capture, however often it is replayed.
    """
    for before, capturing, seconds in (
        (0, False, 200), (fused.FIRST_EPOCHS - 1, False, 200), (fused.FIRST_EPOCHS, False, 30), (0, True, 8)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        dispatched._launched = before
        a_dispatch(dispatched)
        assert [launches.pop()[3] for _ in range(3)] == [seconds] * 3 and not launches


def test_rows_that_nobody_received_stop_the_next_layer(dispatched, launches):
    for layer in (0, 1):
        a_dispatch(dispatched, layer)
    dispatched.carry(2, "fp8", torch.zeros(1, 2048), ROUTING[0])
    with pytest.raises(MacsError, match=r"layer 3 sent.*layer 2 received before"):
        dispatched.carry(3, "fp8", torch.zeros(1, 2048), ROUTING[0])


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_what_the_runner_is_handed_lies_as_deepgemm_wants_it(dispatched, format):
    assert dispatched.fits("bf16") and dispatched.fits("fp8"), "the first layer says"
    dispatched._set_format(format)
    assert dispatched.fits(format) and not dispatched.fits("fp8" if format == "bf16" else "bf16")
    rows, scales, m = dispatched.rows(), dispatched.scales(), dispatched.shape.expert_rows
    assert rows.shape == (4, m, 2048) and rows.is_contiguous()
    if format == "bf16":
        assert scales is None
    else:
        assert rows.dtype == torch.float8_e4m3fn
        assert scales.shape == (4, m, 16) and scales.stride() == (16 * m, 1, m) and m % 4 == 0
    with pytest.raises(MacsError, match="as the layers before"):
        dispatched._set_format("fp8" if format == "bf16" else "bf16")
