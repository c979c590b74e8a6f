"""Stand-in for `sgl_kernel` on CPUs without its kernels. A real sgl_kernel that can be imported always wins.

Why: with SGLANG_USE_CPU_ENGINE=1 SGLang imports sgl_kernel in any case, but its wheels are for CUDA, or for CPUs
with AMX. Every name can be imported from the stub; calling one raises. It must not offer `convert_weight_packed`:
SGLang takes the presence of that operator for "AMX kernels available".
Can go when: SGLang guards these imports by `cpu_has_amx_support()`.
"""

import importlib.machinery
import importlib.util
import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _find_real():
    """Spec of an sgl_kernel elsewhere on the path, or None."""
    others = [p for p in sys.path if os.path.abspath(p or ".") != _ROOT]
    for finder in sys.meta_path:
        path = others if finder is importlib.machinery.PathFinder else None
        spec = finder.find_spec("sgl_kernel", path) if hasattr(finder, "find_spec") else None
        if spec is not None and spec.loader is not None:
            return spec
    return None


def _load_real():
    """Import the real package in this one's place. Returns None, or why it could not be imported."""
    spec = _find_real()
    if spec is None:
        return "not installed"
    stub = sys.modules[__name__]
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = module  # the import system hands out what stands here, not what it started with
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a wheel for other hardware fails in many ways: ImportError, OSError, RuntimeError
        for name in [n for n in sys.modules if n.startswith(__name__ + ".")]:
            del sys.modules[name]
        sys.modules[__name__] = stub
        return f"{spec.origin} cannot be imported here: {type(error).__name__}: {error}"
    return None


REASON = _load_real()
if REASON is not None:
    from sgl_kernel._stub import declare_schemas, missing

    __version__ = "0.0.0+cpu.stub"
    declare_schemas()

    def __getattr__(name):
        return missing(name, REASON)
