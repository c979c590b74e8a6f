"""`sglang-macs top URL`."""

import argparse

from ..arguments import add_server, number

HELP = "a live view of what MACS does in a running server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    seconds = number(float, 0.1, 86400)
    parser.add_argument("--interval", type=seconds, default=2.0, help="seconds between frames (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print everything since the server's start, and end")
    add_server(parser)


def run(args: argparse.Namespace) -> int:
    from .. import server_info, top

    top.watch(server_info.of_arguments(args.url, args), args.interval, args.once)
    return 0
