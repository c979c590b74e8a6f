"""`sglang-macs simulate`: the study of `sglang_macs.simulate` from the command line."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

from ..errors import MacsError
from ..machines import MACHINES, MODELS, SOURCES

HELP = "what MACS would buy on a cluster, from expert loads and a machine description"
DEFAULT_MACHINE, DEFAULT_MODEL = "h200", "qwen3-vl-30b-a3b"


def _numbers(of: type):
    def parse(text: str) -> tuple:
        return tuple(of(part) for part in text.split(","))

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", choices=list(MACHINES), default=DEFAULT_MACHINE)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=NUMBER", help="change a machine's figure")
    parser.add_argument("--model", choices=list(MODELS), default=DEFAULT_MODEL)
    parser.add_argument("--loads", help="JSON of loads (docs/simulate.md); default: the published ones")
    parser.add_argument("--visual-share", type=float, default=0.9, help="of the tokens, for the published loads")
    parser.add_argument("--noise", type=float, help="spread of an expert's share between batches, over its mean")
    parser.add_argument("--ep", type=_numbers(int), default=(8, 16, 32, 64, 128), metavar="N,N")
    parser.add_argument("--presets", type=_numbers(str), default=("cai", "paper", "rank"), metavar="NAME,NAME")
    parser.add_argument("--gamma", type=_numbers(float), default=(1.0, 1.05, 1.1, 1.2, 1.5), metavar="G,G")
    parser.add_argument("--tokens", type=int, default=8192, help="prefill tokens per rank and forward pass")
    parser.add_argument("--context", type=int, default=2048, help="tokens that attention looks at")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--tile", type=int, default=128, help="rows to which grouped GEMMs pad an expert")
    parser.add_argument("--fp8", action="store_true", help="experts and dispatch in FP8")
    parser.add_argument("--low-latency", action="store_true", help="DeepEP's low-latency mode: one row an assignment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the study, too")


def run(args: argparse.Namespace) -> int:
    from ..simulate import picture, study

    settings = _settings(args)
    loads = _loads(args)
    rows = study.run(settings, loads)
    if args.plot:
        if not Path(args.plot).resolve().parent.is_dir():
            raise MacsError("--plot", args.plot, "a file in a folder that exists")
        title = (
            f"{args.model} on {args.machine}, {args.tokens} tokens a rank ({'FP8' if args.fp8 else 'bf16'}); simulated"
        )
        picture.draw(rows, title, args.plot)
    if args.json:
        print(json.dumps(study.to_json(settings, loads, rows), indent=1))
    else:
        print(f"{study.table(rows)}\n\nSimulated, not measured. Loads: {loads.source}")
        print(f"Machine: {settings.machine.source}; " + "; ".join(f"{k}: {v}" for k, v in SOURCES.items()))
    return 0


def _settings(args: argparse.Namespace):
    from ..config import PRESETS
    from ..simulate.study import Settings

    for name in args.presets:
        if name not in PRESETS or name == "off":
            raise MacsError("--presets", repr(name), "names among rank, paper, cai", "off is always shown.")
    for name, least in (("tokens", 1), ("batches", 1), ("tile", 1), ("context", 0)):
        if getattr(args, name) < least:
            raise MacsError(f"--{name}", getattr(args, name), f"a number >= {least}")
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
        if not 0 < value < math.inf:
            raise MacsError("--set", repr(change), "a number above 0")
        machine = dataclasses.replace(machine, **{field: value})
    return machine


def _loads(args: argparse.Namespace):
    from ..simulate import loads

    if not 0 <= args.visual_share <= 1:
        raise MacsError("--visual-share", args.visual_share, "0 to 1")
    found = loads.load(args.loads) if args.loads else loads.published(args.visual_share)
    if args.noise is None:
        return found
    if not 0 <= args.noise <= 2:
        raise MacsError("--noise", args.noise, "0 to 2")
    return dataclasses.replace(found, noise=args.noise)
