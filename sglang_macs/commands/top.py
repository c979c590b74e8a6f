"""`sglang-macs top URL`."""

import argparse

from .. import top

HELP = "a live view of what MACS does in a running server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between frames (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print everything since the server's start, and end")


def run(args: argparse.Namespace) -> int:
    top.watch(args.url, args.interval, args.once)
    return 0
