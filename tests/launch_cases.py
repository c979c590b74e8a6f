"""Run as a program: what the launcher does with each command line, as JSON. One process, since importing SGLang
takes seconds.

stdin: a list of argv lists. stdout, last line: a list of {"code": exit code or null, "error": stderr of that case,
"backend": the resolved record's all-to-all backend, "config": the configuration variable}.
"""

import contextlib
import io
import json
import os
import sys

from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from sglang_macs.config import CONFIG_ENV


def launch(argv: list[str]) -> dict:
    """Parses and resolves one command line as the launcher does."""
    os.environ.pop(CONFIG_ENV, None)
    error, code, backend = io.StringIO(), None, None
    with contextlib.redirect_stderr(error):
        try:
            args = prepare_server_args(argv)
            args.resolve_once()
            backend = args.moe_a2a_backend
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "error": error.getvalue(), "backend": backend, "config": os.environ.get(CONFIG_ENV)}


load_plugins()
results = [launch(argv) for argv in json.load(sys.stdin)]
print(json.dumps(results))
