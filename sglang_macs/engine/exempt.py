"""Requests that are exempt: nothing of theirs is clipped. A request asks for it in SGLang's custom parameters,
`{"macs": "off"}`; `--macs-exempt false` grants it to none.

Rows of exempt requests are left alone, as decoded ones are beside a prefill, and others make room for them. That
changes how a pass is planned and dispatched, so every rank must know that any of them has such a request. SGLang's
schedulers tell each other beside their tokens (set_state.py).
"""

from typing import Any

from ..console import say_once
from ..plan import batch
from . import worker
from .hooks import Hook

# Keys and values of other requests may have been moved by clipping: exempt ones share a prefix with each other alone.
PREFIX_CACHE = "macs-off/"

_here = False  # whether the batch that this rank tells the others of has an exempt request


def here() -> bool:
    """Of the batch that this rank tells the others of."""
    return _here


def _asks(sampling_params: Any) -> bool:
    custom = getattr(sampling_params, "custom_params", None)
    asked = custom.get("macs") if isinstance(custom, dict) else None
    if asked not in (None, "off"):
        say_once('a request\'s custom parameter "macs" is neither missing nor "off": it is served as any other')
    return asked == "off"


def _req_init(result, self, *args, **kwargs):
    """AFTER Req.__init__: whether it is exempt, and where in the prefix cache it belongs."""
    self.macs_exempt = worker.current().config.exempt and _asks(self.sampling_params)
    key = self.extra_key or ""
    if self.macs_exempt:
        self.extra_key = PREFIX_CACHE + key
    elif key.startswith(PREFIX_CACHE):  # a client's own, which must not lead there
        self.extra_key = "other/" + key


def _prepare_sync(original, local_batch, *args, **kwargs):
    """AROUND prepare_mlp_sync_batch_raw: the schedulers are about to tell each other of their next batches."""
    global _here
    _here = local_batch is not None and any(req.macs_exempt for req in local_batch.reqs or ())
    return original(local_batch, *args, **kwargs)


def spans_of(schedule_batch, forward_batch) -> tuple[tuple[int, int], ...]:
    """(start, end) token of each exempt request of one of SGLang's batches."""
    exempt = [getattr(req, "macs_exempt", False) for req in schedule_batch.reqs or ()]
    return batch.spans(exempt, lengths_of(schedule_batch, forward_batch)) if any(exempt) else ()


def lengths_of(schedule_batch, forward_batch) -> list[int]:
    """Tokens of each request of one of SGLang's batches."""
    mode, count = forward_batch.forward_mode, len(schedule_batch.reqs or ())
    if mode.is_extend() and not mode.is_target_verify():
        return schedule_batch.extend_lens[:count]
    each = getattr(forward_batch.spec_info, "draft_token_num", 1) if mode.is_target_verify() else 1
    return [each] * count


HOOKS = (
    Hook("sglang.srt.managers.schedule_batch.Req.__init__", _req_init, "after"),
    Hook("sglang.srt.managers.scheduler_components.dp_attn.prepare_mlp_sync_batch_raw", _prepare_sync, "around"),
)
