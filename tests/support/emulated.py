"""Kernels of csrc/cuda compiled for this CPU, on the emulated machine of tools/emulator.

    library = emulated.build("plan", emulated.CUDA / "clip_apply.cu", emulated.CUDA / "capi.cu", defines=["MACS_C_API"])
    library.configure(seed=3)                      # which schedule; the same seed, the same run
    library("macs_clip_apply", params, workspace)  # extern "C"; structures go by pointer, tensors by address
    with library.together():                       # launches on different streams, run at once when the block ends
        for rank in range(4):
            library("macs_fused_dispatch", params[rank], stream=rank + 1)

A call runs the kernels to their end. What goes wrong raises `Failure`, whose text says which thread waits where. Source
files may be kernels of csrc or of a test; the launchers in them are `extern "C"`, return a cudaError_t, take the stream
last, and are exported (`__attribute__((visibility("default")))`, as MACS_EXPORT in csrc/cuda/capi.cu).

The device has 4 SMs, which hold 16 blocks each, and clusters of up to 8 blocks, unless `build` is told
otherwise. One library at a time, from one Python thread. What cannot show here: tools/emulator/README.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tools" / "emulator"
BUILD = ROOT / "build" / "emulated"
# Before csrc/include, so that macs/ptx.cuh is the emulator's.
INCLUDE = [EMULATOR / "include", ROOT / "csrc" / "include", CUDA]
FLAGS = [
    *["-x", "c++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"],
    "-fno-gnu-unique",  # static and thread-local variables are each library's own
    *["-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare", "-U_FORTIFY_SOURCE"],
]
# Only the calls before each access: the emulator answers them, and the sanitizer's own library is not linked.
WATCHED = ["-fsanitize=thread,alignment", "-g1"]


class Failure(Exception):
    """A launcher did not answer cudaSuccess. `code` is its answer; the text is the emulator's report, if it has one."""

    def __init__(self, code: int, report: str) -> None:
        super().__init__(f"cudaError {code}: {report or 'refused before the launch'}")
        self.code = code


class Library:
    """Emulated kernels and the machine they run on."""

    def __init__(self, path: Path, num_sms: int, max_cluster: int) -> None:
        self.path = path
        self.cdll = ctypes.CDLL(str(path))
        self.cdll.emulator_device(num_sms, max_cluster)
        self.cdll.emulator_report.restype = ctypes.c_char_p
        for counter in ("emulator_steps", "emulator_launches", "emulator_now_ns"):
            getattr(self.cdll, counter).restype = ctypes.c_uint64
        self.configure()

    def configure(self, seed: int = 0, order: str = "random", preempt_one_in: int = 4) -> None:
        """The schedule of every later run: "random" from a seed, or "round_robin"."""
        if order not in ("random", "round_robin"):
            raise ValueError(f"order: {order!r}")
        self.cdll.emulator_configure(ctypes.c_uint64(seed), order == "random", preempt_one_in)

    def __call__(self, launcher: str, *arguments: Any, stream: int = 0) -> None:
        """Calls a launcher; runs what it launched, unless within `together`."""
        code = getattr(self.cdll, launcher)(*map(_passed, arguments), ctypes.c_void_p(stream))
        self._check(code)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Keeps the launches of the block and runs them at its end: in order within a stream, streams interleaved."""
        self.cdll.emulator_hold()
        code = 0
        try:
            yield
        finally:
            code = self.cdll.emulator_run()
        self._check(code)

    @property
    def now_ns(self) -> int:
        """Simulated time."""
        return self.cdll.emulator_now_ns()

    @property
    def steps(self) -> int:
        """How often a thread was resumed: the cost of what ran, whatever machine it ran on."""
        return self.cdll.emulator_steps()

    @property
    def launches(self) -> int:
        """Kernels started."""
        return self.cdll.emulator_launches()

    def _check(self, code: int) -> None:
        if code != 0:
            self.cdll.emulator_forget_error()
            raise Failure(code, self._with_lines(self.cdll.emulator_report().decode()))

    def _with_lines(self, report: str) -> str:
        """Code addresses as source lines, inner ones first."""

        def line_of(address: re.Match[str]) -> str:
            command = ["addr2line", "-i", "-s", "-e", str(self.path), address[1]]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            return " in ".join(line.split(" (")[0] for line in lines)

        return re.sub("@(0x[0-9a-f]+)@", line_of, report)


class Kernels:
    """A library's launchers by name and parameters, as the groups of benchmarks/gpu call them, on stream `stream`."""

    def __init__(self, machine: Library) -> None:
        self.machine, self.library, self.stream = machine, machine.cdll, 0

    def __call__(self, name: str, params: ctypes.Structure) -> None:
        self.machine(f"macs_{name}", params, stream=self.stream)


def build(
    name: str,
    *sources: Path,
    defines: Sequence[str] = (),
    races: bool = False,
    num_sms: int = 4,
    max_cluster: int = 8,
) -> Library:
    """Compiles the sources and the emulator into build/emulated, what has not changed only once.

    `races`: every load and store of the sources is watched; a data race, a misaligned access or one that leaves the
    dynamic shared memory is a failure. Slow: small cases.
    """
    flags = [*FLAGS, *(f"-D{define}" for define in defines)]
    headers = hashlib.sha256()
    for folder in INCLUDE:
        for header in sorted(folder.rglob("*.*h")):
            headers.update(header.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        own = [*flags, *(WATCHED if races and source in sources else [])]
        digest = hashlib.sha256(source.read_bytes() + " ".join(own).encode() + headers.digest()).hexdigest()[:16]
        target = BUILD / f"{source.stem}-{digest}.o"
        _make(target, ["g++", *own, *(f"-I{folder}" for folder in INCLUDE), "-c", str(source)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, *sorted(EMULATOR.glob("*.cpp"))]))
    # A device each: launchers keep what they have asked of it in static variables.
    identity = [*map(str, objects), str(num_sms), str(max_cluster)]
    digest = hashlib.sha256(" ".join(identity).encode()).hexdigest()[:16]
    target = BUILD / f"{name}-{digest}.so"
    _make(target, ["g++", "-shared", "-Wl,-z,defs", *map(str, objects)])
    library = Library(target, num_sms, max_cluster)
    library.cdll.emulator_find_races(races)
    return library


def _make(target: Path, command: list[str]) -> None:
    """Runs a compiler unless `target` is there. It appears complete or not at all; who comes meanwhile waits for it."""
    with (BUILD / f"{target.name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if target.exists():
            return
        part = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        part.rename(target)


def _passed(argument: Any) -> Any:
    """How ctypes is to pass it: structures by pointer, tensors by address, plain integers as 64 bits."""
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if hasattr(argument, "data_ptr"):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
