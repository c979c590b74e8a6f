"""Whether this machine can serve with MACS, check by check, each failure with its fix.

What needs SGLang is asked in processes of their own, as a launch would have it: a launcher that parses flags, and a
scheduler with the model stack.
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise

from . import cpu_compat
from .compat import SGLANG
from .errors import MacsError

TORCH = ("2.13", "2.14")
OK, FAIL, SKIP = "ok", "FAIL", "skip"
PROBE_SECONDS = 300


@dataclass(frozen=True)
class Check:
    """One finding. status: OK, FAIL, or SKIP where it does not apply; fix: what to do, for a FAIL, or
    what it would take, for a SKIP.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def _check(name: str, ok: bool, found: str, fix: str) -> Check:
    return Check(name, OK if ok else FAIL, found, "" if ok else fix)


def run(server_flags: list[str]) -> list[Check]:
    """Every check, in order; `server_flags` are those of the launch to try, or none."""
    checks = [*_versions(), _extension()]
    on_cpu = "--device=cpu" in server_flags or ("--device", "cpu") in pairwise(server_flags) or not _gpus()
    checks += _cpu() if on_cpu else _cuda()
    return [*checks, _entry_point(), *_in_sglang(server_flags, on_cpu)]


# ---- Without SGLang ------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    yield _check("python", (3, 11) <= sys.version_info < (3, 13), platform.python_version(), "Use Python 3.11 or 3.12.")
    for name, wanted in (("sglang", SGLANG), ("torch", TORCH)):
        found = _version_of(name)
        ok = found is not None and any((found + ".").startswith(w + ".") for w in wanted)
        fix = f"Install {name} {' or '.join(wanted)}, which this version is made for."
        yield _check(name, ok, found or "not installed", fix)


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _extension() -> Check:
    try:
        from . import ops

        gpu = {"cuda": "built for CPU and CUDA", "triton": "built for CPU; on GPUs the operators run in Triton"}
        return Check("extension", OK, gpu.get(ops.cuda_backend(), "built for CPU"))
    except (MacsError, OSError, ImportError) as error:  # OSError: built against another torch
        return Check("extension", FAIL, _last_line(str(error)), "Build it against this torch: make build.")


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _cpu() -> Iterator[Check]:
    yield Check("GPU", SKIP, "serving on the CPU")
    wanted = cpu_compat.environment()
    shims = str(cpu_compat.SITE_DIR) in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    missing = [name for name in ("SGLANG_USE_CPU_ENGINE",) if os.environ.get(name) != wanted[name]]
    missing += [] if shims else ["PYTHONPATH"]
    yield _check(
        "CPU environment",
        not missing,
        f"without {', '.join(missing)}" if missing else "set",
        'eval "$(python -m sglang_macs.cpu_compat)" (--ranks N for more than two), and pass --device cpu.',
    )


def _cuda() -> Iterator[Check]:
    yield Check("GPU", OK, ", ".join(_gpus()))
    yield _operators_on_gpu()
    yield _peers()
    yield _fused()
    for module, fix in (
        ("deep_ep", "Install DeepEP (github.com/deepseek-ai/DeepEP): it moves the rows."),
        ("deep_gemm", "Install DeepGEMM (github.com/deepseek-ai/DeepGEMM): its runner takes DeepEP's formats."),
    ):
        yield _check(module, *_importable(module), fix)


def _operators_on_gpu() -> Check:
    """Runs one: a build for another architecture loads, and fails only here."""
    import torch

    name, fix = "operators on the GPU", "Build where nvcc is, with MACS_CUDA=1 and MACS_CUDA_ARCH of this GPU."
    try:
        from . import ops

        segment = torch.zeros(2, dtype=torch.int32, device="cuda")
        entropy = ops.entropy_score(torch.zeros((2, 64), device="cuda"), segment)
        return _check(
            name, abs(entropy[0].item() - 4.1589) < 1e-3, f"entropy of 64 equal features {entropy[0]:.4f}", fix
        )
    except Exception as error:  # whatever it is, it is the finding
        return Check(name, FAIL, _last_line(str(error)), fix)


def _peers() -> Check:
    import torch

    count, apart = torch.cuda.device_count(), _apart()
    if count < 2:
        return Check("peer access", SKIP, "one GPU: expert parallelism needs at least two")
    fix = "DeepEP's kernels need NVLink or PCIe peer access within a host; see nvidia-smi topo -p2p r."
    return _check("peer access", not apart, f"none between {', '.join(apart)}" if apart else f"{count} GPUs", fix)


def _apart() -> list[str]:
    """Pairs of GPUs of which one cannot address the other's memory."""
    import torch

    devices = range(torch.cuda.device_count())
    pairs = [(a, b) for a in devices for b in devices if a != b]
    return [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]


