"""CPU compatibility: what SGLang lacks on a CPU without Intel AMX. Nothing here is part of MACS itself.

Why it exists: the same server, plugin and tests must run on a laptop and in CI. SGLang has a CPU engine, but its path
for CPUs without AMX is incomplete (see `gaps.GAPS`: each entry says what is missing, why, and when it can be deleted).

Two halves, because they act at different times:

* `environment()` / `python -m sglang_macs.cpu_compat` - the environment variables and the two import shims of `site/`
  (torchvision's operator schemas, a stub of `sgl_kernel`), needed *before* sglang is imported.
* `register(hook, define_missing)` - the functions that are hooked into SGLang's model code. Applying a hook imports its
  target, and the model stack must not be imported by the launcher: call it in scheduler processes only.

`register_idle_mrope(hook)` stands apart: that gap exists on CUDA as well.

Nothing in this package imports sglang; the caller passes in how to hook.
"""

import importlib.util
import sys

from sglang_macs.cpu_compat.environment import SITE_DIR, environment, shell_exports, threads_bind

__all__ = [
    "SITE_DIR",
    "allow_torchvision",
    "environment",
    "register",
    "register_idle_mrope",
    "shell_exports",
    "threads_bind",
]

_SHIM = "sglang_macs.cpu_compat.site_shim"


def allow_torchvision():
    """What `site/sitecustomize.py` does for torchvision, in this process. No effect once torchvision is imported."""
    if _SHIM in sys.modules or "torchvision" in sys.modules or _is_shim(sys.modules.get("sitecustomize")):
        return
    spec = importlib.util.spec_from_file_location(_SHIM, SITE_DIR / "sitecustomize.py")
    sys.modules[_SHIM] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[_SHIM])


def _is_shim(module):
    """True if `module` was loaded from `site/`."""
    return getattr(module, "HERE", None) == str(SITE_DIR)


def register(hook, define_missing):
    """Install every CPU gap filler. See `gaps.register`."""
    from sglang_macs.cpu_compat import gaps  # imports torch: not wanted by `python -m sglang_macs.cpu_compat`

    return gaps.register(hook, define_missing)


def register_idle_mrope(hook):
    """Install the one gap filler that CUDA needs too. See `gaps.register_idle_mrope`."""
    from sglang_macs.cpu_compat import gaps

    return gaps.register_idle_mrope(hook)
