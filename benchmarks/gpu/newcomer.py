"""A newcomer's path on a fresh GPU machine, timed: from `pip install` to the first answer about a picture.

    python3 -m benchmarks.gpu.newcomer --wheels FOLDER --out FILE        (one GPU, nvcc)

FOLDER holds the wheels of SGLang and all it needs: what a download would take depends on the network, and is not in it.
Everything goes into a folder of its own. Libraries that the machine's own torch brings under `nvidia` are linked there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import result_file

ROOT = Path(__file__).resolve().parents[2]

LAUNCH = "1 rank, low latency"
NOT_SOURCE = shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__", ".gpu", ".venv", ".git", "shared")


class Timed:
    """The steps so far; every one is printed when it ends."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def step(self, name: str, run: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        self.rows.append({"op": "newcomer", "case": {"step": name}, "seconds": round(seconds, 1)})
        print(f"{name:36s} {seconds:6.1f} s", flush=True)
        return result


def pip(site: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, *what], env=environment(site), check=True)


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}


def install(site: Path, wheels: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip(site, *(str(named(wheel, Path(folder))) for wheel in sorted(wheels.glob("*.whl"))))
    own = site / "nvidia"
    own.mkdir(exist_ok=True)
    for library in (Path(sysconfig.get_paths()["purelib"]) / "nvidia").glob("*"):
        if not (own / library.name).exists():
            (own / library.name).symlink_to(library)


def named(wheel: Path, folder: Path) -> Path:
    """The wheel under a name that pip takes: one that somebody made smaller may be called anything."""
    if wheel.stem.count("-") >= 4:
        return wheel
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    link = folder / f"{info.split('.dist-info')[0]}-py3-none-any.whl"
    link.symlink_to(wheel.resolve())
    return link


def serve(site: Path, path: Timed) -> None:
    from benchmarks.gpu.gpu_launches import LAUNCHES, RUNS, start
    from benchmarks.serving import photograph_files

    launch = LAUNCHES[LAUNCH]
    path.step("write a model of random weights", launch.model)
    log = ROOT / "build" / "gpu-newcomer.log"
    server = start(launch, RUNS["1.0"], log, {"PYTHONPATH": str(site)})
    path.step("start the server, until healthy", server.__enter__)
    try:
        path.step("first answer about a picture", lambda: ask(server, photograph_files()["china"]))
        state = server.get("/server_info")["internal_states"][0]["macs"]
        print(f"planned {state['planned']} dispatches, {sum(state['violations'].values())} violations", flush=True)
    finally:
        server.stop()


def ask(server, picture: bytes) -> dict:
    from benchmarks.serving import data_uri

    image = {"type": "image_url", "image_url": {"url": data_uri(picture)}}
    return server.chat([{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    parser.add_argument("--wheels", type=Path, required=True)
    options = parser.parse_args()
    path = Timed()
    with tempfile.TemporaryDirectory() as folder:
        site, source = Path(folder) / "site", Path(folder) / "source"
        shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
        path.step("pip install the pinned wheels", lambda: install(site, options.wheels))
        path.step("pip install sglang-macs (builds it)", lambda: pip(site, "--no-build-isolation", str(source)))
        sys.path.insert(0, str(site))
        serve(site, path)
    total = sum(row["seconds"] for row in path.rows)
    result_file.write(options.out, path.rows, commit=options.commit, total_seconds=round(total, 1))
    print(f"newcomer: OK, {total:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
