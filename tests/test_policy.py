"""The options of a plan on their way to the operators, and what the extension says of itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from reference import kernels_c
from reference.policy_c import Policy as PolicyInC
from sglang_macs import choices, ops
from sglang_macs.config import MacsConfig
from sglang_macs.errors import MacsError
from sglang_macs.ops import definitions, policy
from sglang_macs.plan.plan import Plan
from tests.support import operators

OTHERS = {"num_experts": 60, "num_ranks": 4, "scoring": "sigmoid", "needs_entropy": True}
OPTIONS = {
    "scope": "expert", "load": "effective", "importance": "entropy_gate", "reroute": "local", "protect_text": False,
    "buckets": 64, "reroute_rounds": 7, "gamma": math.inf, "rho": 0.3, "alpha": 2.5, "c_min": 6.0, "delta": 0.25,
}  # fmt: skip


def test_what_is_packed_is_unpacked() -> None:
    got = policy.unpack(list(policy.of_config(MacsConfig(**OPTIONS), **OTHERS)))
    for name, value in (OPTIONS | OTHERS).items():
        named = definitions.read().names.get(name)
        assert getattr(got, name) == (named.index(value) if named else value), name


def test_no_option_of_the_structure_is_without_a_source() -> None:
    """Every one is an option of the flags, or given by the model and its group."""
    flags = {f.name for f in dataclasses.fields(MacsConfig)}
    assert {*definitions.read().policy} - flags == {*OTHERS, "bucket_bits"} and {*OPTIONS} <= flags


def test_a_plan_alone_never_falls_below_its_own_rank_s_share_of_rows() -> None:
    plan = Plan(MacsConfig(**OPTIONS | {"exchange": "local"}), 60, 4)
    assert policy.unpack(plan.policy).c_min == 1.5


def test_ctypes_reads_the_structure_as_the_compiler_does() -> None:
    assert [name for name, _ in PolicyInC._fields_] == list(definitions.read().policy)


@pytest.mark.parametrize("wrong", ["gama", "gamma"])
def test_options_that_are_missing_or_too_many_are_named(wrong: str) -> None:
    options = OPTIONS | OTHERS | ({} if wrong in OPTIONS else {wrong: 1.0})
    if wrong in OPTIONS:
        del options[wrong]
    with pytest.raises(MacsError, match=f"policy: got {wrong} missing or too many"):
        policy.pack(**options)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        ("num_experts", 2.5, "num_experts: got 2.5, expected a whole number"),
        ("num_experts", math.nan, "num_experts: got nan, expected a whole number"),
        ("bucket_bits", 5.0, "bucket_bits: got 5, expected 1 to 4"),
        ("scope", 2.0, "scope: got 2, expected 0 to 1"),
        ("importance", -1.0, "importance: got -1, expected 0 to 2"),
        ("gamma", -1.0, "gamma: got -1, expected a number above 0"),
    ],
)
def test_the_operators_refuse_a_number_that_is_no_option(position: str, value: float, words: str) -> None:
    packed = list(operators.policy_of(num_experts=8))
    packed[list(definitions.read().policy).index(position)] = value
    ids = torch.zeros((1, 1), dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        ops.load_histogram(ids, torch.ones(1, 1), torch.ones(1), torch.zeros(1, dtype=torch.int32), packed)
    with pytest.raises(ValueError, match=words):
        policy.unpack(packed)
    with pytest.raises(ValueError, match=r"policy: got \d+ numbers, expected \d+"):
        policy.unpack(packed[:-1])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("LOADS", ("rows", "tokens"), "load"),
        ("NUM_SUMS", 5, "num_sums 4, expected 5"),
        ("BUCKETS", (32, 64, 128), "buckets"),
        ("FAULTS", ("none",), "fault"),
    ],
)
def test_an_extension_of_other_sources_is_refused(monkeypatch, name: str, value: object, words: str) -> None:
    definitions.check()
    monkeypatch.setattr(choices, name, value)
    with pytest.raises(MacsError, match=f"{words}.*make build"):
        definitions.check()


def test_an_extension_older_than_its_definitions_is_refused(monkeypatch) -> None:
    class Older:
        def __getattr__(self, name: str):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "sglang_macs", Older(), raising=False)
    with pytest.raises(MacsError, match=r"older sources.*make build"):
        definitions.read.__wrapped__()


def test_structures_for_kernels_have_no_fields_of_pythons_own() -> None:
    """A benchmark that set an option which had moved measured the default instead."""
    given = kernels_c.ClipApplyParams()
    with pytest.raises(AttributeError, match="ClipApplyParams has no field reroute_rounds"):
        given.reroute_rounds = 2
    given.assignments.policy.reroute_rounds = 2
    assert given.assignments.policy.reroute_rounds == 2
