"""Runs at the start of every Python process that has this folder on PYTHONPATH: SGLang puts every rank on one GPU.

Device. SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS gives each scheduler the n-th device of CUDA_VISIBLE_DEVICES as its device
0. With one GPU there is no second one to give: every scheduler gets the first. The choice is made in the launcher or,
with dp-attention, in the data-parallel controller, where SGLang 0.5.21 loads no plugins; hence this file.
Can go when: SGLang takes a device list with repetitions.

Receiving. DeepEP's receiving kernels spin until their peers have sent. On GPUs of their own all ranks run; on one GPU a
peer's sending kernel may wait for the very SMs that the spinning one holds. Ranks therefore meet on the
host between sending and receiving, as benchmarks/gpu/straggler.py does. What is captured in a CUDA graph has no host to
meet on: there each rank's share of the SMs, which MPS gives it, has to do.

Pictures. SGLang's tokenizer process decodes JPEG on the GPU, and so becomes a client of MPS, too: the last that was
seen of three servers was each one's first picture on its way there. Here the CPU decodes. (Not tried since.)
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
from functools import wraps

CUDA = "sglang.srt.platforms.cuda"
COMMON = "sglang.srt.utils.common"
DEEPEP = "sglang.srt.layers.moe.token_dispatcher.deepep"


@contextlib.contextmanager
def _first_device(self, device_id):
    yield 0


def _use_first_device(module):
    own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == CUDA]
    owners = [kind for kind in own if "reindex_device_id" in vars(kind)]
    if not owners:
        raise ImportError(f"{CUDA}: reindex_device_id is gone; ranks cannot share a GPU this way any more")
    for owner in owners:
        owner.reindex_device_id = _first_device


def _meet():
    """Every rank has sent: its stream is done, and it is here."""
    import torch
    from sglang.srt.runtime_context import get_parallel

    if torch.cuda.is_current_stream_capturing():
        return
    torch.cuda.current_stream().synchronize()
    torch.distributed.barrier(group=get_parallel().tp_group.cpu_group)


def _met(receive):
    @wraps(receive)
    def met(*args, **kwargs):
        _meet()
        return receive(*args, **kwargs)

    return met


def _meet_before_receiving(module):
    owner = module._DeepEPDispatcherImplLowLatency
    for name in ("dispatch_b", "combine_b"):
        setattr(owner, name, _met(getattr(owner, name)))


def _decode_on_cpu(module):
    if not hasattr(module, "is_jpeg_with_cuda"):
        raise ImportError(f"{COMMON}: is_jpeg_with_cuda is gone; pictures are decoded on the GPU again")
    module.is_jpeg_with_cuda = lambda *args, **kwargs: False


class _Patch(importlib.abc.MetaPathFinder):
    """Finds `targets` as everybody does, and changes each when it has been executed."""

    def __init__(self, targets):
        self.targets = dict(targets)

    def find_spec(self, name, path=None, target=None):
        change = self.targets.pop(name, None)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Patch({CUDA: _use_first_device, DEEPEP: _meet_before_receiving, COMMON: _decode_on_cpu}))
