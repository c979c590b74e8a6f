"""Builds csrc/ into sglang_macs/_C: CPU only where there is no nvcc, CPU and CUDA where there is.

`MACS_CUDA=0` or `=1` overrides the choice; `MACS_CUDA_ARCH` (default 90a) names the GPU architectures. `MACS_TORCH`
names another release of torch to build for than SGLang's: enough for the operators, not for serving.

A wheel fits one torch, CUDA and set of architectures. Its file's name says which, as the build tag of the format:
`sglang_macs-VERSION-0.torch2.13.cu130.sm90a-cp311-cp311-linux_x86_64.whl`.
"""

import glob
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tomllib

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

RELEASES = runpy.run_path("sglang_macs/releases.py")  # importing the package would take what it needs
TORCH = (os.environ["MACS_TORCH"],) if "MACS_TORCH" in os.environ else RELEASES["TORCH"]


def fail(what: str, got: str, expected: str, fix: str) -> None:
    sys.exit(f"sglang-macs build: {what}: got {got}, expected {expected}. {fix}")


try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    fail("torch", "none", f"torch {' or '.join(TORCH)}", "Install it first, then build with --no-build-isolation.")


def use_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason in words."""
    forced = os.environ.get("MACS_CUDA")
    if forced in ("0", "1"):
        return forced == "1", f"MACS_CUDA={forced}"
    if not glob.glob("csrc/cuda/*.cu"):
        return False, "csrc/cuda holds no kernels"
    if torch.version.cuda is None:
        return False, "this torch was built without CUDA"
    if CUDA_HOME is None or not shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")):
        return False, "no nvcc found"
    if not os.path.exists(os.path.join(CUDA_HOME, "include", "cuda_runtime.h")):
        return False, f"no CUDA headers below {CUDA_HOME}; set CUDA_HOME to the toolkit's folder"
    return True, f"nvcc in {CUDA_HOME}, torch for CUDA {torch.version.cuda}"


def shared_libstdcxx() -> list[str]:
    """For the linker, where the compiler finds libstdc++ as an archive alone. With two copies a process ends at the
    first number in an error message: the second copy's streams know no locale.
    """
    name = "libstdc++.so"
    compiler = os.environ.get("CXX", "c++").split()
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout
    return ["-l:libstdc++.so.6"] if found.strip() == name else []


def architectures() -> list[str]:
    """Of GPUs, such as 90a."""
    return os.environ.get("MACS_CUDA_ARCH", "90a").split(",")


def build_tag(torch_version: str, cuda_version: str | None, archs: list[str]) -> str:
    """What a wheel's name says of the build; begins with a digit, as the format asks. No CUDA version: CPU only."""
    built_for = ["cpu"] if cuda_version is None else [f"cu{cuda_version.replace('.', '')}", *(f"sm{a}" for a in archs)]
    return ".".join(["0", "torch" + ".".join(torch_version.split(".")[:2]), *built_for])


class Wheel(bdist_wheel):
    """Named by what it was built for, unless --build-number says otherwise."""

    def finalize_options(self) -> None:
        if self.build_number is None:
            cuda = torch.version.cuda if use_cuda()[0] else None
            self.build_number = build_tag(torch.__version__, cuda, architectures())
        super().finalize_options()


def extension():
    cuda, reason = use_cuda()
    print(f"sglang-macs build: {'CPU + CUDA' if cuda else 'CPU only'} ({reason})", file=sys.stderr, flush=True)
    sources = [*sorted(glob.glob("csrc/torch/*.cpp")), *sorted(glob.glob("csrc/cpu/*.cpp"))]
    # No contraction: the thresholds are defined by IEEE double arithmetic in the order written (docs/design/method.md).
    cxx = ["-O3", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    include = [os.path.abspath("csrc/include")]
    if not cuda:
        return CppExtension(
            "sglang_macs._C",
            sources,
            include_dirs=include,
            extra_compile_args={"cxx": cxx},
            extra_link_args=shared_libstdcxx(),
        )
    # torch's flags take the conversions of half and bfloat16 away, which the kernels use.
    keep = [f"-U__CUDA_NO_{name}__" for name in ("HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF_OPERATORS")]
    nvcc = ["-O3", "-std=c++20", *keep, *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures())]
    return CUDAExtension(
        "sglang_macs._C",
        [*sources, *sorted(glob.glob("csrc/cuda/*.cu"))],
        include_dirs=include,
        define_macros=[("MACS_WITH_CUDA", "1")],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=shared_libstdcxx(),
    )


if not torch.__version__.startswith(tuple(f"{minor}." for minor in TORCH)):
    expected = " or ".join(f"{minor}.x" for minor in TORCH)
    fail("torch", torch.__version__, expected, "Install the one that your SGLang asks for.")


def version() -> dict[str, str]:
    """For `setup`: nothing where setuptools-scm says it (pyproject.toml); without it, the release that is made next."""
    if importlib.util.find_spec("setuptools_scm") is not None:
        return {}
    print("sglang-macs build: no setuptools-scm, and so no commit in the version", file=sys.stderr, flush=True)
    with open("pyproject.toml", "rb") as file:
        return {"version": tomllib.load(file)["tool"]["setuptools_scm"]["fallback_version"]}


setup(
    **version(),
    ext_modules=[extension()],
    cmdclass={
        "build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None),
        "bdist_wheel": Wheel,
    },
)
