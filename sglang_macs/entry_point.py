"""The entry point of the `sglang.srt.plugins` group: `plugin.register`, whose failure ends a launch that asks for MACS.

SGLang logs and swallows what a plugin raises, on import too; the launch would then end with a usage message that does
not know `macs`, or serve without it. So nothing that can fail is imported before the `try`.
"""

import os
import sys
from itertools import pairwise

CONFIG_ENV = "SGLANG_MACS_CONFIG"  # as in config.py, which is among the things that may not import


def register() -> None:
    """Registers the plugin. Ends the process with one line and status 2 if that fails and MACS is asked for."""
    try:
        from .engine import plugin

        plugin.register()
    except Exception as error:
        if not _asked_for(sys.argv[1:]):
            raise  # SGLang logs it, and serves without a plugin that nobody asked for
        why = (str(error).strip().splitlines() or ["no reason given"])[-1]
        fix = "Run sglang-macs doctor."
        line = f"the plugin: got {type(error).__name__} ({why}), expected it to register with SGLang. {fix}"
        print(f"sglang-macs: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def _asked_for(argv: list[str]) -> bool:
    """Whether the command line, or the configuration of this process tree, turns MACS on."""
    backend = ("--moe-a2a-backend", "macs")
    flags = any(word.startswith(("--enable-macs", "--macs-", "=".join(backend))) for word in argv)
    return flags or backend in pairwise(argv) or CONFIG_ENV in os.environ
