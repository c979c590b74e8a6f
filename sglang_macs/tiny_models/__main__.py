"""Command line: build one model and print where it is and how large."""

import argparse
import json
from pathlib import Path

from . import BUILDERS, SEED, __doc__, reference_path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sglang_macs.tiny_models", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=sorted(BUILDERS), default="qwen3_vl_moe")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=SEED)
    options = vars(parser.parse_args())
    out = BUILDERS[options.pop("kind")](options.pop("out"), **options)
    size = sum(f.stat().st_size for f in out.iterdir())
    print(json.dumps({"model": str(out), "reference": str(reference_path(out)), "megabytes": round(size / 1e6, 1)}))


if __name__ == "__main__":
    main()
