"""Run as a program: what the launcher does with each case, as JSON. One process, since importing SGLang takes seconds.

stdin: a list of cases, each an argv list or the keyword arguments of an Engine as an object. stdout, last line: a list
of {"code": exit code or null, "error": stderr of that case, "raised": the exception's text or null, "backend": the
resolved record's all-to-all backend, "config": the record's MACS configuration or null,
"environment": that of the process tree or null}.
"""

import contextlib
import io
import json
import os
import sys

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from sglang_macs.config import CONFIG_ENV


def launch(case: list[str] | dict[str, object]) -> dict:
    """Parses and resolves one command line as the launcher does, or an engine's arguments as `Engine.__init__` does."""
    error, code, raised, backend, config = io.StringIO(), None, None, None, None
    os.environ.pop(CONFIG_ENV, None)
    with contextlib.redirect_stderr(error):
        try:
            record = prepare_server_args(case) if isinstance(case, list) else Engine.server_args_class(**case)
            record.resolve_once()
            backend, config = record.moe_a2a_backend, getattr(record, "_macs_config", None)
        except SystemExit as stop:
            code = stop.code
        except Exception as exception:
            raised = f"{type(exception).__name__}: {exception}"
    found = {"code": code, "error": error.getvalue(), "raised": raised, "backend": backend, "config": config}
    return found | {"environment": json.loads(os.environ.get(CONFIG_ENV, "null"))}


load_plugins()
results = [launch(case) for case in json.load(sys.stdin)]
print(json.dumps(results))
