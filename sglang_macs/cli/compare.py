"""`sglang-macs compare URL [URL] --requests FILE`: what clipping costs on this model and this traffic."""

import argparse
import contextlib
import json
import signal
from collections.abc import Iterator

from ..console import say
from ..errors import MacsError, printable
from ..observe.server_info import Server
from .arguments import add_admin, add_server, admin_of, gamma, number, server_of

HELP = "what clipping costs on your model and requests: MACS on against off, beside off against off"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="the server, which is turned off and on; with a second one, the one to compare by")
    parser.add_argument("other", nargs="?", metavar="url", help="the server that is compared with it; none is switched")
    help = "JSON lines of OpenAI chats, with a reference if the answer is known; or a log of --log-requests"
    parser.add_argument("--requests", required=True, metavar="FILE", help=help)
    parser.add_argument("--gamma", type=gamma, help="of MACS on (default: what the server has)")
    help = "requests at once; enough of them to fill the ranks (default: %(default)s)"
    parser.add_argument("--concurrency", type=number(int, 1, 4096), default=32, metavar="N", help=help)
    tokens = number(int, 1, 4096)
    parser.add_argument("--max-tokens", type=tokens, default=64, help="of an answer at most (default: %(default)s)")
    help = "nats per token beyond the noise floor that are no loss (default: %(default)s)"
    parser.add_argument("--most-divergence", type=number(float, 0, 100), default=2e-4, metavar="KL", help=help)
    help = "share of right answers whose loss is none (default: %(default)s)"
    parser.add_argument("--most-lost", type=number(float, 0, 1), default=0.01, metavar="SHARE", help=help)
    help = "an answer is right if it is a reference, or contains one (default: %(default)s)"
    parser.add_argument("--match", choices=("equal", "contains"), default="equal", help=help)
    help = "answers are kept here: the same command goes on where it was killed"
    parser.add_argument("--answers", metavar="FILE", help=help)
    parser.add_argument("-o", "--output", default="compare.html", help="the page (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="all figures")
    add_server(parser)
    add_admin(parser)


def run(args: argparse.Namespace) -> int:
    from .. import files
    from ..compare import page, requests, result
    from ..compare.answers import Kept, model_of
    from ..compare.run import blocks_of, complete

    outputs = {"--output": args.output, "--json": args.json, "--answers": args.answers}
    for what, path in outputs.items():
        if path is not None:
            files.check_writable(path, what)  # not after an hour of requests
    if args.other is not None and args.gamma is not None:
        raise MacsError("--gamma", "it beside two servers", "one server, which is switched", "Launch the second so.")
    asked = requests.load(args.requests, args.max_tokens)
    servers = [server_of(url, args) for url in (args.url, args.other) if url is not None]
    admin = admin_of(servers[0], args)
    blocks = blocks_of(asked, args.concurrency)
    what = {"requests": requests.fingerprint(asked), "servers": [server.url for server in servers]}
    what |= {"gamma": None if args.gamma is None else f"{args.gamma:g}", "concurrency": args.concurrency}
    kept = Kept(args.answers, what)
    if len(complete(kept, blocks)) < len(blocks):
        try:
            with _ended_by_signals():
                _ask(args, servers, admin, {server: model_of(server) for server in servers}, blocks, kept)
        except KeyboardInterrupt:
            if args.answers is not None:
                say(f"{len(kept.passes)} passes are in {printable(args.answers)}; the same command goes on")
            raise
    allowed = {"divergence": args.most_divergence, "lost": args.most_lost}
    found = result.evaluate(kept, blocks, complete(kept, blocks), allowed, args.match == "contains", args.other is None)
    print(page.as_text(found))
    files.write(args.output, page.page(found, _title(args)), "--output", private=True)  # users' words are in it
    if args.json is not None:
        files.write(args.json, json.dumps(found.to_json(), indent=1) + "\n", "--json")
    return found.status


def _ask(
    args: argparse.Namespace, servers: list[Server], admin: Server, models: dict[Server, str], blocks, kept
) -> None:
    from ..compare.answers import ask
    from ..compare.arms import OneServer, TwoServers
    from ..compare.run import run

    if len(servers) == 2:
        kept.begin(None)
        run(TwoServers(*servers), models, blocks, args.concurrency, kept)
        return
    [server] = servers

    def once() -> None:
        ask(server, models[server], blocks[0][0], "warm")

    with OneServer(server, admin, args.gamma, kept.own, once) as switched:
        kept.begin(switched.own)
        run(switched, models, blocks, args.concurrency, kept)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: what was switched is put back."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _title(args: argparse.Namespace) -> str:
    what = f"{args.other} against {args.url}"
    if args.other is None:
        what = f"{args.url}, MACS on ({'its own gamma' if args.gamma is None else f'gamma {args.gamma:g}'}) and off"
    return f"{what}; {args.requests}, {args.concurrency} requests at once"
