"""Mixed load and a killed rank, on one real server. `make test-load` runs all of it: 3 x 500 requests and more."""

import pytest
from load_test import KINDS, MACS, mix, rank_killed, under_load
from serving import EP2_ARGS, Server


def test_the_mix_holds_every_kind_and_is_the_same_every_time():
    plan = mix(100)
    assert {request.kind for request in plan} == set(KINDS)
    assert plan == mix(100) and plan != mix(100, seed=1)
    assert len({request.question for request in plan if request.question}) >= 6


@pytest.mark.server
def test_mixed_load_changes_no_answer_and_a_killed_rank_ends_the_server(vl_model, server_log):
    flags = [*EP2_ARGS, *MACS, "--macs-gamma", "inf", "--macs-min-tokens", "0"]
    with Server(vl_model, flags, log=server_log) as server:
        checks = [*under_load(server, 40, float("inf")), *rank_killed(server)]
    assert [check for check in checks if not check.ok] == []
    assert {"requests", "answers as alone", "bounds", "rank killed: the server ends"} <= {c.name for c in checks}
