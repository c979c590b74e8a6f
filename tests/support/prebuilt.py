"""The extension that this clone has built, in place of a compilation of minutes."""

import shutil
import sys
import sysconfig
from pathlib import Path

from sglang_macs import extension

PACKAGE = Path(__file__).resolve().parents[2] / "sglang_macs"


def as_if_built(source: Path, programs: Path) -> None:
    """As after an interrupted build: setuptools finds the extension newer than its sources and does not compile again.

    source: a copy of this repository; programs: a folder in front of PATH, for a ninja that fails: with one, torch
    compiles all the same.
    """
    built = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "sglang_macs"
    built.mkdir(parents=True)
    shutil.copy(extension.library_in(PACKAGE), built)
    programs.mkdir(exist_ok=True)
    (programs / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (programs / "ninja").chmod(0o755)
