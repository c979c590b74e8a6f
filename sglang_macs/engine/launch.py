"""A launch as the rules of compat.py see it, so that they can be tested without SGLang."""

import os
from dataclasses import dataclass
from typing import Any

from ..config import MacsConfig

V2 = "deepep_v2"
EXPERIMENTAL_ENV = "MACS_EXPERIMENTAL"  # names what is not fit for service and is to be tried nevertheless


@dataclass(frozen=True)
class Launch:
    """What the rules look at: SGLang's resolved flags, the plan's options and what the model's configuration says.

    top_k: 0 where it does not say; inner: the architecture of its language model, "" likewise.
    special_routing: `moe_config.special_routing`. context_length: in tokens.
    quantization: of the weights, by flag or checkpoint.
    """

    flags: Any
    config: MacsConfig
    architecture: str
    num_experts: int
    top_k: int = 0
    special_routing: str = ""
    context_length: int = 0
    quantization: str | None = None
    inner: str = ""

    def flag(self, name: str, default: object = None) -> Any:
        return getattr(self.flags, name, default)


def experimental(name: str) -> bool:
    """Whether the environment asks for what is not fit for service."""
    return name in os.environ.get(EXPERIMENTAL_ENV, "").split(",")


def attention_dp(launch: Launch) -> int:
    """Data-parallel ranks of the EP group's attention."""
    ranks = launch.flag("dp_size", 1) if launch.flag("enable_dp_attention") else 1
    return launch.flag("attn_dp_size") or ranks  # the former from 0.5.22 on


def largest_prefill(launch: Launch) -> tuple[int, int]:
    """(data-parallel ranks of the EP group, tokens that SGLang puts at most into a prefill batch of each).

    SGLang has divided --chunked-prefill-size by the ranks already; without chunks a request is not split.
    """
    ranks = attention_dp(launch)
    chunk = launch.flag("chunked_prefill_size") or -1
    return ranks, chunk if chunk > 0 else max(launch.flag("max_prefill_tokens") or 0, launch.context_length)


PARALLEL_FLAGS = (
    "tp_size",
    "dp_size",
    "ep_size",
    "pp_size",
    "attn_dp_size",
    "enable_dp_attention",
    "enable_dp_lm_head",
    "moe_dense_tp_size",
    "enable_two_batch_overlap",
    "enable_mixed_chunk",
)


def parallel_flags(flags: Any) -> str:
    """Those of a launch that say how ranks share their work, as they are set."""
    given = {name: getattr(flags, name, None) for name in PARALLEL_FLAGS}
    return " ".join(
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value not in (None, False)
    )
