"""The mix of benchmarks/load_test.py. test_server_unbounded.py sends a little of it, `make test-load` all."""

from benchmarks.load_test import KINDS, mix


def test_the_mix_holds_every_kind_and_is_the_same_every_time():
    plan = mix(100)
    assert {request.kind for request in plan} == set(KINDS)
    assert plan == mix(100) and plan != mix(100, seed=1)
    assert len({request.question for request in plan if request.question}) >= 6