def _fused() -> Check:
    """What --macs-dispatch fused needs of the machine; nothing fails without it, since DeepEP carries then."""
    from .transport import unfit_device

    name = "--macs-dispatch fused"
    if why := unfit_device():
        return Check(name, SKIP, why, "It needs Hopper, and a build with nvcc and MACS_CUDA=1. DeepEP does without.")
    if _apart():
        return Check(name, SKIP, "no peer access", "It needs NVLink or PCIe peer access among all GPUs of the group.")
    return Check(name, OK, "can carry planned batches under --deepep-mode low_latency")


def _importable(module: str) -> tuple[bool, str]:
    """In a process of its own: a broken CUDA library can end the one that imports it."""
    if importlib.util.find_spec(module) is None:
        return False, "not installed"
    done = _python(f"import {module}", dict(os.environ))
    return done.returncode == 0, "importable" if done.returncode == 0 else _last_line(done.stderr)


def _entry_point() -> Check:
    name, allowed = "plugin entry point", os.environ.get("SGLANG_PLUGINS", "")
    found = [e for e in metadata.entry_points(group="sglang.srt.plugins") if e.name == "macs"]
    if not found:
        return Check(name, FAIL, "not installed", "Install the package itself: make build, or pip install sglang-macs.")
    if allowed and "macs" not in [plugin.strip() for plugin in allowed.split(",")]:
        return Check(name, FAIL, f"SGLANG_PLUGINS={allowed} leaves it out", "Add macs to it, or unset it.")
    return Check(name, OK, found[0].value)


# ---- In SGLang -----------------------------------------------------------------------------------------------------

_PROBE = """
import json, sys
from sglang_macs import plugin
print("HOOKS " + json.dumps(plugin.probe(sys.argv[1])), flush=True)
if sys.argv[2:]:
    plugin.try_launch(sys.argv[2:])
    print("TAKEN", flush=True)
"""


def _in_sglang(server_flags: list[str], on_cpu: bool) -> list[Check]:
    if importlib.util.find_spec("sglang") is None:
        return [Check("hooks", SKIP, "no sglang")]
    env = {**os.environ, **(cpu_compat.environment() if on_cpu else {})}
    with ThreadPoolExecutor(2) as pool:
        launcher = pool.submit(_python, _PROBE, env, "launcher", *server_flags)
        scheduler = pool.submit(_python, _PROBE, env, "scheduler")
    checks = [*_hooks("launcher", launcher.result()), *_hooks("scheduler", scheduler.result())]
    return [*checks, _launch(server_flags, launcher.result())]


def _hooks(side: str, done: subprocess.CompletedProcess) -> list[Check]:
    fix = f"Install sglang=={SGLANG[0]}, or a version of sglang-macs that is made for {_version_of('sglang')}."
    for line in done.stdout.splitlines():
        if line.startswith("HOOKS "):
            hooks = json.loads(line.removeprefix("HOOKS "))
            return [_check(f"{side} hook", not trouble, trouble or target, fix) for target, trouble in hooks.items()]
    return [Check(f"{side} hooks", FAIL, _last_line(done.stderr), "SGLang itself does not import: reinstall it.")]


def _launch(server_flags: list[str], done: subprocess.CompletedProcess) -> Check:
    name = "server flags"
    if not server_flags:
        return Check(name, SKIP, "none given: sglang-macs doctor -- --model-path MODEL --tp N ...")
    if "TAKEN" in done.stdout.splitlines():
        return Check(name, OK, "model and flags are taken")
    refusals = re.findall(r"^sglang-macs: (.*?)(?:\. (\S.*))?$", done.stderr, re.MULTILINE)
    found, fix = refusals[-1] if refusals else (_last_line(done.stderr), "SGLang itself refuses: change what it names.")
    return Check(name, FAIL, found, fix or "Change that flag.")


def _python(program: str, env: dict[str, str], *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *args]
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer after {PROBE_SECONDS} s")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["ended without a word"])[-1][:300]


def report(checks: list[Check]) -> str:
    """The checks for a person: hooks that took are one line."""
    lines, took = [], [c for c in checks if c.name.endswith(" hook") and c.status == OK]
    for check in checks:
        if check not in took:
            lines.append(f"{check.status:<5} {check.name:<22} {check.found}")
            lines += [f"      fix: {check.fix}"] if check.fix else []
        elif check is took[0]:
            lines.append(f"{OK:<5} {'hooks':<22} {len(took)} took")
    failed = sum(check.status == FAIL for check in checks)
    verdict = f"{failed} of {len(checks)} checks failed" if failed else "Ready to serve with MACS"
    return "\n".join([*lines, "", f"{verdict}."])
