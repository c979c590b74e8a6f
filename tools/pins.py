"""Where the pinned release of SGLang stands by name, and what stands there: `make format` writes it.

sglang_macs/releases.py says which release that is.
"""

import re

from sglang_macs.releases import PINNED, SGLANG, TORCH, TORCH_OF

FILES = ("README.md", "docs/guide/quickstart.md", "deploy/kubernetes/Dockerfile", "pyproject.toml")
VERSION = r"\d+(?:\.\d+)+"


def behind(version: str) -> str:
    """The first release that is no longer of this one's kind: 0.5.24 for 0.5.23, 2.15 for 2.14."""
    head, _, last = version.rpartition(".")
    return f"{head}.{int(last) + 1}"


WRITTEN = (
    (r"(?<=\bsglang==)" + VERSION, PINNED),
    (r"(?<=\btorch==)" + VERSION, TORCH_OF[PINNED]),
    (r"(?<=lmsysorg/sglang:v)" + VERSION, PINNED),
    (rf"(?<=unmodified SGLang ){VERSION}", PINNED),
    (rf"(?<=under SGLang ){VERSION} to {VERSION}", f"{SGLANG[0]} to {SGLANG[-1]}"),
    (rf'(?<="sglang)>={VERSION},<{VERSION}', f">={SGLANG[0]},<{behind(SGLANG[-1])}"),
    (rf'(?<="torch)>={VERSION},<{VERSION}', f">={TORCH[0]},<{behind(TORCH[-1])}"),
)


def with_pins(text: str) -> str:
    """A file of FILES with the pinned release in it."""
    for pattern, version in WRITTEN:
        text = re.sub(pattern, version, text)
    return text
