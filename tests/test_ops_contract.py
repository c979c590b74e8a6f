"""What every operator keeps beside its values: Meta kernels, one graph, any strides, one line for bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reference import cases
from sglang_macs import ops
from tests.support import operators
from tests.support.bad_calls import BAD, swapped, with_value
from tests.support.operator_cases import (
    USUAL,
    assigned,
    chain,
)

NAMES = ("entropy_score", "entropy_weight", "load_histogram", "clip_threshold", "clip_apply", "selection_score")


class Recorder(TorchDispatchMode):
    """Keeps the call that a wrapper makes, so that opcheck sees the very schema arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.call = (func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["imbalanced", "no_tokens", "biased_groups"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, case: str) -> None:
    operator, inputs, settings = chain(cases.named(case))[name]
    with Recorder() as recorder:
        operator(*inputs, **settings)
    func, args, kwargs = recorder.call
    assert func.namespace == "sglang_macs"
    torch.library.opcheck(func, args, kwargs)


def shapes(result: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every tensor that an operator returned."""
    return [(tuple(t.shape), t.dtype) for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", NAMES)
def test_meta_and_fake_tensors_have_the_real_shapes(name: str) -> None:
    operator, inputs, settings = chain(cases.named("odd_experts"))[name]
    want = shapes(operator(*inputs, **settings))
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs]
    assert shapes(operator(*meta, **settings)) == want
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        assert shapes(operator(*fake, **settings)) == want


def test_compiles_in_one_graph_for_any_number_of_tokens() -> None:
    """The five operators as the plan chains them, without a graph break and without a second compilation."""
    compilations = []
    policy = operators.policy_of(**USUAL, num_experts=16, num_ranks=4)

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        compilations.append(module)
        return module.forward

    def chained(b: cases.Batch, modality: torch.Tensor) -> tuple[torch.Tensor, ...]:
        entropy = ops.entropy_score(b.hidden_states, b.segment)
        w = ops.entropy_weight(entropy, b.segment, 2, 1.0)
        own = ops.load_histogram(*assigned(b, w), policy)
        shift, cut = ops.clip_threshold(own, own, modality, policy)
        return ops.clip_apply(*assigned(b, w), b.router_logits, shift, cut, policy)

    compiled = torch.compile(chained, backend=backend, fullgraph=True, dynamic=True)
    modality = torch.zeros(16, dtype=torch.int8)
    for tokens in (40, 12, 64):
        b = cases.batch(cases.generator(tokens), **(cases.NAMED["imbalanced"] | {"num_tokens": tokens}))
        for got, want in zip(compiled(b, modality), chained(b, modality), strict=True):
            assert torch.equal(got, want)
    assert len(compilations) == 1


@pytest.mark.parametrize(("name", "what", "call"), BAD, ids=[f"{i}-{b[0]}-{b[1]}" for i, b in enumerate(BAD)])
def test_bad_input_says_what_was_got_and_what_expected(name: str, what: str, call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=what) as error:
        call(*chain(cases.named("imbalanced"))[name])
    assert "got" in str(error.value)
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("name", "what", "call"),
    [
        ("entropy_weight", "segment", with_value(1, 0, 2)),
        ("load_histogram", "topk_ids", with_value(0, (3, 1), 16)),
        ("load_histogram", "topk_ids", with_value(0, (0, 0), 2**31 - 1)),
        ("clip_apply", "topk_ids", with_value(0, (39, 3), 16)),
    ],
)
def test_an_index_out_of_range_is_refused(name: str, what: str, call: Callable[..., Any]) -> None:
    """It would be read or written outside its table; on a CPU the check costs nothing."""
    with pytest.raises(ValueError, match=what):
        call(*chain(cases.named("imbalanced"))[name])


@pytest.mark.parametrize("name", NAMES)
def test_strided_input_is_read_right(name: str) -> None:
    operator, inputs, settings = chain(cases.named("imbalanced"))[name]
    want = operator(*inputs, **settings)
    for position, tensor in enumerate(inputs):
        if isinstance(tensor, torch.Tensor):
            got = swapped(position, lambda t: torch.stack([t, t], -1)[..., 0])(operator, inputs, settings)
            for g, w in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
                assert torch.equal(g, w)
