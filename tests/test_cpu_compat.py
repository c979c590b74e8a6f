"""The CPU compatibility functions: what each one changes, against naive loops and against SGLang's own functions."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from sglang_macs.cpu_compat import SITE_DIR, environment, gaps, shell_exports, threads_bind

HIDDEN, EXPERTS, INTER = 16, 4, 8


class TopK(NamedTuple):
    """Shaped like SGLang's StandardTopKOutput."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None = None


def run_python(code: str, *path: Path | str, **env: str) -> str:
    """Standard output of a fresh interpreter with `path` as PYTHONPATH; its standard error if it fails."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **env}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def expert_layer(seed: int = 0) -> SimpleNamespace:
    """What `moe_forward_native` reads of a layer: w13 [E, 2I, H], w2 [E, H, I], bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(EXPERTS, 2 * INTER, HIDDEN, generator=generator).bfloat16() / 4
    w2 = torch.randn(EXPERTS, HIDDEN, INTER, generator=generator).bfloat16() / 4
    return SimpleNamespace(num_experts=EXPERTS, w13_weight=w13, w2_weight=w2)


def regular_moe(layer, x, topk_output, config):
    """Stand-in for the original: right on regular input, and as unable as SGLang's on any other."""
    weights, ids = topk_output.topk_weights, topk_output.topk_ids
    if not len(x) or (ids < 0).any() or any(len(set(row)) < len(row) for row in ids.tolist()):
        raise IndexError("the original dies here")
    return loop_moe(layer, x, weights, ids)


def loop_moe(layer, x, weights, ids) -> torch.Tensor:
    """Sum over valid routes of weight * expert(x), experts in bfloat16, products and sum in float32."""
    slots = torch.zeros(*ids.shape, x.shape[1])
    for t, row in enumerate(ids.tolist()):
        for k, expert in enumerate(row):
            if expert >= 0:
                gate, up = torch.nn.functional.linear(x[t : t + 1], layer.w13_weight[expert]).chunk(2, dim=-1)
                y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, layer.w2_weight[expert])
                slots[t, k] = y[0].float() * weights[t, k]
    return slots.sum(1).to(x.dtype)


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1], [2, 3], [3, 1]],
        [[0, -1], [2, 3], [-1, 1]],
        [[-1, -1], [2, 3], [-1, -1]],
        [[-1, -1], [-1, -1], [-1, -1]],
        [[1, 1], [2, 3], [0, 0]],
        [[1, 1], [-1, 2], [0, 3]],
    ],
    ids=["regular", "empty slots", "empty rows", "nothing", "repeated", "mixed"],
)
def test_native_moe_is_the_sum_over_valid_routes(ids):
    layer, x = expert_layer(), torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, weights = torch.tensor(ids, dtype=torch.int32), torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    got = gaps.native_moe(regular_moe, layer, x, TopK(weights, ids), None)
    assert got.dtype == x.dtype and torch.equal(got, loop_moe(layer, x, weights, ids))


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4)], ids=["rows", "rows by rank"])
def test_gathered_rows_lie_below_each_other_for_gloo(shape):
    def gloo(group, output, input):
        assert output.shape[1:] == input.shape[1:] and output.shape[0] == 3 * input.shape[0]
        output.copy_(torch.cat([input + rank for rank in range(3)]))

    output, own = torch.zeros(shape), torch.arange(8.0).view(2, 4)
    gaps.gathered_rows(gloo, None, output, own)
    assert torch.equal(output.view(3, 2, 4), torch.stack([own, own + 1, own + 2]))


def test_native_moe_takes_zero_rows():
    empty = TopK(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32))
    got = gaps.native_moe(regular_moe, expert_layer(), torch.zeros(0, HIDDEN).bfloat16(), empty, None)
    assert got.shape == (0, HIDDEN) and got.dtype == torch.bfloat16


def test_native_moe_hands_regular_input_through_untouched():
    x, topk, result = torch.zeros(1, HIDDEN), TopK(torch.ones(1, 2), torch.tensor([[0, 3]])), object()
    assert gaps.native_moe(lambda *a: (a, result)[1], None, x, topk, None) is result


