"""Requests to change options, from SGLang's schedulers to `Control` and from rank to rank."""

from typing import Any

import torch

from .. import control
from ..console import say
from . import worker
from .hooks import Hook

EVERYONE_HAS = 1 << 40  # what a rank that is not there is taken to have received


def _local_tensor(original, self, *args, **kwargs):
    """AROUND MLPSyncBatchInfo._get_local_tensor: beside its tokens, how many requests this rank has received."""
    return _with(original(self, *args, **kwargs), worker.current().control.received)


def _fallback_tensor(original, self, *args, **kwargs):
    """AROUND MLPSyncBatchInfo._get_fallback_tensor: a rank that is not there holds nobody up."""
    return _with(original(self, *args, **kwargs), EVERYONE_HAS)


def _with(fields: torch.Tensor, last: int) -> torch.Tensor:
    return torch.cat([fields, fields.new_tensor([last])])


def _set_internal_state(original, self, recv_req) -> Any:
    """AROUND Scheduler.set_internal_state: MACS's options are ours, all others SGLang's."""
    ours = {name: value for name, value in recv_req.server_args.items() if control.is_ours(name)}
    if not ours:
        return original(self, recv_req)
    if len(ours) < len(recv_req.server_args):
        say("options stay as they are: a request changes MACS's options or SGLang's, not both")
        ours = dict(recv_req.server_args)  # refused, and counted
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    return SetInternalStateReqOutput(updated=worker.current().control.receive(ours))


_SYNC = "sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo"
HOOKS = (
    Hook("sglang.srt.managers.scheduler.Scheduler.set_internal_state", _set_internal_state, "around"),
    Hook(f"{_SYNC}._get_local_tensor", _local_tensor, "around"),
    Hook(f"{_SYNC}._get_fallback_tensor", _fallback_tensor, "around"),
)
