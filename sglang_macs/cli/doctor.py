"""`sglang-macs doctor [-- SERVER FLAGS]`: whether this machine can serve with MACS, check by check, each failure with
its fix. `sglang-macs doctor URL`: what a running server says of itself (doctor_server.py).

What needs SGLang is asked in processes of their own, as a launch would have it: a launcher that parses flags, and a
scheduler with the model stack.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import cpu_compat, extension
from ..config import TOKENS_THAT_PAY
from ..errors import MacsError, printable
from ..releases import PINNED, SGLANG, TORCH
from . import doctor_server
from .arguments import add_server, server_of
from .checks import FAIL, OK, SKIP, WARN, Check, checked, report
from .progress import Progress

HELP = "check that this machine, and a launch, can serve with MACS; each failure comes with its fix"
PROBE_SECONDS = 300
DEVICES = Path("/dev")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    help = "flags of the launch to check, too; or the URL of a running server, to look at that"
    parser.add_argument("server_flags", nargs="*", metavar="-- SERVER_FLAG", help=help)
    add_server(parser)


def run(args: argparse.Namespace) -> int:
    url = args.server_flags[0] if len(args.server_flags) == 1 else ""
    with Progress("doctor") as progress:
        if url.startswith(("http://", "https://")):
            progress.now = f"waiting for {printable(url)}"
            checks = list(doctor_server.examine(server_of(url, args)))
        else:
            checks = examine(args.server_flags, progress)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        print(report(checks))
    return int(any(check.status == FAIL for check in checks))


def examine(server_flags: list[str], progress: Progress | None = None) -> list[Check]:
    """Every check, in order; `server_flags` are those of the launch to try, or none."""
    progress = progress or Progress("")
    progress.now = "which package a launch here would take"
    imported = _imported()
    progress.now = "importing torch, and the extension"
    operators = _extension(imported)
    checks, built = [*_versions(), *_package(imported), operators], operators.status == OK
    progress.now = "GPUs"
    asked = "--device=cpu" in server_flags or ("--device", "cpu") in pairwise(server_flags)
    on_cpu = asked or not _gpus()
    checks += _cpu(asked) if on_cpu else _cuda(built)
    progress.now = "importing SGLang as a launcher and as a scheduler, and trying every hook"
    return [*checks, _entry_point(), *_in_sglang(server_flags, on_cpu, built)]


# ---- Without SGLang ------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    yield checked(
        "python", (3, 11) <= sys.version_info < (3, 13), platform.python_version(), "Use Python 3.11 or 3.12."
    )
    for name, wanted in (("sglang", SGLANG), ("torch", TORCH)):
        found = _version_of(name)
        ok = found is not None and any((found + ".").startswith(w + ".") for w in wanted)
        fix = f"Install {name} {' or '.join(wanted)}, which this version is made for."
        yield checked(name, ok, found or "not installed", fix)
    if (asked := _torch_of_sglang()) and (found := _version_of("torch")) and _minor(found) != _minor(asked):
        what = f"torch {found}, where sglang {_version_of('sglang')} asks for {asked}"
        yield Check("torch of sglang", WARN, what, f"Install torch=={asked}: SGLang's kernels are built for it.")


def _torch_of_sglang() -> str | None:
    """The release of torch that the installed SGLang pins."""
    try:
        requires = metadata.requires("sglang") or ()
    except metadata.PackageNotFoundError:
        return None
    pins = (re.match(r"torch\s*==\s*([\d.]+)\s*(;|$)", line) for line in requires)
    return next((pin[1] for pin in pins if pin), None)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _imported() -> Path:
    """Folder of the package that a `python -m` started here imports: the current folder comes first on its path."""
    done = _python("import sglang_macs; print(*sglang_macs.__path__)", dict(os.environ))
    return Path(done.stdout.strip() or extension.PACKAGE)


def _package(imported: Path) -> Iterator[Check]:
    own = extension.PACKAGE
    if not imported.samefile(own) and extension.library_in(imported):
        fix = "Start it in another folder, unless that one is meant."
        yield Check("package", WARN, f"python -m in this folder takes {imported}, not {own}", fix)


def _extension(imported: Path) -> Check:
    if extension.library_in(imported) is None:
        return Check("extension", FAIL, *_found_and_fix(str(extension.missing(imported))))
    try:
        from .. import ops

        ops.check()
        gpu = {"cuda": "built for CPU and CUDA", "triton": "built for CPU; on GPUs the operators run in Triton"}
        return Check("extension", OK, gpu.get(ops.cuda_backend(), "built for CPU"))
    except MacsError as error:
        return Check("extension", FAIL, *_found_and_fix(str(error)))
    except ImportError as error:
        return Check("extension", FAIL, _last_line(str(error)), "Build it against this torch: make build.")


def _found_and_fix(line: str) -> tuple[str, str]:
    """A MacsError's line in two: what was found, and the fix behind it."""
    found, fix = re.fullmatch(r"(.*?)(?:\. (\S.*))?", line).groups()
    return found.removesuffix("."), fix or ""


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _invisible() -> Check | None:
    """Why torch sees none of the GPUs that there are; None where there are none."""
    import torch

    there = [path.name for path in DEVICES.glob("nvidia*") if path.name[6:].isdigit()]
    if not there:
        return None
    what, hidden = f"{len(there)} in this machine, and torch sees none", os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        found = f"{what}: torch {torch.__version__} was built without CUDA"
        return Check("GPU", FAIL, found, "Install torch for CUDA, and build sglang-macs again; or pass --device cpu.")
    if hidden is not None:
        found = f"{what}: CUDA_VISIBLE_DEVICES={hidden!r}"
        return Check("GPU", FAIL, found, "Unset it, or name GPUs that there are (nvidia-smi -L).")
    said = _last_line(_python("import torch; torch.cuda.init()", dict(os.environ)).stderr)
    fix = f"Is the driver one for CUDA {torch.version.cuda}, and may this user open /dev/nvidia*? nvidia-smi says."
    return Check("GPU", FAIL, f"{what}: {said}", fix)


