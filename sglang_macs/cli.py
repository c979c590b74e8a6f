"""The command `sglang-macs`: finds its subcommands in `sglang_macs/commands`, one module each."""

import argparse
import importlib
import pkgutil
import sys

from . import __version__, commands
from .errors import MacsError


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; `args.run(args)` runs the chosen one and returns its exit status."""
    parser = argparse.ArgumentParser(prog="sglang-macs", description="Tools around SGLang served with MACS.")
    parser.add_argument("--version", action="version", version=f"sglang-macs {__version__}")
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in sorted(module.name for module in pkgutil.iter_modules(commands.__path__)):
        module = importlib.import_module(f"{commands.__name__}.{name}")
        added = chosen.add_parser(name.replace("_", "-"), help=module.HELP, description=module.HELP)
        module.add_arguments(added)
        added.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Bad input ends in one line on stderr and status 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except MacsError as error:
        print(f"sglang-macs {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
