"""The environment of an SGLang server on CPU: import shims on PYTHONPATH and the variables SGLang reads. No torch."""

import os
import shlex
from pathlib import Path

SITE_DIR = Path(__file__).resolve().parent / "site"


def available_cores() -> list[int]:
    """Ids of the cores this process may run on (cgroup and taskset masks count), ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_bind(ranks: int, cores: list[int] | None = None) -> str:
    """Value of SGLANG_CPU_OMP_THREADS_BIND: one group of cores per rank, `|` between ranks, e.g. `0-7|8-15`.

    Without it SGLang demands one NUMA node per rank. With fewer cores than ranks, ranks share cores.
    """
    if ranks < 1:
        raise ValueError(f"threads_bind: ranks must be at least 1, got {ranks}; pass the tensor-parallel size")
    cores = available_cores() if cores is None else sorted(cores)
    if len(cores) < ranks:
        return "|".join(str(cores[r % len(cores)]) for r in range(ranks))
    share = len(cores) // ranks
    return "|".join(_ranges(cores[r * share : (r + 1) * share]) for r in range(ranks))


def _ranges(cores: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    groups: list[list[int]] = []
    for core in cores:
        if groups and core == groups[-1][-1] + 1:
            groups[-1].append(core)
        else:
            groups.append([core])
    return ",".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def environment(ranks: int = 2, base: dict[str, str] | None = None) -> dict[str, str]:
    """The variables to set before `python -m sglang.launch_server --device cpu` with `ranks` ranks on this host.

    `base` (default: this process's environment) is only read, for the PYTHONPATH to prepend to; only the variables to
    set are returned.
    """
    base = dict(os.environ) if base is None else base
    tail = [p for p in base.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(SITE_DIR)]
    return {
        # The shims of site/ must come first: sitecustomize is found by position (and passes on to the next one).
        "PYTHONPATH": os.pathsep.join([str(SITE_DIR), *tail]),
        # What makes SGLang's `is_cpu()` true; `--device cpu` alone leaves half of the branches on CUDA.
        "SGLANG_USE_CPU_ENGINE": "1",
        # SGLang compiles small functions at start: two ranks take 40 s instead of 20 s to come up.
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": threads_bind(ranks),
        # The CUDA build of torch, which the package index hands out by default, brings NCCL; SGLang would open it and
        # then demand a CUDA device. A library that is not there makes it go without, as with a CPU build.
        "SGLANG_NCCL_SO_PATH": str(SITE_DIR / "no-nccl-on-cpu.so"),
        # Where a rank has died and another still lives, the launcher would wait a minute for dumps of GPUs.
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "false",
        # SGLang binds threads itself only with AMX; without it every rank would start one thread per core.
        "OMP_NUM_THREADS": str(max(1, len(available_cores()) // ranks)),
    }


def shell_exports(ranks: int = 2) -> str:
    """`environment(ranks)` as POSIX shell lines, for `eval "$(python -m sglang_macs.cpu_compat)"`."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(ranks).items())
