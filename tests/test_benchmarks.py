"""benchmarks/run.py: everything that measures has a name and says what it is, and its options reach it."""

import subprocess
import sys

import pytest

from benchmarks import run

RUN = [sys.executable, str(run.HERE / "run.py")]


def test_every_program_says_in_a_line_what_it_is():
    found = run.programs()
    assert {"bench_plan", "gpu/check_fused", "e2e/prefill"} <= found.keys() and "run" not in found
    assert all(20 < len(run.summary(path)) < 200 for path in found.values())
    listed = subprocess.run(RUN, capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in listed for name in found)


@pytest.mark.parametrize(
    ("words", "status"), [(["bench_plan", "--help"], 0), (["bench_plan", "--no-such"], 2), (["no"], 2)]
)
def test_options_and_status_are_the_programs_own(words, status):
    done = subprocess.run([*RUN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == status and words[0] in done.stdout + done.stderr
