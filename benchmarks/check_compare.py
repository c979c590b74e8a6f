"""Does `sglang-macs compare` find a planted loss every time, and none in off against off? The lab's model, CPU server.

    python -m benchmarks.check_compare --out docs/results/compare_cpu.json [--times 10]

Each time with other questions, of its number as seed: one comparison at gamma 0.5, and one of the server, turned off,
with itself. The first is killed half-way (SIGKILL), and the same command goes on. OUT is written after each. Exit 1: a
verdict was wrong. One server for all; five to fifteen minutes a time on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu import result_file
from benchmarks.serving import EP2_ARGS, Server
from lab import lab_chats, lab_checkpoint
from sglang_macs import cli

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = [*EP2_ARGS, "--sleep-on-idle", "--moe-a2a-backend", "macs"]
ARGUMENTS += ["--macs-gamma", "1.05", "--macs-min-tokens", "0"]
QUESTIONS, CONCURRENCY, GAMMA = 192, 16, 0.5
PASSES = 3 * QUESTIONS // CONCURRENCY


def compare(folder: Path, *servers: str, kill_at: int | None = None) -> tuple[int, dict]:
    """Exit status and figures of the questions in `folder`; kill_at: killed after so many passes, and begun again."""
    answers = folder / "answers.jsonl"
    answers.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sglang_macs", "compare", *servers, "--requests", str(folder / "questions.jsonl")]
    command += ["--concurrency", str(CONCURRENCY), "-o", str(folder / "page.html")]
    command += ["--json", str(folder / "figures.json"), "--answers", str(answers)]
    if kill_at is not None:
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
        while killed.poll() is None and _lines(answers) <= kill_at:
            time.sleep(0.1)
        killed.kill()
        killed.wait()
    status = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT, check=False).returncode
    return status, json.loads((folder / "figures.json").read_text())


def _lines(file: Path) -> int:
    """One above the passes that are kept."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def planted(server: Server, folder: Path, kill_at: int | None = None) -> tuple[int, dict]:
    return compare(folder, server.url, "--gamma", str(GAMMA), kill_at=kill_at)


def nothing(server: Server, folder: Path) -> tuple[int, dict]:
    """Off against off."""
    if cli.main(["set", server.url, "--off", "--wait", "0"]) != 0:
        raise SystemExit("the server was not turned off")
    try:
        return compare(folder, server.url, server.url)
    finally:
        cli.main(["set", server.url, "--on", "--wait", "0"])


def row_of(seed: int, on: str, status: int, figures: dict, seconds: float, killed: bool) -> dict:
    """What docs/results has of a comparison."""
    whole = figures["groups"][0]
    counted = figures["clipped"] or {"assignments": 0, "clipped": 0}

    def interval(estimate: dict) -> list[float]:
        return [float(f"{estimate[name]:.3g}") for name in ("mean", "low", "high")]

    return {
        "seed": seed,
        "on": on,
        "exit": status,
        "divergence": interval(whole["on"]["divergence"]),
        "floor": interval(whole["floor"]["divergence"]),
        "changed": whole["on"]["changed"]["mean"],
        "accuracy": figures["accuracy"],
        "clipped": round(counted["clipped"] / max(counted["assignments"], 1), 4),
        "killed": killed,
        "seconds": round(seconds),
    }


def write(out: Path, rows: list[dict]) -> None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    header = {
        "gpu": "none",
        "cpu": f"{os.uname().machine}, {os.cpu_count()} threads",
        "commit": git.stdout.strip() or "unknown",
        "command": result_file.command_line(sys.argv, "benchmarks"),
        "date": datetime.now(UTC).date().isoformat(),
        "questions": QUESTIONS,
        "concurrency": CONCURRENCY,
    }
    out.write_text(result_file.text({**header, "rows": rows}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result_file.add_options(parser)
    parser.add_argument("--times", type=int, default=10)
    options = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as made, Server(lab_checkpoint.CHECKPOINT, ARGUMENTS, timeout=900) as server:
        folder = Path(made)
        for seed in range(1, options.times + 1):
            lab_chats.write(folder / "questions.jsonl", QUESTIONS, seed)
            kill_at = PASSES // 2 if seed == 1 else None
            for on in (f"gamma {GAMMA}", "off"):
                start = time.monotonic()
                status, figures = nothing(server, folder) if on == "off" else planted(server, folder, kill_at)
                killed = on != "off" and kill_at is not None
                rows.append(row_of(seed, on, status, figures, time.monotonic() - start, killed))
                print(json.dumps(rows[-1]), flush=True)
                write(Path(options.out), rows)
    wrong = [row for row in rows if row["exit"] != (0 if row["on"] == "off" else 1)]
    print(f"{len(rows) - len(wrong)} of {len(rows)} verdicts as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
