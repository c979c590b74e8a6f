"""`sglang-macs calibrate`: writes the profile that --macs-profile reads."""

import argparse
import json
import os

from ..errors import MacsError
from .arguments import add_server, number, server_of

HELP = "record which experts serve which modality, and write the profile"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--server", metavar="URL", help="watch a running server (start it with --macs-gamma inf)")
    source.add_argument("--dataset", metavar="FILE", help='run the model here over JSON lines {"text", "images"}')
    parser.add_argument("--model-path", required=True, help="the checkpoint, whose routers are fingerprinted")
    parser.add_argument("--out", required=True, help="where the profile goes")
    samples, seconds = number(int, 20, 100_000), number(float, 0, 86400)
    parser.add_argument("--samples", type=samples, default=64, help="looks at the server that found new rows")
    parser.add_argument("--interval", type=seconds, default=1.0, help="seconds between looks")
    parser.add_argument("--patience", type=seconds, default=60.0, help="seconds without mixed traffic before giving up")
    add_server(parser)


def run(args: argparse.Namespace) -> int:
    from .. import files
    from ..observe import calibration
    from ..plan import profile

    files.check_writable(args.out, "--out")  # not after minutes of recording
    architecture, num_layers = _model(args.model_path)
    routers = calibration.routers(args.model_path, num_layers)
    if args.server is not None:
        server = server_of(args.server, args)
        recording = calibration.watch_server(server, routers.layers, args.samples, args.interval, args.patience)
    else:
        recording = calibration.replay(args.model_path, args.dataset)
    calibration.check_layers(recording.layers, routers.layers)
    made = calibration.make_profile(recording, architecture, routers.fingerprint)
    profile.save(made, args.out)
    for layer, row in made.modality.items():
        print(f"layer {layer}: {row.count(1)} visual, {row.count(-1)} text, {row.count(0)} shared experts")
    print(f"wrote {args.out} from {made.evidence.samples} samples")
    return 0


def _model(path: str) -> tuple[str, int | None]:
    """The architecture and the number of layers that a checkpoint's config.json names, None where it names none."""
    from .. import files

    raw = files.read(os.path.join(path, "config.json"), "--model-path", fix="Name a local checkpoint.")
    try:
        config = json.loads(raw)
        architecture, text = config["architectures"][0], config.get("text_config", config)
        num_layers = text.get("num_hidden_layers")
        if not isinstance(architecture, str) or type(num_layers) not in (int, type(None)):
            raise TypeError("architectures or num_hidden_layers of another type")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise MacsError("--model-path", f"config.json in {path} ({error!r})", "that of a model") from error
    return architecture, num_layers
