"""`sglang-macs report TRACE -o report.html`."""

import argparse

from .arguments import number

HELP = "a recorded trace (--macs-trace) as one HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", help="the folder that --macs-trace named, with every rank's file in it")
    parser.add_argument("--run", dest="run_name", metavar="RUN", help="which start of the server (default: the latest)")
    help = "one replica of --dp without dp-attention (default: all together)"
    parser.add_argument("--replica", type=number(int, 0, 1 << 20), help=help)
    parser.add_argument("-o", "--output", default="report.html", help="where to write the page (default: %(default)s)")
    microseconds = number(float, 0, 1e9)
    parser.add_argument("--row-us", type=microseconds, help="microseconds that a row costs, to show the time saved")


def run(args: argparse.Namespace) -> int:
    from .. import files
    from ..observe import report, trace

    files.check_writable(args.output, "--output")  # before a long trace is read
    read = trace.load(args.trace, args.run_name, args.replica)
    page = report.page(read, args.row_us)
    files.write(args.output, page, "--output", private=True)  # users' pictures are in it
    latest = "the latest" if read.run == read.runs[-1] else "one"
    print(f"{args.output}: {len(page) / 1e6:.1f} MB, run {read.run}, {latest} of {len(read.runs)} in {args.trace}")
    return 0
