"""Launches as the rules see them."""

from types import SimpleNamespace

from sglang_macs.config import MacsConfig
from sglang_macs.engine.launch import Launch

GOOD = {"tp_size": 2, "ep_size": 2}


def launch(architecture: str = "Qwen3VLMoeForConditionalGeneration", num_experts: int = 16, **flags: object) -> Launch:
    """One that is taken, with other flags."""
    return Launch(SimpleNamespace(**{**GOOD, **flags}), MacsConfig.from_preset(), architecture, num_experts)