class FakeTopk:
    """What `TopK.forward_native` finds in its own module: a map that adds, and a recorder, off within the original."""

    def __init__(self):
        self.recorded, self.off = [], False

    def get_global_expert_distribution_recorder(self):
        return self

    @contextmanager
    def disable_this_region(self):
        self.off = True
        yield
        self.off = False

    def on_select_experts(self, topk_ids):
        assert not self.off
        self.recorded.append(topk_ids)

    def topk_ids_logical_to_physical(self, ids, info):
        return ids if info is None else ids + info


@pytest.mark.parametrize(("real", "masked"), [(0, 4), (3, 1), (4, 0), (9, 0)])
def test_experts_are_mapped_and_recorded_and_padded_rows_are_routed_nowhere(monkeypatch, real, masked):
    seen = {}

    def original(self, hidden_states, router_logits, **kwargs):
        assert topk.off  # it would count logical experts for physical ones
        seen.update(kwargs)
        return TopK(torch.ones(4, 2), torch.arange(8, dtype=torch.int32).view(4, 2))

    topk = FakeTopk()
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.moe.topk", topk)
    padding = {"num_token_non_padded": torch.tensor(real)}
    out = gaps.native_topk(original, None, None, None, **padding, expert_location_dispatch_info=10, extra=1)
    assert seen == {"extra": 1}  # the original asserts that it is told neither of padding nor of places
    assert (out.topk_ids == -1).all(1).sum() == masked
    assert torch.equal(out.topk_ids[: 4 - masked], 10 + torch.arange(8, dtype=torch.int32).view(4, 2)[: 4 - masked])
    assert len(topk.recorded) == 1 and torch.equal(topk.recorded[0], out.topk_ids)
    whole = gaps.native_topk(original, None, None, None)
    assert (whole.topk_ids >= 0).all()


@pytest.mark.parametrize("rows", [0, 5])
def test_idle_rank_gets_zero_positions(rows):
    batch = SimpleNamespace(mrope_positions=None, positions=torch.arange(rows))
    runner = SimpleNamespace(model_config=SimpleNamespace(model_is_mrope=True))
    gaps.idle_mrope_positions(None, batch, runner, rows, 1)
    assert batch.mrope_positions.shape == (3, rows) and not batch.mrope_positions.any()
    assert batch.mrope_positions.dtype == torch.int64


def test_idle_positions_leave_others_alone():
    busy = SimpleNamespace(mrope_positions=torch.ones(3, 2), positions=torch.arange(2))
    text = SimpleNamespace(mrope_positions=None, positions=torch.arange(2))
    gaps.idle_mrope_positions(None, busy, SimpleNamespace(model_config=SimpleNamespace(model_is_mrope=True)), 2, 1)
    gaps.idle_mrope_positions(None, text, SimpleNamespace(model_config=SimpleNamespace(model_is_mrope=False)), 2, 1)
    assert torch.equal(busy.mrope_positions, torch.ones(3, 2)) and text.mrope_positions is None


def test_rope_without_scaling_is_made_as_for_other_devices():
    def original(*args, **kwargs):
        return args, kwargs

    args = (64, 64, 4096, 10000.0)
    plain = gaps.plain_rope(original, *args, rope_scaling=None, device="cpu", dtype=torch.bfloat16)
    assert plain == ((*args, True, None), {"device": None, "dtype": torch.bfloat16})
    scaled = gaps.plain_rope(original, *args, False, {"rope_type": "deepseek_yarn"}, device="cpu")
    assert scaled == ((*args, False, {"rope_type": "deepseek_yarn"}), {"device": "cpu"})


def test_latent_attention_is_absorbed_under_torch_s_backend_alone(monkeypatch):
    class Registry:
        __module__ = "handlers"

    monkeypatch.setitem(sys.modules, "handlers", SimpleNamespace(AttnForwardMethod=SimpleNamespace(MLA="absorbed")))
    original = {"triton": "Triton's"}
    get = lambda name: gaps.absorbed_mla(lambda cls, asked: original[asked], Registry, name)  # noqa: E731
    assert get("torch_native")(None, None) == "absorbed" and get("triton") == "Triton's"


