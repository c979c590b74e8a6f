"""Runs at the start of every Python process that has this folder on PYTHONPATH: SGLang puts every rank on one GPU.

Why: SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS gives each scheduler the n-th device of CUDA_VISIBLE_DEVICES as its device 0.
With one GPU there is no second one to give: every scheduler gets the first. The choice is made in the launcher or, with
dp-attention, in the data-parallel controller, where SGLang 0.5.21 loads no plugins; hence this file.
Can go when: SGLang takes a device list with repetitions.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys

TARGET = "sglang.srt.platforms.cuda"


@contextlib.contextmanager
def _first_device(self, device_id):
    yield 0


class _Patch(importlib.abc.MetaPathFinder):
    """Finds TARGET as everybody does, and changes it when it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == TARGET]
            owners = [kind for kind in own if "reindex_device_id" in vars(kind)]
            if not owners:
                raise ImportError(f"{TARGET}: reindex_device_id is gone; ranks cannot share a GPU this way any more")
            for owner in owners:
                owner.reindex_device_id = _first_device

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Patch())
