"""`eval "$(python -m sglang_macs.cpu_compat)"` prepares this shell for an SGLang server on CPU."""

import argparse

from sglang_macs.cpu_compat.environment import shell_exports


def main() -> None:
    """Print the export lines for the requested number of ranks."""
    parser = argparse.ArgumentParser(prog="python -m sglang_macs.cpu_compat", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="tensor-parallel size of the server (default: 2)")
    print(shell_exports(parser.parse_args().ranks))


if __name__ == "__main__":
    main()
