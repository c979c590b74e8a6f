"""The gaps of SGLang's CPU path without AMX, one function and one table row each.

Written against `sglang/srt` of 0.5.21. Names: T tokens, K routes per token, H hidden. Kinds follow SGLang's hook
registry: an `around` function gets the original first, an `after` function gets the result first.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Gap:
    """One filler: where it goes, why it exists, and when it can be deleted."""

    target: str  # dotted path inside sglang
    value: Callable[..., Any]
    kind: str  # "around" | "after" | "missing" (defined only where absent)
    why: str
    until: str


def gathered_rows(original, self, output, input):
    """AROUND `GroupCoordinator._all_gather_into_tensor`: an `output` [N, rows, ...] is handed on as [N * rows, ...].

    The data-parallel LM head gathers the logits [rows, ...] of an attention-TP group of N into the former.
    """
    stacked = output.dim() > input.dim()
    return original(self, output.flatten(0, 1) if stacked else output, input)


def native_moe(original, layer, x, topk_output, moe_runner_config):
    """AROUND `moe_forward_native(layer, x [T, H], (weights [T, K], ids [T, K], logits), config) -> [T, H]`.

    The original counts routes with `scatter_(1, ids, 1)`: an id of -1 is out of range, an id repeated within a row is
    counted once (and the row lost), and 0 rows end in an empty cat. When any of these occurs, the valid routes are
    passed as rows of one route each with weight 1, and weighted and summed here in the original's own order and
    precision (float32 products, summed over K), so a row gets the same bits on either path.
    """
    weights, ids = topk_output[0], topk_output[1]
    if x.shape[0] and not _irregular(ids):
        return original(layer, x, topk_output, moe_runner_config)
    slots = (ids.reshape(-1) >= 0).nonzero().squeeze(1)  # [R] positions in the flattened [T * K]
    routed = weights.new_zeros((ids.numel(), x.shape[1]))
    if slots.numel():
        single = topk_output._replace(
            topk_weights=weights.new_ones((slots.numel(), 1)), topk_ids=ids.reshape(-1, 1)[slots]
        )
        rows = original(layer, x[slots // ids.shape[1]], single, moe_runner_config)
        routed[slots] = rows.to(weights.dtype) * weights.reshape(-1, 1)[slots]
    return routed.view(*ids.shape, x.shape[1]).sum(dim=1).to(x.dtype)


def _irregular(ids: torch.Tensor) -> bool:
    """True if `ids [T, K]` holds an empty slot or names an expert twice in one row."""
    ordered = ids.sort(dim=1).values
    return bool((ordered[:, :1] < 0).any() or (ordered[:, 1:] == ordered[:, :-1]).any())


def native_topk(
    original,
    self,
    hidden_states,
    router_logits,
    *,
    num_token_non_padded=None,
    expert_location_dispatch_info=None,
    **kwargs,
):
    """AROUND `TopK.forward_native`: after the top-k what the CUDA path does. Logical experts become physical ones,
    padded rows go nowhere (-1), and the recorder of the expert distribution counts what is left.

    `num_token_non_padded` is a scalar int tensor or None; rows from it on are padding. Only the standard output has
    `topk_ids`, and the native path yields no other.
    """
    topk = sys.modules["sglang.srt.layers.moe.topk"]
    recorder = topk.get_global_expert_distribution_recorder()
    with recorder.disable_this_region():
        output = original(self, hidden_states, router_logits, **kwargs)
    ids = topk.topk_ids_logical_to_physical(output.topk_ids, expert_location_dispatch_info)
    if num_token_non_padded is not None:
        row = torch.arange(ids.shape[0], device=ids.device)
        ids = ids.masked_fill((row >= num_token_non_padded).unsqueeze(1), -1)
    recorder.on_select_experts(topk_ids=ids)
    return output._replace(topk_ids=ids)


def nothing_cached() -> None:
    """`torch.cpu.empty_cache`: a CPU has no cache of memory to give back."""


def never_capturing() -> bool:
    """`torch.cpu.is_current_stream_capturing`: a CPU has no graphs."""
    return False


def captures_nothing(original) -> bool:
    """`torch.cuda.is_current_stream_capturing`, in place of `original`, which asks a driver that is not there."""
    return False


def padded_seq_len(self) -> int:
    """Length given to a padded sequence. 1, as in the AMX backend: attention over 0 keys has no softmax."""
    return 1


def idle_mrope_positions(result, self, model_runner, num_tokens, bs):
    """AFTER `ForwardBatch._pad_inputs_to_size`: zero positions `[3, rows]` for a batch that came without any.

    `ForwardBatch.init_new` returns early for an idle batch, before mrope positions are computed, and the padding
    extends only positions that exist. The model then indexes its rotary cache with None.
    """
    if self.mrope_positions is None and getattr(model_runner.model_config, "model_is_mrope", False):
        self.mrope_positions = self.positions.new_zeros((3, self.positions.shape[0]))


def plain_rope(
    original, head_size, rotary_dim, max_position, base, is_neox_style=True, rope_scaling=None, *, device=None, **kwargs
):
    """AROUND `get_rope_wrapper`: rotary embeddings without scaling are the same on every device.

    For "cpu" the original takes deepseek_yarn alone; for any other device it asks `get_rope`, which takes all.
    """
    device = device if rope_scaling is not None else None
    return original(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, device=device, **kwargs)


def absorbed_mla(original, cls, backend_name):
    """AROUND `AttentionBackendRegistry.get_handler`: under torch's attention, MLA works on the latent KV cache.

    The default is Triton's: a prefill without a prefix then attends to whole keys, which torch's attention reads from
    the cache, where latent ones are.
    """
    if backend_name != "torch_native":
        return original(cls, backend_name)
    method = sys.modules[cls.__module__].AttnForwardMethod.MLA
    return lambda attention, forward_batch: method


IDLE_MROPE = Gap(
    target="sglang.srt.model_executor.forward_batch_info.ForwardBatch._pad_inputs_to_size",
    value=idle_mrope_positions,
    kind="after",
    why="an idle data-parallel rank of an mrope model (Qwen-VL) has no positions; eager mode dies on it, on CUDA too",
    until="ForwardBatch.init_new sets mrope_positions for idle batches",
)

GAPS = (
    Gap(
        target="sglang.srt.distributed.parallel_state.GroupCoordinator._all_gather_into_tensor",
        value=gathered_rows,
        kind="around",
        why="attention-TP beside --enable-dp-lm-head gathers into a dimension for the ranks, which gloo refuses",
        until="gloo's all_gather_into_tensor takes any output of the right size, as NCCL's does",
    ),
    Gap(
        target="sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        value=native_moe,
        kind="around",
        why="dies on id -1 (remote routes under EP, padded rows), on 0 rows, and on an id repeated within a row",
        until="moe_forward_native counts routes with a bincount over valid ids",
    ),
    Gap(
        target="sglang.srt.layers.moe.topk.TopK.forward_native",
        value=native_topk,
        kind="around",
        why="select_experts asserts on the native path that no row is padded and no expert has moved; EP has both",
        until="those assertions in select_experts are gone, and it maps and masks ids on a CPU",
    ),
    Gap(
        target="torch.cpu.empty_cache",
        value=nothing_cached,
        kind="missing",
        why="EPLB calls it of whatever device there is, before it moves experts for the first time",
        until="torch.cpu has it, or EPLB asks",
    ),
    Gap(
        target="torch.cpu.is_current_stream_capturing",
        value=never_capturing,
        kind="missing",
        why="a recorder of the expert distribution that is not recording asks for it in every layer",
        until="torch.cpu has it, or the recorder asks",
    ),
    Gap(
        target="torch.cuda.is_current_stream_capturing",
        value=captures_nothing,
        kind="around",
        why="a CUDA build of torch is asked instead of torch.cpu, and dies where there is no driver",
        until="the recorder asks the device that serves",
    ),
    Gap(
        target="sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value",
        value=padded_seq_len,
        kind="missing",
        why="_pad_inputs_to_size asks the attention backend for it on CPU; only the AMX and hybrid backends answer",
        until="TorchNativeAttnBackend or its base class defines it",
    ),
    Gap(
        target="sglang.srt.layers.rotary_embedding.factory.get_rope_wrapper",
        value=plain_rope,
        kind="around",
        why="on CPU it takes deepseek_yarn alone: an MLA model without scaling (Kimi-VL) dies on an assertion",
        until="get_rope_cpu takes rope_scaling None",
    ),
    Gap(
        target="sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler",
        value=absorbed_mla,
        kind="around",
        why="MLA's prefill expects whole keys in the cache under torch's attention, and finds latent ones",
        until="torch_native has a handler of its own",
    ),
    IDLE_MROPE,
)


def register(hook: Callable[[str, Callable, str], Any], define_missing: Callable[[str, Any], Any]) -> tuple[str, ...]:
    """Install all of `GAPS`; returns the targets. Only in a process that is to import the model stack anyway.

    `hook(target, fn, kind)` wraps a function, `define_missing(target, value)` sets an attribute where there is none.
    """
    for gap in GAPS:
        if gap.kind == "missing":
            define_missing(gap.target, gap.value)
        else:
            hook(gap.target, gap.value, gap.kind)
    return tuple(gap.target for gap in GAPS)


def register_idle_mrope(hook: Callable[[str, Callable, str], Any]) -> tuple[str, ...]:
    """Install only `IDLE_MROPE`: for CUDA servers. Not together with `register`, which contains it."""
    hook(IDLE_MROPE.target, IDLE_MROPE.value, IDLE_MROPE.kind)
    return (IDLE_MROPE.target,)