def test_register_hands_every_gap_to_the_right_installer():
    hooked, defined = [], []
    targets = gaps.register(lambda *a: hooked.append(a), lambda *a: defined.append(a))
    assert [t for t, _, _ in hooked] + [t for t, _ in defined] == sorted(targets, key=_is_missing)
    assert {kind for _, _, kind in hooked} <= {"around", "after", "before", "replace"}
    assert all(gap.why and gap.until for gap in gaps.GAPS)
    alone = []
    assert gaps.register_idle_mrope(lambda *a: alone.append(a)) == (gaps.IDLE_MROPE.target,)
    assert alone == [(gaps.IDLE_MROPE.target, gaps.idle_mrope_positions, "after")]


def _is_missing(target: str) -> bool:
    return next(gap.kind == "missing" for gap in gaps.GAPS if gap.target == target)


SGLANG_CHECK = """
import pkgutil, torch
from types import SimpleNamespace
from sglang_macs.cpu_compat import gaps
for gap in gaps.GAPS:  # every target exists in this sglang, except what is to be defined
    owner, name = gap.target.rsplit(".", 1)
    assert hasattr(pkgutil.resolve_name(owner), name) == (gap.kind != "missing"), gap.target
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.topk import StandardTopKOutput
g = torch.Generator().manual_seed(0)
layer = SimpleNamespace(num_experts=4, w13_weight=torch.randn(4, 16, 16, generator=g).bfloat16() / 4,
                        w2_weight=torch.randn(4, 16, 8, generator=g).bfloat16() / 4)
config = SimpleNamespace(apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None)
x, w = torch.randn(6, 16, generator=g).bfloat16(), torch.rand(6, 3, generator=g)
ids = torch.rand(6, 4, generator=g).topk(3).indices.int()
whole = moe_forward_native(layer, x, StandardTopKOutput(w, ids, None), config)
died = 0
for bad, rows in ((torch.where(ids == 2, -1, ids), x), (torch.zeros_like(ids), x), (ids[:0], x[:0])):
    topk = StandardTopKOutput(w[: len(rows)], bad, None)
    try:
        moe_forward_native(layer, rows, topk, config)
    except Exception:
        died += 1
    assert gaps.native_moe(moe_forward_native, layer, rows, topk, config).shape == rows.shape
# Rows without an empty slot have the same bits, whether or not others in the batch have one.
holes = StandardTopKOutput(w, torch.where(ids == 2, -1, ids), None)
holed = gaps.native_moe(moe_forward_native, layer, x, holes, config)
regular = ~(ids == 2).any(1)
print(died, int(regular.sum()), torch.equal(holed[regular], whole[regular]))
"""


@pytest.mark.server
def test_gaps_exist_in_sglang_and_are_filled():
    root = Path(__file__).resolve().parent.parent
    env = environment(ranks=1, base={})
    got = run_python(SGLANG_CHECK, env.pop("PYTHONPATH"), root, **env).splitlines()[-1].split()
    assert got[0] == "3" and int(got[1]) > 0 and got[2] == "True", got


@pytest.mark.parametrize(
    ("ranks", "cores", "expected"),
    [
        (1, [0, 1], "0-1"),
        (2, [0, 1], "0|1"),
        (2, [0, 1, 2, 3, 8, 9], "0-2|3,8-9"),
        (4, [5, 7], "5|7|5|7"),
        (2, [3], "3|3"),
    ],
)
def test_threads_bind(ranks, cores, expected):
    assert threads_bind(ranks, cores) == expected


def test_threads_bind_refuses_zero_ranks():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        threads_bind(0)


def test_environment_prepends_once():
    once = environment(base={"PYTHONPATH": "/a:/b"})["PYTHONPATH"]
    assert once == f"{SITE_DIR}:/a:/b" == environment(base={"PYTHONPATH": once})["PYTHONPATH"]


