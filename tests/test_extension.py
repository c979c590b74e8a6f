"""A package without its extension, and a plugin that does not register: imports work, launches end with one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_macs import engine, entry_point, extension
from sglang_macs.engine import plugin

PACKAGE = extension.PACKAGE
MACS = ["launch_server", "--moe-a2a-backend", "macs"]
CHECK = "from sglang_macs import ops\ntry: ops.check()\nexcept ValueError as error: print(error)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The sources as in a clone whose package was installed without --editable: no extension among them."""
    folder = tmp_path_factory.mktemp("sglang-macs")
    shutil.copytree(PACKAGE, folder / "sglang_macs", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return folder


def in_clone(clone: Path, program: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a program whose path starts with the clone, and goes on with the package that is tested."""
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "", **env}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, check=False)


def test_without_an_extension_everything_imports_and_use_says_where_the_installed_one_lies(clone):
    program = """
import sglang_macs.engine.plugin
from sglang_macs import ops
operators = (lambda: ops.entropy_score(None, None), lambda: ops.library.loaded.clip_apply)
for use in (ops.check, ops.has_cuda, ops.cuda_backend, *operators):
    try:
        use()
    except ValueError as error:
        print(error)
"""
    done = in_clone(clone, program)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5, "every use says it"
    lines = set(done.stdout.splitlines())
    assert len(lines) == 1
    line = lines.pop()
    assert (
        f"no extension in {clone / 'sglang_macs'}, while the installed package lies in {PACKAGE}, expected _C" in line
    )
    assert line.endswith(f"Run it from another folder, or: pip install --no-build-isolation --no-deps -e {clone}")


def test_with_none_installed_it_is_to_be_built(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_installed_beside", lambda package: None)
    assert str(extension.missing(tmp_path / "sglang_macs")).endswith(f"Build it: make -C {tmp_path} build")


def test_an_extension_of_another_python_or_torch_is_not_taken(clone, tmp_path):
    broken = tmp_path / "sglang_macs"
    shutil.copytree(clone / "sglang_macs", broken)
    (broken / "_C.cpython-39-x86_64-linux-gnu.so").write_text("")
    assert extension.library_in(broken) is None
    (broken / extension.library_in(PACKAGE).name).write_text("of another torch")
    done = in_clone(tmp_path, CHECK)
    assert done.returncode == 0, done.stderr
    assert "sglang_macs._C: got" in done.stdout and "expected a build for torch 2." in done.stdout


def test_a_bad_backend_does_not_keep_the_plugin_from_importing(clone):
    program = "import sglang_macs.engine.plugin\n" + CHECK
    done = in_clone(PACKAGE.parent, program, MACS_CUDA_BACKEND="opencl")
    assert done.stdout.strip() == "MACS_CUDA_BACKEND: got opencl, expected cuda or triton.", done.stderr


@pytest.mark.parametrize(
    "argv",
    [MACS, ["launch_server", "--moe-a2a-backend=macs"], ["serve", "--enable-macs"], ["serve", "--macs-gamma", "1.1"]],
)
def test_a_plugin_that_does_not_register_ends_a_launch_that_asks_for_macs(monkeypatch, capsys, argv):
    def register():
        raise ImportError("two\nlines: no module named x")

    monkeypatch.setattr(plugin, "register", register)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        entry_point.register()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sglang-macs: the plugin: got ImportError (lines: no module named x), expected")


def test_a_plugin_that_does_not_import_ends_such_a_launch(monkeypatch, capsys):
    monkeypatch.delattr(engine, "plugin")
    monkeypatch.setitem(sys.modules, "sglang_macs.engine.plugin", None)  # its import raises ImportError
    monkeypatch.setattr(sys, "argv", MACS)
    with pytest.raises(SystemExit):
        entry_point.register()
    assert "the plugin: got" in capsys.readouterr().err


def test_without_macs_on_the_command_line_sglang_serves_on(monkeypatch):
    monkeypatch.setattr(plugin, "register", lambda: 1 / 0)
    monkeypatch.delenv(entry_point.CONFIG_ENV, raising=False)
    monkeypatch.setattr(sys, "argv", ["launch_server", "--moe-a2a-backend", "deepep"])
    with pytest.raises(ZeroDivisionError):  # which SGLang logs
        entry_point.register()
    monkeypatch.setenv(entry_point.CONFIG_ENV, "{}")
    with pytest.raises(SystemExit):
        entry_point.register()


def test_the_entry_point_knows_the_name_of_the_configuration():
    from sglang_macs.config import CONFIG_ENV

    assert entry_point.CONFIG_ENV == CONFIG_ENV


def test_the_extension_has_no_standard_library_of_its_own():
    """Streams of a second libstdc++ end the process at the first number that they write."""
    library = extension.library_in(PACKAGE)
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert not [name for name in names if name.startswith(("_ZNSo", "_ZNSt6locale"))]
    assert names, "and there is a list at all"
