"""docs/guide/quickstart.md's commands, run from the page's text as far as a machine without a GPU and a network goes.

Left out: what fetches (git clone, pip install of torch and sglang), make demo, and launches on GPUs, whose flags
test_deploy.py takes through SGLang's parser. Changed: the port, which may be taken.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from benchmarks.serving import Server, photograph_files, reserve_port
from tests.support.prebuilt import as_if_built

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parent.parent
BLOCKS = [
    textwrap.dedent(block)
    for block in re.findall(r"(?:^ {4}.*\n|^\n)+", (ROOT / "docs/guide/quickstart.md").read_text(), re.M)
]
WITHOUT = {"PYTHONPATH": None, "SGLANG_USE_CPU_ENGINE": None, "PYTHONSAFEPATH": None, "VIRTUAL_ENV": None}
ENV = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "MACS_CUDA": "0"}


def block_with(words: str) -> str:
    (found,) = [block.strip() for block in BLOCKS if words in block]
    return found


def line_with(words: str) -> str:
    (found,) = [line.split("  #")[0] for block in BLOCKS for line in block.splitlines() if words in line]
    return found


LAUNCH = block_with("cpu_compat")  # activates .venv, takes the CPU environment and launches
ASK = block_with("picture.jpg")  # one question about a picture, and `sglang-macs top`


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """The folder that a reader works in: `sglang-macs`, a clone; `venv`, with what the page installs; a picture."""
    folder = tmp_path_factory.mktemp("reader")
    clone, environment = folder / "sglang-macs", folder / "venv"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if tracked:
        for name in filter(None, tracked.split("\0")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    else:
        shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".venv", "build", "_C*.so", "__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    as_if_built(clone, environment / "bin")
    (site,) = environment.glob("lib/python*/site-packages")
    # In place of the page's download: torch, sglang, and the setuptools that torch asks for, newer than a fresh venv's.
    (site / "downloaded.pth").write_text(sysconfig.get_path("purelib"))
    for old in site.glob("*setuptools*"):
        shutil.rmtree(old)
    (folder / ".venv").symlink_to("venv")
    (folder / "models").symlink_to(clone / "models")
    (folder / "picture.jpg").write_bytes(photograph_files()["flower"])
    install = line_with("pip install --no-build-isolation")
    assert install.split()[-1] == "./sglang-macs"
    done = shell(folder, f". venv/bin/activate\n{install}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(site.glob("sglang_macs/_C*.so"))
    return folder


def shell(folder: Path, script: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in (os.environ | ENV).items() if name not in WITHOUT}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )


class ReadersServer(Server):
    """The page's own launch, in a shell of the reader's."""

    folder: Path

    @property
    def command(self) -> list[str]:
        return ["bash", "-euc", f"cd {self.folder}\n{LAUNCH} --port {self.port}"]


def test_from_outside_the_clone_a_picture_is_answered(parent, server_log):
    doctor = LAUNCH.replace("python -m sglang.launch_server", "sglang-macs doctor --")
    assert doctor != LAUNCH
    done = shell(parent, doctor)
    assert done.returncode == 0 and "Ready to serve with MACS" in done.stdout, done.stdout + done.stderr
    server = ReadersServer(ROOT / "models" / "lab-vl-moe", [], env=WITHOUT | ENV, log=server_log)
    server.folder = parent
    with server:
        done = shell(parent, f". venv/bin/activate\nset -e\n{ASK.replace(':30000', f':{server.port}')}")
        assert done.returncode == 0, done.stderr
    answer, *top = done.stdout.splitlines()
    assert answer.strip()
    assert "gamma 1" in "\n".join(top)
    assert "site-packages/sglang_macs" not in done.stderr


def test_inside_the_clone_the_launch_and_the_doctor_say_what_shadows(parent):
    (parent / "sglang-macs" / ".venv").symlink_to(parent / "venv")
    package = parent / "sglang-macs" / "sglang_macs"
    port, reservation = reserve_port()
    with reservation:
        done = shell(package.parent, f"{LAUNCH} --port {port}")
    assert done.returncode != 0 and "invalid choice" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sglang-macs: ")]
    assert f"no extension in {package}, while the installed package lies in {parent / 'venv'}" in line
    done = shell(package.parent, LAUNCH.replace("python -m sglang.launch_server", "sglang-macs doctor --"))
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 1 and len(failed) == 1 and f"no extension in {package}" in failed[0], done.stdout
    assert "fix: Run it from another folder, or: pip install" in done.stdout
