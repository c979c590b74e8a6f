"""The check against other releases, on the one that is installed; others take a download."""

import json
from importlib.metadata import version
from pathlib import Path

from scripts import check_compat


def test_the_others_are_all_but_the_installed_one(monkeypatch):
    monkeypatch.setattr(check_compat, "SGLANG", ("0.5.1", "0.5.2", "0.5.3"))
    monkeypatch.setattr(check_compat.metadata, "version", lambda name: "0.5.2")
    assert check_compat.others() == ["0.5.3", "0.5.1"]


def test_every_hook_takes_in_the_installed_release(tmp_path):
    assert check_compat.check_hooks(version("sglang"), tmp_path) == {"passed": True, "detail": "all took"}


def test_another_release_than_asked_for_is_not_called_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(check_compat, "HOOKS", 'print("HOOKS", \'{"version": "0.5.21", "lost": {}}\')')
    found = check_compat.check_hooks("0.5.23", tmp_path)
    assert not found["passed"] and "0.5.21 instead" in found["detail"]


def test_a_lost_hook_and_a_crash_are_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(check_compat, "HOOKS", 'print("HOOKS", \'{"version": "1", "lost": {"a.b": "gone"}}\')')
    assert check_compat.check_hooks("1", tmp_path) == {"passed": False, "detail": {"a.b": "gone"}}
    monkeypatch.setattr(check_compat, "HOOKS", "raise SystemExit('no such module')")
    assert check_compat.check_hooks("1", tmp_path) == {"passed": False, "detail": "no such module"}


def test_every_stage_names_tests_that_are_there():
    """Words for `pytest -k` went on to pass where the tests that they meant had moved to another file."""
    for name in (name for stage in check_compat.STAGES.values() for name in stage):
        file, _, test = name.partition("::")
        assert f"def {test}" in (check_compat.ROOT / file).read_text(), name


def test_the_release_comes_before_the_installed_one(tmp_path):
    first, second, *_ = check_compat.environment_of(tmp_path)["PYTHONPATH"].split(":")
    assert Path(first).name == "site" and second == str(tmp_path)


def test_every_stage_keeps_its_own_commit(tmp_path, monkeypatch):
    """The families of a release took an hour of another day than its hooks."""
    file, passed = tmp_path / "compat.json", {"passed": True, "detail": ""}
    for made, stages in (("1a", ("hooks", "server")), ("2b", ("server", "families"))):
        monkeypatch.setattr(check_compat, "commit", lambda made=made: made)
        check_compat.save(file, {"sglang": "0.5.2", **dict.fromkeys(stages, passed)})
    (row,) = json.loads(file.read_text())["rows"]
    assert {stage: row[stage]["commit"] for stage in ("hooks", "server", "families")} == {
        "hooks": "1a",
        "server": "2b",
        "families": "2b",
    }
    assert row["server"].keys() == {"passed", "detail", "torch", "commit", "date"}
