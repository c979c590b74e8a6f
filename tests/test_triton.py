"""The Triton operators without a GPU: their tests under Triton's interpreter, and every kernel compiled for sm_90."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reference import cases
from sglang_macs import ops
from sglang_macs.plan.places import Places
from tests.support import operators
from tests.support.bad_calls import BAD
from tests.support.operator_cases import chain

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
OPERATORS_TESTS = (
    "tests/test_ops.py", "tests/test_ops_contract.py", "tests/test_replicas.py", "tests/test_replicas_operators.py",
)  # fmt: skip
# Of these what the interpreter does within a minute: all operators, no batch of 1500 tokens.
QUICK = """
(test_entropy and not prefill and not 0.5 and not 8.0) or equal_entropies
or any_gate or of_any or infinite_gamma
or (named_cases and not prefill and (global-effective-rank-ids_dtype1 or local-rows-expert-ids_dtype0))
or (awkward and nan) or a_proposal or selection_score or rounded_to_nothing or without_logits or keep_their or strided
or (placements_are_planned and int64 and (one_copy or copies_beside or many_copies_half or everywhere-))
or quotas_and_limits or tables_that_do_not_fit
"""
PLACEMENTS = "any_group_is_planned or placements_are_planned"


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter from the repository's root, with the tests' modules and `env`."""
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **env}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("selected", "at_least"),
    [(" ".join(QUICK.split()), 100), pytest.param(PLACEMENTS, 24, marks=pytest.mark.nightly)],
    ids=["quick", "placements"],
)
def test_the_operators_tests_pass_under_the_interpreter(selected, at_least):
    pytest_args = ("-m", "pytest", "-q", "-p", "support.interpreted_triton", *OPERATORS_TESTS, "-k", selected)
    run = python(*pytest_args, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > at_least


@pytest.mark.parametrize(("name", "what", "call"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_input_says_what_was_got_and_what_expected(monkeypatch, name, what, call):
    """The checks that the C++ operators make, before any kernel is launched."""
    from sglang_macs.ops import triton as triton_ops

    operator, inputs, settings = chain(cases.named("imbalanced"))[name]
    monkeypatch.setattr(ops.operators, "loaded", SimpleNamespace(**{f.__name__: f for f in triton_ops.OPERATORS}))
    with pytest.raises(ValueError, match=what) as error:
        call(operator, inputs, settings)
    assert ": got " in str(error.value)
    assert ", expected " in str(error.value)


class NoGpu:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> dict[str, list[str]]:
    """Launches compile for sm_90 and run nothing: name of the kernel -> PTX of its versions."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels: dict[str, list[str]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        kernels.setdefault(self.__name__, []).append(kernel.asm["ptx"])

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NoGpu())
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return kernels


def test_every_kernel_compiles_for_sm_90(compiled):
    from sglang_macs.ops import triton as triton_ops

    tokens, experts, ranks = 64, 16, 4
    ids = torch.zeros(tokens, 4, dtype=torch.int64)
    gates, logits = torch.zeros(tokens, 4), torch.zeros(tokens, experts)
    segment = torch.zeros(tokens, dtype=torch.int32)
    entropy = triton_ops.entropy_score(torch.zeros(tokens, 128, dtype=torch.bfloat16), segment)
    weight = triton_ops.entropy_weight(entropy, segment, 1, 1.0)
    kinds = (
        {"scope": "rank", "load": "rows", "importance": "entropy_gate", "reroute": "global", "scoring": "softmax"},
        {"scope": "expert", "load": "effective", "importance": "entropy", "reroute": "local", "scoring": "sigmoid"},
        {"scope": "rank", "load": "rows", "importance": "gate", "reroute": "global", "scoring": "sqrtsoftplus"},
    )
    for options in kinds:
        sizes = {"num_experts": experts, "num_ranks": ranks, "reroute_rounds": 1}
        policy = operators.policy_of(**options, **sizes, gamma=1.05, c_min=2.0)
        own = triton_ops.load_histogram(ids, gates, weight, segment, policy)
        modality = torch.zeros(experts, dtype=torch.int8)
        shift, cut = triton_ops.clip_threshold(own, own, modality, policy)
        triton_ops.clip_apply(ids, gates, weight, segment, logits, shift, cut, policy)
    compile_replicas(triton_ops, ids, gates, logits, weight, segment)
    written = {name for file in (ROOT / "sglang_macs/ops/triton").glob("*.py")
               for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}  # fmt: skip
    assert set(compiled) == written
    doubles = "_levels_kernel", "_cut_kernel", "_split_kernel", "_exceeded_kernel", "_limit_kernel"
    for name in doubles:  # the thresholds' double arithmetic is in the order written
        assert any("mul.rn.f64" in ptx for ptx in compiled[name])
        assert not any(re.search(r"fma\.\w+\.f64", ptx) for ptx in compiled[name])


def compile_replicas(triton_ops, ids, gates, logits, weight, segment) -> None:
    """Launches every operator with the tables of four ranks, which have two copies of expert 0 each beside others."""
    experts, ranks = logits.size(1), 4
    mapped = [*range(experts), 0, 0, 1, 2]
    table = Places(experts, len(mapped), ranks, 1, mapped).table(torch.device("cpu"))
    policy = operators.policy_of(num_experts=experts, num_ranks=ranks, reroute_rounds=1, gamma=1.05, alpha=1.0)
    batch = ids, gates, weight, segment
    own = triton_ops.load_histogram(*batch, policy, table)
    modality = torch.zeros(experts, dtype=torch.int8)
    shift, quota, _, limits = triton_ops.replica_balance(own, own, modality, policy, table)
    chosen, cut = triton_ops.replica_choose(*batch, own, shift, quota, limits, policy, table)
    triton_ops.clip_apply(*batch, logits, shift, cut, policy, table, chosen)


def test_a_pour_sees_what_the_one_before_wrote(compiled):
    """Between a store and the next load of the loop stands a barrier: Triton orders nothing by itself."""
    from sglang_macs.ops import triton as triton_ops

    tokens = 4
    ids, rows = torch.zeros(tokens, 2, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int32)
    compile_replicas(triton_ops, ids, torch.zeros(tokens, 2), torch.zeros(tokens, 16), torch.zeros(tokens), rows)
    (ptx,) = compiled["_pour_kernel"]
    order = re.findall(r"ld\.global|st\.global|bar\.sync", ptx)
    first = order.index("st.global")
    assert order[first - 1 :] == ["bar.sync", "st.global", "st.global", "bar.sync"]


@pytest.mark.parametrize("asked", ["triton", "metal"])
def test_the_environment_chooses_the_cuda_operators(asked):
    answer = "from sglang_macs import ops; print(ops.cuda_backend(), ops.has_cuda())"
    run = python("-c", answer, MACS_CUDA_BACKEND=asked)
    if asked == "triton":
        assert run.stdout.split() == ["triton", "True"]
    else:
        assert "MACS_CUDA_BACKEND: got metal, expected cuda or triton." in run.stderr
