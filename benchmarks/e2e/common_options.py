"""The options that the programs here have in common, and the header of their result files."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu import result_file


def parser_of(doc: str, layers: int) -> argparse.ArgumentParser:
    """With the options of every measurement here. layers: the default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny model, for a smoke run")
    parser.add_argument("--ranks", type=int, default=2, help="a GPU each")
    parser.add_argument("--layers", type=int, default=layers, help="of 48")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp8"), default="bf16", help="of the weights; fp8: 128 x 128 blocks"
    )
    parser.add_argument("--rounds", type=int, default=25, help="of a size at most")
    parser.add_argument("--warm-ups", type=int, default=1, help="rounds of a size that are not counted")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run")
    parser.add_argument("--attention", help="SGLang's attention backend; fa3 where it is installed, else triton")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on the first GPU, by CUDA MPS: a smoke run")
    parser.add_argument("--cache", type=Path, help="folder for compiled kernels, to be kept for the next run")
    return parser


def add_variants(parser: argparse.ArgumentParser, at_once: int, variants: str) -> None:
    """Of programs that compare servers. at_once: the default; variants: what there is, in words."""
    parser.add_argument("--variants", nargs="+", help=variants)
    parser.add_argument(
        "--at-once", type=int, default=at_once, help="servers side by side; 24 layers in bf16 take about 30 GB"
    )
    parser.add_argument("--stagger", type=float, default=3.0, help="seconds between the starts of two servers")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Places are those of where the program was started, whatever becomes of that."""
    options = parser.parse_args(argv)
    options.out = Path(options.out).resolve()
    options.cache = options.cache and options.cache.resolve()
    return options


def header(options: argparse.Namespace) -> dict[str, str]:
    """What a result file begins with: on what, of which sources, how and when it was measured."""
    gpus = "" if options.ranks == 1 or options.share_gpu else f" x {options.ranks}"
    return {
        "gpu": "none, CPU" if options.device == "cpu" else result_file.gpu_name() + gpus,
        "commit": options.commit,
        "command": result_file.command_line(sys.argv, "benchmarks.e2e", (*result_file.PLACE_OPTIONS, "--cache")),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(out: Path, result: dict) -> None:
    """One file of docs/results, the whole of it or what was there before."""
    partial = out.with_suffix(".partial")
    partial.write_text(result_file.text(result))
    partial.replace(out)