def _cpu(asked: bool = True) -> Iterator[Check]:
    if not asked and (invisible := _invisible()):
        yield invisible
        return  # what serving on a CPU takes is not the question
    yield Check("GPU", SKIP, "serving on the CPU" if asked else "none in this machine or container: serving on the CPU")
    wanted = cpu_compat.environment()
    # By its last names: in a clone it is the clone's, which `_extension` has a word on.
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    shims = any(Path(entry).parts[-3:] == cpu_compat.SITE_DIR.parts[-3:] for entry in entries)
    missing = [name for name in ("SGLANG_USE_CPU_ENGINE",) if os.environ.get(name) != wanted[name]]
    missing += [] if shims else ["PYTHONPATH"]
    yield checked(
        "CPU environment",
        not missing,
        f"without {', '.join(missing)}" if missing else "set",
        'eval "$(python -m sglang_macs.cpu_compat)" (--ranks N for more than two), and pass --device cpu.',
    )


def _cuda(built: bool) -> Iterator[Check]:
    yield Check("GPU", OK, ", ".join(_gpus()))
    if built:
        yield _operators_on_gpu()
    yield _peers()
    yield _fused()
    for module, fix in (
        ("deep_ep", "Install DeepEP (github.com/deepseek-ai/DeepEP): it moves the rows."),
        ("deep_gemm", "Install DeepGEMM (github.com/deepseek-ai/DeepGEMM): its runner takes DeepEP's formats."),
    ):
        yield checked(module, *_importable(module), fix)


