"""The command `sglang-macs`. Each subcommand is a module here: HELP, `add_arguments(parser)`, `run(args) -> int`.

A subcommand imports what it works with when it runs: `--help`, `top` and `simulate` do not wait for torch, nor need it.
"""

import argparse
import importlib
import io
import os
import sys

from .. import __version__
from ..errors import MacsError
from .arguments import Parser

COMMANDS = ("calibrate", "compare", "doctor", "report", "set", "simulate", "top")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; `args.run(args)` runs the chosen one and returns its exit status."""
    parser = Parser(prog="sglang-macs", description="Tools around SGLang served with MACS.")
    parser.add_argument("--version", action="version", version=f"sglang-macs {__version__}")
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        added = chosen.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(added)
        added.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Bad input ends in one line on stderr and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows bars as question marks
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except MacsError as error:
        return _fail(args.command, error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sglang_macs"):
            raise
        fix = f"pip install {error.name.partition('.')[0]}"
        return _fail(args.command, MacsError("environment", f"no module {error.name}", "it installed", fix))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sglang-macs top | head`: nobody reads on, and Python must not try again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _fail(command: str, error: MacsError) -> int:
    print(f"sglang-macs {command}: {error}", file=sys.stderr)
    return 2
