"""What `pip` makes of this repository: the sdist has all that a build needs, the wheel built from it serves from a
folder that is no clone, and both carry the commit.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from benchmarks.serving import EP2_ARGS, Server
from tests.support.prebuilt import as_if_built

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "MACS_"))}


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRON | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr)[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A shallow clone without tags, with what is not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git history here")
    folder = tmp_path_factory.mktemp("wheel") / "clone"
    run("git", "clone", "--quiet", "--depth", "1", "--no-tags", f"file://{ROOT}", folder, cwd=ROOT)
    for name in run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def python(clone) -> Path:
    """Of a fresh environment, which finds this one's packages behind its own; the one under test is not among them."""
    folder = clone.parent / "fresh"
    venv.create(folder)  # without pip: what comes with Python's brings an old setuptools along
    packages = next((folder / "lib").glob("python*/site-packages"))
    # What this environment's .pth files name, an editable install of the package for one, is not on the path there.
    (packages / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def sdist(clone, python) -> Path:
    run(python, "setup.py", "-q", "sdist", "-d", clone.parent, cwd=clone, MACS_CUDA="0")
    (made,) = clone.parent.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module", params=["this build", pytest.param("compiled", marks=pytest.mark.nightly)])
def installed(request, sdist, python) -> Path:
    """The environment, with the wheel that was built from the sdist: around this clone's library, or compiled anew."""
    folder = sdist.parent / request.param.replace(" ", "-")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,), programs = folder.iterdir(), Path(sys.executable).parent
    if request.param == "this build":
        programs = folder / "programs"
        as_if_built(source, programs)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    offline = ("--no-build-isolation", "--no-deps", "--no-index")
    path = f"{programs}:{os.environ['PATH']}"
    run(*pip, "wheel", *offline, "-w", folder, source, cwd=folder, MACS_CUDA="0", PATH=path)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return python.parent.parent


def version_of(sdist: Path) -> str:
    return sdist.name.removeprefix("sglang_macs-").removesuffix(".tar.gz")


def test_the_sdist_has_every_source_and_its_commit(sdist, clone):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(path.relative_to(clone)) for path in (clone / "csrc").rglob("*") if path.is_file()}
    assert needed <= names and any(name.endswith(".cuh") for name in needed)
    assert not {name for name in names if name.startswith(("models/", "tests/", "docs/")) or name.endswith(".so")}
    commit = run("git", "rev-parse", "--short=7", "HEAD", cwd=clone)
    assert f"+g{commit}" in version_of(sdist)


def test_the_command_tells_the_version_without_torch(installed, sdist, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    told = run(installed / "bin" / "sglang-macs", "--version", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert told == f"sglang-macs {version_of(sdist)}"


def test_the_wheel_brings_its_extension(installed, tmp_path):
    program = "import sglang_macs; from sglang_macs import cpu_compat, ops; ops.check(); print(sglang_macs.__file__)"
    assert run(installed / "bin" / "python", "-c", program, cwd=tmp_path).startswith(str(installed))


@pytest.mark.nightly  # an installed package answers in test_quickstart.py, too
def test_the_wheel_answers_from_a_folder_that_is_no_clone(
    installed, sdist, vl_model, server_log, tmp_path, monkeypatch
):
    python = installed / "bin" / "python"
    shims = run(python, "-c", "from sglang_macs import cpu_compat; print(cpu_compat.SITE_DIR)", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = [*EP2_ARGS, "--moe-a2a-backend", "macs", "--macs-gamma", "1.0"]
    with Server(vl_model, flags, env={"PYTHONPATH": shims}, log=server_log, python=str(python)) as server:
        assert len(server.generate("hello", max_new_tokens=4).ids) == 4
        states = server.get("/server_info")["internal_states"]
    assert {state["macs"]["version"] for state in states} == {version_of(sdist)}