def _operators_on_gpu() -> Check:
    """Runs one: a build for another architecture loads, and fails only here."""
    import torch

    name, fix = "operators on the GPU", "Build where nvcc is, with MACS_CUDA=1 and MACS_CUDA_ARCH of this GPU."
    try:
        from .. import ops

        segment = torch.zeros(2, dtype=torch.int32, device="cuda")
        entropy = ops.entropy_score(torch.zeros((2, 64), device="cuda"), segment)
        return checked(
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
    return checked("peer access", not apart, f"none between {', '.join(apart)}" if apart else f"{count} GPUs", fix)


def _apart() -> list[str]:
    """Pairs of GPUs of which one cannot address the other's memory."""
    import torch

    devices = range(torch.cuda.device_count())
    pairs = [(a, b) for a in devices for b in devices if a != b]
    return [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]


def _fused() -> Check:
    """What --macs-dispatch fused needs of the machine; nothing fails without it, since DeepEP carries then."""
    from ..dispatch.transport import unfit_device

    name = "--macs-dispatch fused"
    if why := unfit_device():
        return Check(name, SKIP, why, "It needs Hopper, and a build with nvcc and MACS_CUDA=1. DeepEP does without.")
    if _apart():
        return Check(name, SKIP, "no peer access", "It needs NVLink or PCIe peer access among all GPUs of the group.")
    return Check(name, OK, "can carry low-latency batches, which are decode's under --deepep-mode auto")


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
from sglang_macs.engine import plugin
print("HOOKS " + json.dumps(plugin.probe(sys.argv[1])), flush=True)
if sys.argv[2:]:
    print("TAKEN " + json.dumps(plugin.try_launch(sys.argv[2:])), flush=True)
"""


def _in_sglang(server_flags: list[str], on_cpu: bool, built: bool) -> list[Check]:
    if importlib.util.find_spec("sglang") is None:
        return [Check("hooks", SKIP, "no sglang")]
    env = {**os.environ, **(cpu_compat.environment() if on_cpu else {})}
    with ThreadPoolExecutor(2) as pool:
        launcher = pool.submit(_python, _PROBE, env, "launcher", *(server_flags if built else ()))
        scheduler = pool.submit(_python, _PROBE, env, "scheduler")
    checks = [*_hooks("launcher", launcher.result()), *_hooks("scheduler", scheduler.result())]
    if server_flags and not built:
        return [*checks, Check("server flags", SKIP, "no extension, without which every launch is refused")]
    return [*checks, *_launch(server_flags, launcher.result())]


def _hooks(side: str, done: subprocess.CompletedProcess) -> list[Check]:
    fix = f"Install sglang=={PINNED}, or a version of sglang-macs that is made for {_version_of('sglang')}."
    if (hooks := _said("HOOKS ", done)) is not None:
        return [checked(f"{side} hook", not trouble, trouble or target, fix) for target, trouble in hooks.items()]
    if refusals := _refusals(done):
        return [Check(f"{side} hooks", FAIL, *refusals[-1])]
    return [Check(f"{side} hooks", FAIL, _last_line(done.stderr), "Install again what does not import.")]


def _launch(server_flags: list[str], done: subprocess.CompletedProcess) -> Iterator[Check]:
    name = "server flags"
    if not server_flags:
        yield Check(name, SKIP, "none given: sglang-macs doctor -- --model-path MODEL --tp N ...")
    elif (flags := _said("TAKEN ", done)) is not None:
        yield Check(name, OK, "model and flags are taken")
        yield _chunk_size(flags)
        yield from _idle_replicas(flags)
    else:
        refusals = _refusals(done)
        found, fix = (
            refusals[-1] if refusals else (_last_line(done.stderr), "SGLang itself refuses: change what it names.")
        )
        yield Check(name, FAIL, found, fix or "Change that flag.")


def _chunk_size(flags: dict[str, Any]) -> Check:
    """Whether a rank's prefill chunk pays: under dp-attention SGLang divides --chunked-prefill-size by dp (in
    arg_groups/parallel_hook.py). flags: SGLang's, resolved.
    """
    name, tokens = "tokens per rank", flags["chunked_prefill_size"]
    pays = TOKENS_THAT_PAY["cpu" if flags["device"] == "cpu" else "cuda"]
    if not 0 < tokens < pays:
        return Check(name, OK, f"prefill chunks of {tokens}" if tokens > 0 else "prefill is not chunked")
    groups = flags["dp_size"] if flags["enable_dp_attention"] else 1
    found = f"prefill chunks of {tokens} (--chunked-prefill-size over dp {groups}): MACS pays from about {pays}"
    fix = f"Pass --chunked-prefill-size {groups * 8192}, with --mem-fraction-static: SGLang sizes memory by the whole."
    return Check(name, WARN, found, fix)


def _idle_replicas(flags: dict[str, Any]) -> Iterator[Check]:
    """Whether redundant experts lie where they are of use: without a placement they are copies of the first experts,
    all on the last ranks. flags: SGLang's, resolved.
    """
    redundant = flags["ep_num_redundant_experts"]
    if redundant and not flags["enable_eplb"] and flags["init_expert_location"] == "trivial":
        found = f"{redundant} redundant experts with the trivial placement, which is less even than none"
        fix = "Pass --enable-eplb, or --init-expert-location with recorded loads (logical_count)."
        yield Check("expert placement", WARN, found, fix)


def _said(word: str, done: subprocess.CompletedProcess) -> Any:
    """The JSON behind `word` at the start of a line of the probe's output, or None."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(word)]
    return json.loads(lines[-1].removeprefix(word)) if lines else None


def _refusals(done: subprocess.CompletedProcess) -> list[tuple[str, str]]:
    """What MACS printed when it ended a process: what was found, and the fix."""
    return [_found_and_fix(line) for line in re.findall(r"^sglang-macs: (.*)$", done.stderr, re.MULTILINE)]


def _python(program: str, env: dict[str, str], *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *args]
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer after {PROBE_SECONDS} s")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["ended without a word"])[-1][:300]
