"""`sglang-macs doctor`: a healthy machine passes, each fault is named with its fix, and hooks are tried for real."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_macs import cli, extension
from sglang_macs.cli import doctor
from sglang_macs.cli.doctor import FAIL, OK, SKIP, WARN, Check
from sglang_macs.cli.progress import EVERY_SECONDS, Progress
from sglang_macs.cpu_compat import environment
from sglang_macs.engine import launcher, scheduler_process
from sglang_macs.releases import PINNED
from tests.support.broken_sglang import BREAK

EP2 = ["--device", "cpu", "--tp", "2", "--ep-size", "2"]
PACKAGE = extension.PACKAGE


def run(*arguments: str, **env: str) -> tuple[int, dict[str, list[dict]]]:
    """Exit status, and the checks by name, of `sglang-macs doctor --json`."""
    program = "import sys; from sglang_macs import cli; sys.exit(cli.main())"
    command = [sys.executable, "-c", program, "doctor", "--json", *arguments]
    full = {**os.environ, **environment(ranks=2), "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=300, check=False)
    by_name: dict[str, list[dict]] = {}
    for check in json.loads(done.stdout):
        by_name.setdefault(check["name"], []).append(check)
    return done.returncode, by_name


@pytest.mark.server
@pytest.mark.nightly  # what follows has all other checks fine, test_quickstart.py all
def test_a_machine_and_a_launch_that_are_fine(vl_model):
    status, checks = run("--", "--model-path", str(vl_model), *EP2, "--moe-a2a-backend", "macs")
    assert status == 0, checks
    for side, hooks in (("launcher", launcher.HOOKS), ("scheduler", scheduler_process.HOOKS)):
        found = {check["found"] for check in checks[f"{side} hook"]}
        assert {hook.target for hook in hooks} <= found
    assert checks["server flags"][0]["status"] == checks["extension"][0]["status"] == OK
    assert checks["tokens per rank"][0]["found"] == "prefill chunks of 4096"  # SGLang's default without a GPU


@pytest.mark.server
def test_a_lost_hook_and_a_bad_flag_are_named(tmp_path, vl_model):
    breaks = {"module": "sglang.srt.model_executor.model_runner", "owner": "ModelRunner", "method": "forward"}
    (tmp_path / "sitecustomize.py").write_text(BREAK.format(**breaks))
    path = os.pathsep.join([*environment(ranks=2)["PYTHONPATH"].split(os.pathsep), str(tmp_path)])
    flags = ["--model-path", str(vl_model), *EP2, "--moe-a2a-backend", "macs", "--macs-gamma", "0"]
    status, checks = run("--", *flags, PYTHONPATH=path)
    assert status == 1
    failed = [check for name in checks for check in checks[name] if check["status"] == FAIL]
    hook, launch = sorted(failed, key=lambda check: check["name"])
    assert "sglang.srt.model_executor.model_runner.ModelRunner.forward is gone" in hook["found"]
    assert f"sglang=={PINNED}" in hook["fix"]
    assert launch["found"] == "--macs-gamma: got 0.0, expected a number above 0"
    assert launch["fix"] == "inf turns clipping off."


def test_the_exit_status_follows_the_checks(monkeypatch, capsys):
    fine = [Check("a", OK, "x"), Check("b", SKIP, "y"), Check("c", WARN, "x", "do y")]
    for checks, status in ((fine, 0), ([Check("a", FAIL, "x", "do z")], 1)):
        monkeypatch.setattr(doctor, "examine", lambda *_, checks=checks: checks)
        assert cli.main(["doctor"]) == status
    assert "fix: do z" in capsys.readouterr().out


def test_the_report_folds_hooks_that_took():
    taken = [Check("launcher hook", OK, f"target {i}") for i in range(5)]
    text = doctor.report([*taken, Check("scheduler hook", FAIL, "target 9 is gone", "pin it")])
    assert "5 took" in text and "target 3" not in text and "target 9 is gone" in text and "fix: pin it" in text
    assert text.endswith("1 of 6 checks failed.")


@pytest.mark.parametrize(
    ("name", "found"), [("sglang", "0.5.2"), ("sglang", "0.5.210"), ("torch", "2.12.1"), ("torch", None)]
)
def test_other_versions_fail(monkeypatch, name, found):
    monkeypatch.setattr(doctor, "_version_of", lambda asked: found if asked == name else doctor.SGLANG[0])
    check = next(check for check in doctor._versions() if check.name == name)
    assert check.status == FAIL and name in check.fix


@pytest.mark.parametrize(
    ("requires", "installed", "found"),
    [
        (["numpy", "torch==2.13.0"], "2.14.1", "asks for 2.13.0"),
        (["torch==2.13.0"], "2.13.1", ""),
        (["torchvision==0.9", "torch>=2"], "2.14.1", ""),
        (['torch==2.12.0; extra == "old"', "torch==2.13.0"], "2.14.1", "asks for 2.1"),
        (None, "2.14.1", ""),
    ],
)
def test_a_torch_that_this_sglang_was_not_made_for_is_named(monkeypatch, requires, installed, found):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(doctor, "_version_of", lambda name: installed if name == "torch" else doctor.SGLANG[0])
    warned = [check for check in doctor._versions() if check.status != OK]
    assert [check.status for check in warned] == [WARN] * bool(found)
    assert all(found in check.found and "torch==2.1" in check.fix for check in warned)


@pytest.mark.parametrize(
    ("devices", "cuda", "visible", "found"),
    [
        (["nvidia0", "nvidia1", "nvidiactl"], None, None, "2 in this machine.*built without CUDA"),
        (["nvidia0"], "13.0", "", "CUDA_VISIBLE_DEVICES=''"),
        (["nvidia0"], "13.0", "7", "CUDA_VISIBLE_DEVICES='7'"),
        (["nvidia0"], "13.0", None, "driver is too old"),
        (["nvidiactl", "null"], "13.0", None, ""),
    ],
)
def test_why_gpus_are_invisible_is_said(monkeypatch, tmp_path, devices, cuda, visible, found):
    import torch

    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    said = SimpleNamespace(stderr="Traceback\nRuntimeError: the driver is too old")
    monkeypatch.setattr(doctor, "_python", lambda *_: said)
    first = next(iter(doctor._cpu(asked=False)))
    assert (first.status, bool(first.fix)) == ((FAIL, True) if found else (SKIP, False))
    assert re.search(found, first.found)
    assert next(iter(doctor._cpu(asked=True))).found == "serving on the CPU"


@pytest.mark.parametrize(
    ("asked", "waits", "words"),
    [
        ([], "sglang_macs.cli.doctor._in_sglang", "importing SGLang"),
        (["http://127.0.0.1:9"], "sglang_macs.cli.doctor_server.examine", "waiting for http://127.0.0.1:9"),
    ],
    ids=["machine", "server"],
)
def test_a_doctor_who_waits_says_what_for(monkeypatch, capsys, asked, waits, words):
    said = threading.Event()

    class Stderr:
        def write(self, text: str) -> None:
            if words in text:
                said.set()

        def flush(self) -> None: ...

    def waiting(*_) -> list[Check]:
        assert said.wait(60), "not a word"
        return [Check("a", OK, "x")]

    monkeypatch.setattr(waits, waiting)
    monkeypatch.setattr(doctor, "Progress", partial(Progress, every=0.01))
    monkeypatch.setattr(sys, "stderr", Stderr())
    cli.main(["doctor", *asked, "--json"])
    assert json.loads(capsys.readouterr().out) and EVERY_SECONDS < 5


@pytest.mark.parametrize(
    ("unfit", "apart", "status", "found"),
    [
        ("", [], OK, "--deepep-mode auto"),
        ("", ["0-1"], SKIP, "no peer access"),
        ("this build has no CUDA kernels", [], SKIP, "no CUDA kernels"),
    ],
)
def test_what_the_fused_dispatch_needs_is_said_and_fails_nothing(monkeypatch, unfit, apart, status, found):
    monkeypatch.setattr("sglang_macs.dispatch.transport.unfit_device", lambda: unfit)
    monkeypatch.setattr(doctor, "_apart", lambda: apart)
    check = doctor._fused()
    assert check.status == status and found in check.found and bool(check.fix) == (status == SKIP)


def test_the_threshold_is_where_the_simulation_begins_to_pay(capsys):
    def speedup(tokens: int) -> float:
        assert cli.main(f"simulate --ep 8 --gamma 1.1 --presets rank --tokens {tokens} --json".split()) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        return next(row["speedup"] for row in rows if row["preset"] == "rank")

    assert speedup(doctor.TOKENS_THAT_PAY["cuda"] // 2) < 1 < speedup(doctor.TOKENS_THAT_PAY["cuda"])


def test_a_build_for_another_torch_fails(monkeypatch):
    import sglang_macs

    monkeypatch.delattr(sglang_macs, "ops", raising=False)
    monkeypatch.setitem(sys.modules, "sglang_macs.ops", None)  # its import raises ImportError
    found = doctor._extension(PACKAGE)
    assert found.status == FAIL and "make build" in found.fix


def shadow(tmp_path, monkeypatch) -> Path:
    """The current folder becomes a clone that nothing was built in; returns its package."""
    package = tmp_path / "sglang_macs"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    return package


def test_a_clone_that_shadows_the_installed_package_is_the_only_thing_wrong(tmp_path, monkeypatch):
    package = shadow(tmp_path, monkeypatch)
    for name, value in environment(ranks=2).items():
        monkeypatch.setenv(name, value if name != "PYTHONPATH" else f"{value}{os.pathsep}{PACKAGE.parent}")
    checks = doctor.examine([*EP2, "--moe-a2a-backend", "macs"])
    (failed,) = [check for check in checks if check.status in (FAIL, WARN)]
    assert failed.name == "extension"
    assert f"no extension in {package}, while the installed package lies in {PACKAGE}" in failed.found
    assert failed.fix.startswith("Run it from another folder, or: pip install") and failed.fix.endswith(str(tmp_path))
    (flags,) = [check for check in checks if check.name == "server flags"]
    assert flags.status == SKIP and "no extension" in flags.found


def test_another_build_that_a_launch_here_would_take_is_named(tmp_path, monkeypatch):
    package = shadow(tmp_path, monkeypatch)
    shutil.copy(extension.library_in(PACKAGE), package)
    (found,) = doctor._package(doctor._imported())
    assert found.status == WARN and str(package) in found.found and str(PACKAGE) in found.found
    assert not list(doctor._package(PACKAGE))


@pytest.mark.parametrize(
    ("device", "groups", "tokens", "status"),
    [
        ("cuda", 8, 1024, WARN),  # SGLang's default of 8192 over dp 8
        ("cuda", 16, 512, WARN),
        ("cuda", 8, 8192, OK),
        ("cuda", 8, 2048, OK),
        ("cuda", 1, -1, OK),  # not chunked
        ("cpu", 2, 2048, OK),
        ("cpu", 2, 16, WARN),
    ],
)
def test_chunks_in_which_macs_does_not_pay_are_warned_of(device, groups, tokens, status):
    flags = {"device": device, "dp_size": groups, "enable_dp_attention": groups > 1, "chunked_prefill_size": tokens}
    found = doctor._chunk_size(flags)
    assert found.status == status and (str(tokens) in found.found) == (tokens > 0)
    assert (f"--chunked-prefill-size {groups * 8192}" in found.fix) == (status == WARN)


@pytest.mark.parametrize(
    ("redundant", "eplb", "location", "warned"),
    [(0, False, "trivial", 0), (4, False, "trivial", 1), (4, True, "trivial", 0), (4, False, "/loads.json", 0)],
)
def test_replicas_without_a_placement_are_warned_of(redundant, eplb, location, warned):
    flags = {"ep_num_redundant_experts": redundant, "enable_eplb": eplb, "init_expert_location": location}
    found = list(doctor._idle_replicas(flags))
    assert [check.status for check in found] == [WARN] * warned and all("--enable-eplb" in c.fix for c in found)


def test_a_plugin_list_without_macs_fails(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other, more")
    assert doctor._entry_point().status == FAIL
    monkeypatch.setenv("SGLANG_PLUGINS", "other, macs")
    assert doctor._entry_point().status == OK


def test_a_shell_without_the_cpu_environment_fails(monkeypatch):
    for name, value in environment(ranks=2).items():
        monkeypatch.setenv(name, value)
    assert [check.status for check in doctor._cpu()] == [SKIP, OK]
    monkeypatch.setenv("PYTHONPATH", "/a clone/sglang_macs/cpu_compat/site")  # whose extension is another check's
    assert [check.status for check in doctor._cpu()] == [SKIP, OK]
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    assert list(doctor._cpu())[1].status == FAIL


def test_a_module_that_breaks_on_import_fails(monkeypatch, tmp_path):
    (tmp_path / "broken_by_design.py").write_text("raise OSError('libnothing.so not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._importable("broken_by_design") == (False, "OSError: libnothing.so not found")
    assert doctor._importable("not_there_by_design") == (False, "not installed")
    assert doctor._importable("json")[0]
