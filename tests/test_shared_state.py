"""Ranks that nobody asks: their counters are in the answer of the one that is."""

import threading
import time

import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.observe import shared_state
from sglang_macs.observe.shared_state import SharedState, merged
from sglang_macs.observe.stats import Stats


def state(rank: int, planned: int, layers: tuple[int, ...] = (0,)) -> dict:
    counted = Stats(dispatches=2 * planned, planned=planned)
    counted.skipped["decode"] = rank
    counted.violations["bound"] = rank
    made = {"version": "0", "rank": rank, "ep_size": 2, "config": MacsConfig().to_json(), **counted.snapshot()}
    made["own"]["clipped_text"] = 10 + rank
    made["layers"] = {str(layer): {"dispatches": planned, "rows_before": [3, 4]} for layer in layers}
    made["expert_rows"] = {layer: [[rank, 1], [2, 3]] for layer in layers}
    return made


def test_counts_are_added_up_and_facts_of_the_group_are_kept():
    both = merged([state(0, 5, (0, 1)), state(1, 5, (2,))])
    assert (both["planned"], both["dispatches"], both["skipped"]["decode"], both["violations"]["bound"]) == (
        10,
        20,
        1,
        1,
    )
    assert both["own"]["clipped_text"] == 21
    assert sorted(both["layers"]) == ["0", "1", "2"] and both["layers"]["2"]["rows_before"] == [3, 4]
    assert both["expert_rows"][2] == [[1, 1], [2, 3]] and merged([state(0, 1), state(1, 1)])["expert_rows"][0] == [
        [1, 2],
        [4, 6],
    ]
    assert both["ranks"] == {"ep_size": 2, "answering": [0, 1]} and both["rank"] == 0
    assert merged([state(1, 3)])["ranks"]["answering"] == [1]


def test_the_rank_that_is_asked_speaks_for_those_asked_with_it(monkeypatch):
    monkeypatch.setattr(shared_state, "TIMEOUT_SECONDS", 60.0)
    store = dist.HashStore()
    asked, silent = SharedState(store, (0, 0), asked_with=[(0, 1)]), SharedState(store, (0, 1))
    for planned in (1, 4):  # the second answer must hold the second state, though the first one is still there
        late = threading.Thread(target=lambda p=planned: (time.sleep(0.2), silent.answer(state(1, p))))
        late.start()
        answer = asked.answer(state(0, planned))
        late.join()
        assert answer["planned"] == 2 * planned
        assert answer["expert_rows"] == {"0": [[1, 2], [4, 6]]}


def test_a_rank_that_is_gone_makes_nobody_wait_for_ever():
    asked = SharedState(dist.HashStore(), (0, 0), asked_with=[(0, 1)], asked_later=[(1, 0)])
    answer = asked.answer(state(0, 2))
    assert answer["planned"] == 2 and answer["ranks"]["answering"] == [0]


def test_later_stages_are_taken_as_they_last_published():
    store = dist.HashStore()
    asked, later = SharedState(store, (0, 0), asked_later=[(1, 0)]), SharedState(store, (1, 0))
    assert later.is_due(3) and not asked.is_due(3)
    later.publish(state(0, 7, (1,)))
    assert not later.is_due(14), "nothing new"
    assert sorted(asked.answer(state(0, 7))["layers"]) == ["0", "1"]
