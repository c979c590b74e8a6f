"""Where the built extension lies, and the error where it does not. Nothing here imports torch.

`python -m` puts the current folder first on the path. In a clone whose package was installed without --editable that
is a `sglang_macs` without an extension, which shadows the installed one.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from .errors import MacsError

NAME = "sglang_macs._C"
PACKAGE = Path(__file__).parent


def library_in(package: Path) -> Path | None:
    """The extension in a folder `sglang_macs`, built for this Python, or None."""
    return next((file for suffix in EXTENSION_SUFFIXES if (file := package / f"_C{suffix}").is_file()), None)


def missing(package: Path) -> MacsError:
    """The error of a `sglang_macs` at `package` that has no extension; names an installed one that it shadows."""
    expected = f"_C{EXTENSION_SUFFIXES[0]}"
    if installed := _installed_beside(package):
        shadowed = f"no extension in {package}, while the installed package lies in {installed}"
        fix = f"Run it from another folder, or: pip install --no-build-isolation --no-deps -e {package.parent}"
        return MacsError(NAME, shadowed, expected, fix)
    return MacsError(NAME, f"no extension in {package}", expected, f"Build it: make -C {package.parent} build")


def _installed_beside(package: Path) -> Path | None:
    """The first `sglang_macs` with an extension on the path, or the one that runs, apart from `package`."""
    others = (*(Path(entry or ".") / package.name for entry in sys.path), PACKAGE)
    found = (other.resolve() for other in others if library_in(other))
    return next((other for other in found if other != package.resolve()), None)
