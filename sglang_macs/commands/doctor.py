"""`sglang-macs doctor [-- SERVER FLAGS]`."""

import argparse
import dataclasses
import json

HELP = "check that this machine, and a launch, can serve with MACS; each failure comes with its fix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("server_flags", nargs="*", metavar="-- SERVER_FLAG", help="flags of the launch to check, too")


def run(args: argparse.Namespace) -> int:
    from .. import doctor

    checks = doctor.run(args.server_flags)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        print(doctor.report(checks))
    return int(any(check.status == doctor.FAIL for check in checks))
