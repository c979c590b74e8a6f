"""A plugin of SGLang for benchmarks/e2e alone: sets where tokens are routed and how many a pass has; notes passes.

It stands beside any other plugin or none, and costs the same whatever is asked of it: the router's logits are replaced
by a slice of a table that is made when a layer first needs it. E2E_ROUTING holds {"routings": [...], "passes": FOLDER}.
A routing is "balanced" (every rank and expert gets as many rows as any other), or a list: for each layer the maximum
over mean of the ranks' rows, where the hot rank is another one in the next layer; 1 is uniform. POST
/set_internal_state with {"server_args": {"e2e_routing": i, "chunked_prefill_size": n}} chooses the i-th routing and at
most n tokens for a rank's pass. In FOLDER each scheduler process writes `passes-PID`: a line for every forward pass,
its start (ns of the monotonic clock, which processes of a machine share) and its tokens.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import torch

STEPS = 16  # halvings of the bias between its limits: a rank's share is then right to 0.0001
LOWEST, HIGHEST = -1.0, 12.0


class Routings:
    """Tables of router logits, by routing and layer; `chosen` is the routing in use."""

    def __init__(self, routings: list, rank: int, num_ranks: int) -> None:
        self.routings, self.rank, self.num_ranks, self.chosen = routings, rank, num_ranks, 0
        self._tables: dict[tuple[int, int], torch.Tensor] = {}

    def logits(self, layer: int, like: torch.Tensor, top_k: int) -> torch.Tensor:
        """Logits in the place of `like` [T, E]; with T = 0, `like` itself."""
        tokens = like.shape[0]
        table = self._tables.get((self.chosen, layer))
        if table is None or table.shape[0] < tokens:
            if not tokens:
                return like
            table = self._tables[self.chosen, layer] = self._made(layer, like, top_k)
        return table[:tokens]

    def _made(self, layer: int, like: torch.Tensor, top_k: int) -> torch.Tensor:
        """A table of at least T rows, of `like`'s type."""
        rows = 1 << max(8, (like.shape[0] - 1).bit_length())
        generator = torch.Generator(like.device).manual_seed(1000 * layer + self.rank)
        noise = torch.randn(rows, like.shape[1], generator=generator, device=like.device)
        routing = self.routings[self.chosen]
        if routing == "balanced":
            return balanced(noise, top_k).to(like.dtype)
        hot = layer % self.num_ranks
        return skewed(noise, routing[layer % len(routing)], hot, self.num_ranks, top_k, like.dtype)


def balanced(noise: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, E] f32: token t takes `top_k` experts at equal distances, from expert t on. Its gates differ."""
    tokens, experts = noise.shape
    first = torch.arange(tokens, device=noise.device).unsqueeze(1)
    ids = (first + torch.arange(top_k, device=noise.device) * (experts // top_k)) % experts
    return (noise / 16).scatter_add_(1, ids, noise.new_full(ids.shape, 4.0))


def skewed(
    noise: torch.Tensor, max_over_mean: float, hot: int, num_ranks: int, top_k: int, dtype: torch.dtype
) -> torch.Tensor:
    """[T, E]: `noise` with one rank's experts raised until they get `max_over_mean` times the mean of all ranks."""
    local = noise.shape[1] // num_ranks
    own = slice(hot * local, (hot + 1) * local)

    def raised(by: float) -> torch.Tensor:
        logits = noise.clone()
        logits[:, own] += by
        return logits.to(dtype)

    def share(by: float) -> float:
        ids = raised(by).float().topk(top_k).indices
        return float((ids // local == hot).float().mean())

    low, high = LOWEST, HIGHEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) * num_ranks < max_over_mean else (low, middle)
    return raised((low + high) / 2)


# ---- In the scheduler's processes ----------------------------------------------------------------------------------


class Process:
    """What this scheduler process holds."""

    def __init__(self) -> None:
        self.settings = json.loads(os.environ["E2E_ROUTING"])
        self.routings: Routings | None = None
        self.passes = os.open(f"{self.settings['passes']}/passes-{os.getpid()}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def routed(self) -> Routings:
        if self.routings is None:  # the groups exist once the model is built
            from sglang.srt.runtime_context import get_parallel

            parallel = get_parallel()
            self.routings = Routings(self.settings["routings"], parallel.moe_ep_rank, parallel.moe_ep_size)
        return self.routings

    def select_experts(self, original, hidden_states, router_logits, topk_config, *, layer_id=None, **kwargs):
        """AROUND select_experts."""
        logits = self.routed().logits(layer_id or 0, router_logits, topk_config.top_k)
        return original(hidden_states, logits, topk_config, layer_id=layer_id, **kwargs)

    def forward(self, model_runner, forward_batch, *args, **kwargs) -> None:
        """BEFORE ModelRunner.forward."""
        tokens = forward_batch.extend_num_tokens or 0
        os.write(self.passes, b"%d %d\n" % (time.perf_counter_ns(), tokens))

    def set_internal_state(self, original, scheduler, request):
        """AROUND Scheduler.set_internal_state."""
        if "e2e_routing" not in request.server_args:
            return original(scheduler, request)
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        self.routed().chosen = int(request.server_args["e2e_routing"])
        scheduler.chunked_prefill_size = int(request.server_args["chunked_prefill_size"])
        return SetInternalStateReqOutput(updated=True)


def idle_mrope_positions(result, forward_batch, model_runner, num_tokens, bs) -> None:
    """AFTER ForwardBatch._pad_inputs_to_size: SGLang 0.5.21 dies on a Qwen-VL rank that has no tokens in a pass."""
    if forward_batch.mrope_positions is None and getattr(model_runner.model_config, "model_is_mrope", False):
        forward_batch.mrope_positions = forward_batch.positions.new_zeros((3, forward_batch.positions.shape[0]))


def register() -> None:
    """Entry point; the launcher must not import the model stack, which applying the hooks would do."""
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    faulthandler.register(signal.SIGUSR1)  # of all threads, into the log: standstill.py asks
    process = Process()

    def hook(target: str, function: Callable, kind: str) -> None:
        HookRegistry.register(f"sglang.srt.{target}", function, HookType(kind))

    hook("layers.moe.topk.select_experts", process.select_experts, "around")
    hook("model_executor.model_runner.ModelRunner.forward", process.forward, "before")
    hook("managers.scheduler.Scheduler.set_internal_state", process.set_internal_state, "around")
    hook("model_executor.forward_batch_info.ForwardBatch._pad_inputs_to_size", idle_mrope_positions, "after")
