"""The plugin's hooks on stand-ins: whose configuration an engine's schedulers get, and what a scheduler tells of."""

import os
from functools import partial
from types import SimpleNamespace

import pytest

from sglang_macs.config import CONFIG_ENV, MacsConfig, configure
from sglang_macs.engine import launcher, model_runner, scheduler_process, worker
from sglang_macs.errors import MacsError


class OtherEngine:
    """Starts its schedulers itself, as RayEngine does."""

    @classmethod
    def _launch_scheduler_processes(cls):
        raise AssertionError("must not be reached")


def record(backend: str = "none", **config):
    """A server's record as SGLang and `_from_cli_args` make it."""
    made = SimpleNamespace(moe_a2a_backend=backend)
    if config:
        made._macs_config = MacsConfig.from_preset(**config).to_json()
    return made


def entry_of(server_args):
    """What the hook lets SGLang start schedulers with."""
    return launcher._launch_scheduler_processes(lambda cls, args, ports, entry: entry, None, server_args, None, len)


def test_every_engine_starts_schedulers_with_its_own_configuration(monkeypatch):
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    first, second = record(gamma=1.05), record(gamma=1.2, min_tokens=7)
    for one in (first, second, first):
        entry = entry_of(one)
        assert isinstance(entry, partial) and entry.func is scheduler_process.run_scheduler_process
        assert entry.args[0] == one._macs_config
        assert entry_of(record()) is len  # an engine without MACS, between those with it
    assert CONFIG_ENV not in os.environ


def test_configure_is_for_engines_that_ask_and_bring_no_options(monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, "")  # taken back after the test
    assert entry_of(record("macs")).args[0] == MacsConfig.from_preset().to_json()
    configure(MacsConfig.from_preset(gamma=1.3))
    assert entry_of(record("macs")).args[0]["gamma"] == 1.3
    assert entry_of(record(gamma=1.05)).args[0]["gamma"] == 1.05
    assert entry_of(record()) is len


def test_an_engine_that_starts_schedulers_itself_is_refused():
    with pytest.raises(MacsError, match="OtherEngine, which starts schedulers in its own way"):
        launcher._launch_subprocesses(None, OtherEngine, record("macs"))
    assert launcher._launch_subprocesses(lambda cls, args: "started", OtherEngine, record()) == "started"


def test_a_picture_without_positions_is_told_of_once(capfd, monkeypatch):
    monkeypatch.setattr(worker, "_current", worker.Worker(MacsConfig.from_preset()))
    picture = SimpleNamespace(is_audio=lambda: False, offsets=[(1, 2)])
    inputs = SimpleNamespace(mm_items=[picture])

    def prefill(*ids, session=None, extends=True):
        req = SimpleNamespace(multimodal_inputs=inputs, origin_input_ids=ids, session=session)
        text = SimpleNamespace(multimodal_inputs=None, origin_input_ids=ids, session=None)
        mode = SimpleNamespace(is_extend=lambda: extends)
        result = SimpleNamespace(forward_mode=mode, contains_mm_inputs=lambda: True)
        model_runner._forward_batch_init_new(result, None, SimpleNamespace(reqs=[text, req], decoding_reqs=None))
        return capfd.readouterr().err

    marked = model_runner.batch.PAD_ID_BASE
    assert prefill(5, marked, marked) == prefill(5, 6, 6, session="a turn") == prefill(5, 6, 6, extends=False) == ""
    assert "a picture has no position of its own" in prefill(5, 6, 6)
    assert prefill(5, 6, 6) == ""
