"""`sglang-macs simulate`: the study of `sglang_macs.simulate` from the command line."""

import argparse
import dataclasses
import json
from pathlib import Path

from ..errors import MacsError, printable
from ..simulate.machines import MACHINES, MODELS, SOURCES
from .arguments import add_server, number, server_of, several

HELP = "what MACS would buy on a cluster, from expert loads and a machine description"
DEFAULT_MACHINE, DEFAULT_MODEL = "h200", "qwen3-vl-30b-a3b"
LEAST, MOST = 1e-6, 1e15  # of a machine's figures: no time made of them is infinite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", choices=list(MACHINES), default=DEFAULT_MACHINE)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=NUMBER", help="change a machine's figure")
    parser.add_argument("--model", choices=list(MODELS), default=DEFAULT_MODEL)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--loads", help="JSON of loads (docs/guide/simulate.md); default: the published ones")
    help = (
        "loads of a running server, of a folder of --macs-trace, or of a .pt of SGLang's expert distribution recorder"
    )
    where.add_argument("--from", dest="source", metavar="URL|FOLDER|FILE.pt", help=help)
    add_server(parser)
    parser.add_argument(
        "--visual-share",
        type=number(float, 0, 1),
        default=0.9,
        help="of the tokens, for loads that do not tell modalities apart",
    )
    parser.add_argument(
        "--noise", type=number(float, 0, 2), help="spread of an expert's share between batches, over its mean"
    )
    parser.add_argument("--ep", type=several(number(int, 2, 1024)), default=(8, 16, 32, 64, 128), metavar="N,N")
    parser.add_argument("--presets", type=several(str), default=("cai", "paper", "rank"), metavar="NAME,NAME")
    parser.add_argument(
        "--gamma", type=several(number(float, 0.01, 100)), default=(1.0, 1.05, 1.1, 1.2, 1.5), metavar="G,G"
    )
    parser.add_argument(
        "--tokens", type=number(int, 1, 2**20), default=8192, help="prefill tokens per rank and forward pass"
    )
    parser.add_argument("--context", type=number(int, 0, 2**24), default=2048, help="tokens that attention looks at")
    parser.add_argument("--batches", type=number(int, 1, 1000), default=100, help="random batches to average over")
    parser.add_argument(
        "--tile", type=number(int, 1, 2**20), default=128, help="rows to which grouped GEMMs pad an expert"
    )
    parser.add_argument("--fp8", action="store_true", help="experts and dispatch in FP8")
    parser.add_argument("--low-latency", action="store_true", help="DeepEP's low-latency mode: one row an assignment")
    parser.add_argument(
        "--redundant", type=number(int, 0, 1024), default=0, help="copies of experts, placed as EPLB does"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the random batches")
    parser.add_argument(
        "--exchange", action="store_true", help="print what the plans' exchange costs, and nothing else"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the study, too")


def run(args: argparse.Namespace) -> int:
    from .. import files
    from ..simulate import exchange, picture, study

    if args.exchange:
        print(study.aligned(exchange.table(_machine(args.machine, args.set), MODELS[args.model], args.ep)))
        print(f"\nMeasured: {exchange.SOURCE}. All else is simulated.")
        return 0
    if args.plot is not None:
        if Path(args.plot).suffix != ".png":
            raise MacsError("--plot", repr(args.plot), "a file whose name ends in .png")
        files.check_writable(args.plot, "--plot")  # not after the study
    settings = _settings(args)
    loads = _loads(args)
    rows = study.run(settings, loads)
    if args.plot:
        kind = "FP8" if args.fp8 else "bf16"
        title = f"{args.model} on {args.machine}, {args.tokens} tokens per rank ({kind}); simulated"
        picture.draw(rows, title, args.plot)
    if args.json:
        print(json.dumps(study.to_json(settings, loads, rows), indent=1))
    else:
        print(f"{study.table(rows)}\n\nSimulated, not measured. Loads: {printable(loads.source)}")
        print(f"Machine: {settings.machine.source}; " + "; ".join(f"{k}: {v}" for k, v in SOURCES.items()))
    return 0


def _settings(args: argparse.Namespace):
    from ..config import OFF, PRESETS
    from ..simulate.study import Settings

    for name in args.presets:
        if name not in PRESETS or name in OFF:
            raise MacsError("--presets", repr(name), "names among rank, paper, cai", "off is always shown.")
    return Settings(
        machine=_machine(args.machine, args.set),
        model=MODELS[args.model],
        ep=args.ep,
        presets=args.presets,
        gammas=args.gamma,
        tokens=args.tokens,
        batches=args.batches,
        context=args.context,
        fp8=args.fp8,
        tile_m=args.tile,
        low_latency=args.low_latency,
        seed=args.seed,
        redundant=args.redundant,
    )


def _machine(name: str, changes: list[str]):
    """The preset with FIELD=NUMBER changes; whole numbers where the field is one."""
    machine = MACHINES[name]
    numbers = {f.name: f.type for f in dataclasses.fields(machine) if f.type in (int, float)}
    for change in changes:
        field, _, text = change.partition("=")
        try:
            value = numbers[field](text)
        except (KeyError, ValueError) as error:
            raise MacsError("--set", repr(change), f"FIELD=NUMBER with FIELD among {', '.join(numbers)}") from error
        if not LEAST <= value <= MOST:
            raise MacsError("--set", repr(change), f"a number from {LEAST:g} to {MOST:g}")
        machine = dataclasses.replace(machine, **{field: value})
    return machine


def _loads(args: argparse.Namespace):
    from ..simulate import loads

    if args.source is not None:
        found = _from(args)
    else:
        found = loads.load(args.loads) if args.loads is not None else loads.published(args.visual_share)
    return found if args.noise is None else dataclasses.replace(found, noise=args.noise)


def _from(args: argparse.Namespace):
    from . import simulate_from

    kind = simulate_from.source(args.source)
    if kind == "server":
        return simulate_from.of_server(server_of(args.source, args))
    if kind == "trace":
        return simulate_from.of_trace(args.source)
    return simulate_from.of_dump(args.source, args.visual_share, MODELS[args.model].top_k)
