"""Requests to change options, from SGLang's schedulers to `Control`; and what ranks tell each other before a pass:
whether they have exempt requests, and how many requests for other options they have received.
"""

from typing import Any

import torch

from .. import control
from ..console import say
from . import exempt, worker
from .hooks import Hook

EVERYONE_HAS = 1 << 40  # what a rank that is not there is taken to have received


def _local_tensor(original, self, *args, **kwargs):
    """AROUND MLPSyncBatchInfo._get_local_tensor: beside a rank's tokens, whether it has exempt requests, and how many
    requests for other options it has received.
    """
    return _with(original(self, *args, **kwargs), exempt.here(), worker.current().control.received)


def _fallback_tensor(original, self, *args, **kwargs):
    """AROUND MLPSyncBatchInfo._get_fallback_tensor: a rank that is not there holds nobody up."""
    return _with(original(self, *args, **kwargs), False, EVERYONE_HAS)


def _with(fields: torch.Tensor, *ours: int) -> torch.Tensor:
    return torch.cat([fields, fields.new_tensor(ours)])


def exempts_of(told: torch.Tensor) -> list[bool]:
    """Which ranks run exempt requests, of what the schedulers have told each other, [ranks, fields]."""
    return told[:, -2].bool().tolist()


def received_by_all(told: torch.Tensor) -> int:
    """How many requests for other options every rank has received."""
    return int(told[:, -1].min())


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
