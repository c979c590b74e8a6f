"""What pyproject.toml declares: every package that the code imports, and a version that a build without history has."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

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
