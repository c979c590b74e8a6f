"""`sglang-macs calibrate`: writes the profile that --macs-profile reads."""

import argparse
import json
import os

from .. import calibrate, profile
from ..errors import MacsError

HELP = "record which experts serve which modality, and write the profile"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--server", metavar="URL", help="watch a running server (start it with --macs-gamma inf)")
    source.add_argument("--dataset", metavar="FILE", help='run the model here over JSON lines {"text", "images"}')
    parser.add_argument("--model-path", required=True, help="the checkpoint, whose routers are fingerprinted")
    parser.add_argument("--out", required=True, help="where the profile goes")
    parser.add_argument("--samples", type=int, default=64, help="looks at the server that found new rows")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between looks")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds without mixed traffic before giving up")


def run(args: argparse.Namespace) -> int:
    with open_config(args.model_path) as file:
        architecture = json.load(file)["architectures"][0]
    if args.server:
        recording = calibrate.watch_server(args.server, args.samples, args.interval, args.patience)
    else:
        recording = calibrate.replay(args.model_path, args.dataset)
    made = calibrate.make_profile(recording, architecture, calibrate.fingerprint(args.model_path))
    profile.save(made, args.out)
    for layer, row in made.modality.items():
        print(f"layer {layer}: {row.count(1)} visual, {row.count(-1)} text, {row.count(0)} shared experts")
    print(f"wrote {args.out} from {made.evidence.samples} samples")
    return 0


def open_config(path: str):
    try:
        return open(os.path.join(path, "config.json"), encoding="utf-8")
    except OSError as error:
        raise MacsError("--model-path", f"{path} ({error.strerror})", "a local checkpoint with config.json") from error
