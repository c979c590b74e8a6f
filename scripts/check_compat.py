"""The product against other releases of SGLang: hooks, launches and routers, servers, families of models.

    python -m scripts.check_compat [RELEASE ...] [--stages hooks,launch,server] [--out docs/results/compat.json]
    python -m scripts.check_compat 0.5.20 --stages refused

Without releases: all that the hooks are made for but the installed one. Each is put into build/compat/VERSION, before
the installed one, and with it what it pins and is installed here in another version (transformers, tokenizers); torch
and everything else are shared. The stage `refused` is for a release that lacks a hook's target: a launch with MACS must
end and say so. Exit 0 if every stage of every release passes. docs/guide/compatibility.md has the table.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from benchmarks.bench_plan import commit
from benchmarks.gpu import result_file
from benchmarks.serving import EP2_ARGS
from sglang_macs import tiny_models
from sglang_macs.cpu_compat import environment
from sglang_macs.releases import SGLANG

ROOT = Path(__file__).resolve().parent.parent

COMPAT = ROOT / "build" / "compat"
REFUSED_PORT = 19872  # nothing ever listens there

# Every hook applied and looked at on its own, as the launcher and then as a scheduler process would.
HOOKS = """
import json
from importlib.metadata import version
from sglang_macs import config
from sglang_macs.engine import hooks, launcher, scheduler_process
import sglang.srt.plugins as plugins

def missing(registered):
    return {hook.target: trouble for hook in registered if (trouble := hooks.trouble(hook))}

config.configure(config.MacsConfig.from_preset("rank"))
plugins.load_plugins()
lost = missing(launcher.HOOKS)
scheduler_process.here, plugins._plugins_loaded = True, False
plugins.load_plugins()
lost |= missing((*scheduler_process.HOOKS, *hooks.registered))
print("HOOKS", json.dumps({"version": version("sglang"), "lost": lost}))
"""
STAGES = {  # tests by their names: pytest fails on one that is gone
    "launch": ["tests/test_launch.py", "tests/test_routing.py"],
    "server": [
        "tests/test_server_unbounded.py::test_answers_are_those_of_transformers",
        "tests/test_server_rank.py::test_rank_bounds_hold_under_load_and_bad_images_leave_the_server_serving",
        "tests/test_server_scattered.py::test_deepstack_rows_are_scattered_without_dp_attention",
    ],
    "families": ["tests/test_families.py"],
}


def others() -> list[str]:
    """The releases that the hooks are made for, without the installed one; the newest first."""
    return [release for release in reversed(SGLANG) if release != metadata.version("sglang")]


def install(version: str) -> Path:
    """The folder that holds this release. Raises CalledProcessError."""
    folder = COMPAT / version
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if not (folder / "sglang").is_dir():
        subprocess.run([*pip, "--target", str(folder), f"sglang=={version}"], check=True)
    if missing := own_pins(folder):
        subprocess.run([*pip, "--target", str(folder), *missing], check=True)
    return folder


def own_pins(folder: Path) -> list[str]:
    """NAME==VERSION of what the release in `folder` pins and this environment has in another version, but for torch:
    this project's extension is built for the installed one.
    """
    there = {of(one.name): one.version for one in metadata.distributions(path=[str(folder)])}
    (release,) = (one for one in metadata.distributions(path=[str(folder)]) if of(one.name) == "sglang")
    found = []
    for wanted in release.requires or ():
        pin = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", wanted)
        if pin is None or of(pin[1]) == "torch" or there.get(of(pin[1])) == pin[2]:
            continue
        installed = {of(one.name): one.version for one in metadata.distributions(name=pin[1])}.get(of(pin[1]))
        if installed not in (None, pin[2]):
            found.append("==".join(pin.groups()))
    return found


def of(name: str) -> str:
    """A distribution's name as every index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def environment_of(folder: Path) -> dict[str, str]:
    """This process's environment with the release in front."""
    tail = os.pathsep.join(p for p in (str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, **environment(2, {"PYTHONPATH": tail}), "HF_HUB_OFFLINE": "1"}


def check_hooks(version: str, folder: Path) -> dict:
    """{"passed": ..., "detail": ...} of all hooks."""
    command = [sys.executable, "-c", HOOKS]
    done = subprocess.run(command, env=environment_of(folder), capture_output=True, text=True, check=False)
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("HOOKS ")]
    if not lines:
        return {"passed": False, "detail": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found = json.loads(lines[0])
    if found["version"] != version:
        return {"passed": False, "detail": f"found sglang {found['version']} instead"}
    return {"passed": not found["lost"], "detail": found["lost"] or "all took"}


def check_tests(folder: Path, selection: list[str]) -> dict:
    """{"passed": ..., "detail": ...} of some of this project's tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    done = subprocess.run(command, cwd=ROOT, env=environment_of(folder), capture_output=True, text=True, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    summary = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    return {"passed": done.returncode == 0, "detail": failed or summary}


def check_refused(folder: Path) -> dict:
    """{"passed": ..., "detail": ...} of a launch with MACS that must end with our line."""
    model = tiny_models.ensure(ROOT / "build" / "models" / "tiny-qwen3-vl-moe", "qwen3_vl_moe")
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *EP2_ARGS]
    command += ["--moe-a2a-backend", "macs", "--host", "127.0.0.1", "--port", str(REFUSED_PORT)]
    done = subprocess.run(command, env=environment_of(folder), capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("sglang-macs: hook")]
    return {"passed": done.returncode != 0 and bool(lines), "detail": (lines or ["no line of ours"])[0]}


def check(stage: str, version: str, folder: Path) -> dict:
    """{"passed": ..., "detail": ...} of one stage."""
    if stage == "hooks":
        return check_hooks(version, folder)
    return check_refused(folder) if stage == "refused" else check_tests(folder, STAGES[stage])


def save(path: Path, new: dict) -> None:
    """Adds a release's findings to the file, to those of other stages, which may be of another day."""
    rows = {row["sglang"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    row = rows.setdefault(new["sglang"], {"sglang": new["sglang"]})
    about = {"torch": metadata.version("torch"), "commit": commit(), "date": datetime.now(UTC).date().isoformat()}
    row |= {stage: found | about for stage, found in new.items() if stage != "sglang"}
    ordered = [rows[release] for release in sorted(rows)]
    path.write_text(result_file.text({"rows": ordered}), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=others())
    parser.add_argument("--stages", default="hooks,launch,server,families")
    parser.add_argument("--out", type=Path, help="write the findings as JSON")
    options = parser.parse_args()
    rows = []
    for version in options.versions:
        folder, row = install(version), {"sglang": version}
        for stage in options.stages.split(","):
            found = row[stage] = check(stage, version, folder)
            print(f"{version:<8} {stage:<7} {'passed' if found['passed'] else 'FAILED'}  {found['detail']}", flush=True)
        rows.append(row)
        if options.out:
            save(options.out, row)
    return 0 if all(row[stage]["passed"] for row in rows for stage in options.stages.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main())
