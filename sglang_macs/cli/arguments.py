"""Arguments of the commands: numbers within limits, and a parser whose errors are one line."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from ..errors import printable
from ..observe.server_info import API_KEY_ENV, Server

ADMIN_KEY_ENV = "SGLANG_ADMIN_API_KEY"
MOST_VALUES = 64  # of a list


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name no value of an unknown flag: it may be a mistyped --api-key."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}. {self.prog} --help lists what there is.\n")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = " ".join(word.partition("=")[0] for word in rest if word.startswith("-"))
            self.error(f"unknown flags: {flags}" if flags else f"{len(rest)} arguments too many")
        return found


def number(of: type[int] | type[float], low: float, high: float) -> Callable[[str], int | float]:
    """A type for argparse: a number from `low` to `high`."""

    def parse(text: str) -> int | float:
        try:
            value = of(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN fails
            expected = f"a whole number from {low} to {high}" if of is int else f"a number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


def gamma(text: str) -> float:
    """A type for argparse: a capacity factor."""
    return math.inf if text == "inf" else number(float, 1e-6, 1e6)(text)


def several(of: Callable[[str], object]) -> Callable[[str], tuple]:
    """A type for argparse: one or more values of a type, with commas between them."""

    def parse(text: str) -> tuple:
        parts = text.split(",")
        if len(parts) > MOST_VALUES:
            raise argparse.ArgumentTypeError(f"got {len(parts)} values, expected at most {MOST_VALUES}")
        return tuple(of(part) for part in parts)

    return parse


def add_server(parser: argparse.ArgumentParser) -> None:
    """How to be let in by a server: --api-key and --cacert, for `server_of`."""
    help = f"of a server that was started with one; default: the environment's {API_KEY_ENV}, which ps does not show"
    parser.add_argument("--api-key", metavar="KEY", help=help)
    parser.add_argument("--cacert", metavar="FILE", help="certificates (PEM) to trust for https, not the system's")


def server_of(url: str, args: argparse.Namespace) -> Server:
    """The server at `url`, with the key and the certificates that the arguments and the environment give."""
    key = args.api_key if args.api_key is not None else os.environ.get(API_KEY_ENV, "")
    return Server(url, key.strip() or None, args.cacert)


def add_admin(parser: argparse.ArgumentParser) -> None:
    """--admin-api-key, for `admin_of`."""
    help = f"of a server that has one beside --api-key; default: the environment's {ADMIN_KEY_ENV}"
    parser.add_argument("--admin-api-key", metavar="KEY", help=help)


def admin_of(server: Server, args: argparse.Namespace) -> Server:
    """The same server for requests that its --admin-api-key guards, where it has one."""
    key = args.admin_api_key if args.admin_api_key is not None else os.environ.get(ADMIN_KEY_ENV, "")
    return replace(server, api_key=key.strip() or server.api_key)
