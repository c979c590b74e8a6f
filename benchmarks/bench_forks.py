"""Runs SGLang's bench_serving again and again: what it imports takes longer than a run, so it is imported once.

    python -m benchmarks.bench_forks < LINES

Every line of standard input is a list of arguments as JSON, and is run in a forked child; its answer is a line of JSON:
exit status, and the end of what the child printed. check_serving.py starts this. Requests that were made once, which
takes longer than to answer them, are kept in a folder for the next run that asks for the same.
"""

import hashlib
import json
import os
import pickle
import sys
import tempfile
import traceback
from pathlib import Path

# What does not change the requests.
ELSEWHERE = ("base_url", "host", "port", "output_file", "max_concurrency", "warmup_requests", "flush_cache")


def keep_requests(folder: Path) -> None:
    """From now on `sglang.bench_serving` makes every set of requests once."""
    from sglang.benchmark import serving

    make = serving.get_dataset

    def kept(args, tokenizer, *others, **options):
        asked = {name: value for name, value in vars(args).items() if name not in ELSEWHERE}
        path = folder / hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()
        if not path.exists():
            path.write_bytes(pickle.dumps(make(args, tokenizer, *others, **options)))
        return pickle.loads(path.read_bytes())

    serving.get_dataset = kept


def run(arguments: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if not child:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os._exit(run_here(arguments))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        return status, log.read()[-2000:]


def run_here(arguments: list[str]) -> int:
    from sglang.bench_serving import cli_main

    sys.argv = ["bench_serving", *arguments]
    try:
        cli_main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever prints on the way: answers are the only lines
    import sglang.bench_serving  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        keep_requests(Path(folder))
        for line in sys.stdin:
            os.write(answers, (json.dumps(run(json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    main()
