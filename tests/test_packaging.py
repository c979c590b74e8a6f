"""What pyproject.toml declares: every package that the code imports, and a version that a build without history has."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

from sglang_macs.releases import SGLANG, TORCH

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
WITH_SGLANG = {"deep_ep", "deep_gemm", "prometheus_client", "sgl_kernel", "torchvision", "triton"}
NAMES = {"PIL": "pillow"}  # of a package, where it is not that of the module


def third_party(folder: str) -> set[str]:
    found = set()
    for path in (ROOT / "sglang_macs" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return {NAMES.get(name, name) for name in found - set(sys.stdlib_module_names) - {"sglang_macs"}}


def test_every_import_is_declared():
    declared = {Requirement(line).name for line in PROJECT["dependencies"]}
    declared |= {requirement.name for extra in EXTRAS.values() for requirement in extra}
    assert third_party("") - WITH_SGLANG <= declared


def test_the_extras_hold_what_their_parts_import():
    assert third_party("tiny_models") - {"numpy", "torch"} <= {one.name for one in EXTRAS["tiny-models"]}
    served = {one.name: one.specifier for one in EXTRAS["serve"]}
    assert all(version in served["sglang"] for version in SGLANG) and "0.5.20" not in served["sglang"]
    assert all(f"{minor}.0" in served["torch"] for minor in TORCH)


def test_a_build_without_setuptools_scm_has_a_version_all_the_same(tmp_path):
    """As on a machine that has torch and setuptools alone."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"))
    (tmp_path / "sglang_macs").mkdir()
    (tmp_path / "sglang_macs" / "releases.py").write_text((ROOT / "sglang_macs" / "releases.py").read_text())
    (tmp_path / "torch" / "utils").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = '{TORCH[-1]}.0'\nclass version: cuda = None\n")
    (tmp_path / "torch" / "utils" / "__init__.py").touch()
    stub = "from setuptools import Extension\nCUDA_HOME = CUDAExtension = None\n"
    stub += "def CppExtension(name, sources, **_): return Extension(name, [])\n"
    stub += "class BuildExtension:\n    with_options = staticmethod(lambda **_: None)\n"
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text(stub)
    hide = "import importlib.util, runpy, sys; find = importlib.util.find_spec\n"
    hide += "importlib.util.find_spec = lambda name, *a: None if name == 'setuptools_scm' else find(name, *a)\n"
    hide += "sys.path.insert(0, '.'); sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')\n"
    done = subprocess.run([sys.executable, "-c", hide], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0.1.0.dev0"


STUB_OF_TORCH = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext

CUDA_HOME = "/cuda"


def CppExtension(name, sources, **_):
    return Extension(name, [])


CUDAExtension = CppExtension


class BuildExtension:
    @staticmethod
    def with_options(**_):
        return type("build_ext", (build_ext,), {"run": lambda self: None})
"""


@pytest.mark.parametrize(
    ("torch", "cuda", "environ", "built_for"),
    [
        ("2.13.0+cu130", "13.0", {"MACS_CUDA": "1"}, ["torch2.13", "cu130", "sm90a"]),
        ("2.14.1", "13.0", {"MACS_CUDA": "1", "MACS_CUDA_ARCH": "90a,100a"}, ["torch2.14", "cu130", "sm90a", "sm100a"]),
        ("2.13.0+cpu", None, {}, ["torch2.13", "cpu"]),
        ("2.13.0+cu130", "13.0", {"MACS_CUDA": "0"}, ["torch2.13", "cpu"]),
    ],
)
def test_the_name_of_a_wheel_says_what_it_was_built_for(tmp_path, torch, cuda, environ, built_for):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"))
    for package in ("sglang_macs", "torch", "torch/utils"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    shutil.copy(ROOT / "sglang_macs" / "releases.py", tmp_path / "sglang_macs")
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {torch!r}\nclass version: cuda = {cuda!r}\n")
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text(STUB_OF_TORCH)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MACS_")} | environ
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"]
    env |= {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    name, _, build, _ = parse_wheel_filename(wheel.name)
    assert (name, build) == ("sglang-macs", (0, "." + ".".join(built_for)))


def test_a_wheel_for_another_environment_leaves_ours_alone(tmp_path):
    def steps(*given: str) -> str:
        command = ["make", "--dry-run", "wheel", f"VENV={tmp_path / 'none'}", *given]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout

    assert "setup_env.sh" in steps() and "--editable" not in steps(), "sources are archived, not built"
    other = steps("PY=/other/python")
    assert "setup_env.sh" not in other and "/other/python -m pip wheel" in other