def test_environment_keeps_sglang_off_nccl():
    assert not Path(environment(base={})["SGLANG_NCCL_SO_PATH"]).exists()


@pytest.mark.nightly
def test_a_server_on_a_cpu_does_not_wait_for_dumps_of_gpus():
    """It would wait a minute where a rank has died and another still lives, as on a busy machine."""
    read = "from sglang.srt.environ import envs; print(envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.get())"
    env = {**os.environ, **environment(ranks=1)}
    done = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_shell_exports_are_what_environment_says():
    script = shell_exports(ranks=1) + '\npython3 -c "import os, json; print(json.dumps(dict(os.environ)))"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    expected = environment(ranks=1)
    assert {name: json.loads(done.stdout)[name] for name in expected} == expected


STUB = "import sgl_kernel; print(sgl_kernel.__file__); print(getattr(sgl_kernel, 'VALUE', None))"


def test_stub_stands_in_and_raises_when_called():
    code = """
import sgl_kernel, torch
from sgl_kernel import silu_and_mul
from sgl_kernel.mamba import causal_conv1d_fn_cpu
assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")  # SGLang would take that for AMX
torch.ops.sgl_kernel.fused_sigmoid_mul_cpu
for call in (silu_and_mul, causal_conv1d_fn_cpu):
    try:
        call()
    except NotImplementedError as error:
        print(error)
"""
    lines = run_python(code, SITE_DIR).splitlines()
    assert [line.split(" was called")[0] for line in lines] == [
        "sgl_kernel.silu_and_mul",
        "sgl_kernel.causal_conv1d_fn_cpu",
    ]
    assert all("CPU stub" in line and "not installed" in line for line in lines)


def test_stub_gives_way_to_a_real_package(tmp_path):
    package = tmp_path / "sgl_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("from sgl_kernel.part import VALUE\n")
    (package / "part.py").write_text("VALUE = 42\n")
    assert run_python(STUB, SITE_DIR, tmp_path).splitlines() == [str(package / "__init__.py"), "42"]


def test_stub_replaces_a_package_that_cannot_be_imported(tmp_path):
    package = tmp_path / "sgl_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("import sgl_kernel.part\n")
    (package / "part.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    code = "import sgl_kernel; print(sgl_kernel.__version__); print(sgl_kernel.REASON)"
    version, reason = run_python(code, SITE_DIR, tmp_path).splitlines()
    assert version == "0.0.0+cpu.stub" and "OSError: libcuda.so.1" in reason


def test_sitecustomize_runs_the_one_it_hides(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.chained = 'yes'\n")
    assert run_python("import sys; print(sys.chained)", SITE_DIR, tmp_path) == "yes"
    assert run_python("import sys; print(hasattr(sys, 'chained'), 'torch' in sys.modules)", SITE_DIR) == "False False"


FAKE_TORCHVISION = {
    "__init__.py": "from . import extension, _meta_registrations\n",
    "extension.py": "def _has_ops():\n    return {loaded}\n",
    "_meta_registrations.py": "import torch\nHAD_NMS = hasattr(torch.ops.torchvision, 'nms')\n",
}


@pytest.mark.parametrize(("loaded", "declared"), [(False, "True"), (True, "False")])
def test_torchvision_schemas_only_where_its_extension_does_not_load(tmp_path, loaded, declared):
    (tmp_path / "torchvision").mkdir()
    for name, text in FAKE_TORCHVISION.items():
        (tmp_path / "torchvision" / name).write_text(text.format(loaded=loaded))
    code = "from torchvision import _meta_registrations as m; print(m.HAD_NMS)"
    assert run_python(code, SITE_DIR, tmp_path) == declared


def test_allow_torchvision_does_the_same_in_process():
    root = Path(__file__).resolve().parent.parent
    code = "from sglang_macs.cpu_compat import allow_torchvision as a; a(); a(); import torchvision.ops; print('fine')"
    assert run_python(code, root) == "fine"
