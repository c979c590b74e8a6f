"""The next release of SGLang is one line: nothing but sglang_macs/releases.py, or what is made from it, names one."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from sglang_macs.releases import PINNED, SGLANG, TORCH_OF
from tools import docs_tables, pins

ROOT = Path(__file__).resolve().parent.parent
NAMES_A_RELEASE = re.compile(r"\b(?:sglang|torch)==\d|sglang:v\d")
# What was, what tests make up, and what a build leaves.
HISTORY = ("CHANGELOG.md", "docs/log/", "docs/results/", "tests/", "build/", "dist/", "sglang_macs.egg-info/")


def sources() -> list[Path]:
    suffixes = {".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".sbatch", ".in", ""}
    found = (path for path in ROOT.rglob("*") if path.suffix in suffixes and path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])]


def test_no_other_file_names_a_release():
    names = {}
    for path in sources():
        name = str(path.relative_to(ROOT))
        if name.startswith(HISTORY) or name in pins.FILES:
            continue
        if found := NAMES_A_RELEASE.search(path.read_text(encoding="utf-8", errors="ignore")):
            names[name] = found[0]
    assert not names, "write it from sglang_macs/releases.py (tools/pins.py)"


@pytest.mark.parametrize("name", pins.FILES)
def test_files_hold_the_pinned_release(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert pins.with_pins(text) == text, "run: make format"
    assert any(re.search(pattern, text) for pattern, _ in pins.WRITTEN)


def test_every_place_is_rewritten_for_the_next_release(monkeypatch):
    """All that is written changes with the line, and nothing of the old release stays."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in pins.FILES)
    changed = text
    for pattern, version in pins.WRITTEN:
        assert re.search(pattern, text), pattern
        changed = re.sub(pattern, version.replace(PINNED, "9.8.7").replace(TORCH_OF[PINNED], "6.5.4"), changed)
    assert not re.search(r"(?:sglang|torch)==(?!9\.8\.7|6\.5\.4)\d|sglang:v(?!9\.8\.7)\d", changed)


def test_the_range_of_the_extra_ends_behind_the_last_release():
    assert (pins.behind("0.5.23"), pins.behind("2.14")) == ("0.5.24", "2.15")


@pytest.mark.parametrize(("given", "wanted"), [({}, PINNED), ({"SGLANG": SGLANG[0]}, SGLANG[0])])
def test_the_environment_takes_the_pinned_release(tmp_path, given, wanted):
    """scripts/setup_env.sh asks pip for it, or for the one that is named; here nothing is installed."""
    asked, python = tmp_path / "asked", tmp_path / "python"
    pip = f'#!/bin/sh\necho "$@" > {asked}\nexit 1\n'
    (tmp_path / "pip").write_text(pip)
    makes_venv = f'mkdir -p "$3/bin"; cp {tmp_path}/pip "$3/bin/python"; chmod +x "$3/bin/python"; exit 0'
    python.write_text(f'#!/bin/sh\n[ "$1 $2" != "-m venv" ] || {{ {makes_venv}; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    script = [str(ROOT / "scripts" / "setup_env.sh"), str(tmp_path / "venv")]
    done = subprocess.run(["bash", *script], env={**os.environ, "PYTHON": str(python), **given}, capture_output=True)
    assert done.returncode == 1 and asked.read_text().split()[-1] == f"sglang=={wanted}"


def test_the_torch_of_the_installed_release_is_the_one_it_asks_for():
    """Only an environment of its own has that: check_compat.py puts other releases before the installed torch."""
    (torch,) = (line.partition("==")[2] for line in metadata.requires("sglang") if line.startswith("torch=="))
    assert torch == TORCH_OF[metadata.version("sglang")]


def test_the_models_of_another_release_do_not_get_into_the_docs(monkeypatch):
    text = "<!-- dispatching: written by make format -->\nwhat stands there\n<!-- /dispatching -->"
    for release, stays in ((PINNED, False), ("0.5.2", True)):
        monkeypatch.setattr(docs_tables.metadata, "version", lambda name, release=release: release)
        assert (docs_tables.with_tables(text) == text) == stays
