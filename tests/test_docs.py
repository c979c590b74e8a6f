"""What the documents claim is what the code has: flags, hooks, make targets, paths."""

import re
from pathlib import Path

import pytest

from sglang_macs import config
from sglang_macs.cpu_compat import gaps
from sglang_macs.plugin import LAUNCHER_HOOKS, SCHEDULER_HOOKS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_flag_table_is_that_of_the_config():
    assert config.flag_table() in README, "run: make format"


def test_hook_ledger_lists_exactly_what_is_registered():
    ledger = re.findall(r"^\| `(sglang\.\S+)` \| (\w+) \|", (ROOT / "docs" / "hooks.md").read_text(), re.MULTILINE)
    hooks = [(h.target, h.kind) for h in (*LAUNCHER_HOOKS, *SCHEDULER_HOOKS)]
    assert ledger == hooks + [(g.target, g.kind) for g in gaps.GAPS]


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ +)make ([a-z-]+)", README, re.MULTILINE))
    assert named and named <= targets, named - targets


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_files_named_in_the_readme_exist(path):
    assert (ROOT / path).exists()


def test_flags_named_in_the_readme_exist():
    known = {config.flag(n) for n in config.MacsConfig.__dataclass_fields__} | {"--macs-*", "--macs-"}
    assert set(re.findall(r"--macs-[a-z-]*", README)) <= known
