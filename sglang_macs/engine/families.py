"""Which of SGLang's mixture-of-experts models MACS serves, with the evidence, and which it does not, and why.

SGLang has about eighty of them. Some sum over the ranks once more behind the dispatch, which changes answers and tells
nobody; so a model is served where a test has served it, and refused elsewhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """One family.

    cpu: the tests that serve it; "": SGLang's CPU path does not. shown: what they show it beside text.
    gpu: launches of benchmarks/gpu/serve_check.py that are recorded in docs/results, without a fault; none: on GPUs it
    is refused.
    """

    family: str
    cpu: str
    shown: str = ""
    gpu: tuple[str, ...] = ()


_BY_FAMILY, _FILMS = "tests/test_families.py", "pictures, a video"
SERVED = {
    "Qwen3VLMoeForConditionalGeneration": Served(
        "Qwen3-VL-MoE", _BY_FAMILY, _FILMS, ("2 ranks, normal", "2 ranks, 128 experts", "4 ranks, 128 experts")
    ),
    "Qwen3MoeForCausalLM": Served("Qwen3-MoE", _BY_FAMILY, gpu=("2 ranks, FP8 blocks", "2 ranks, two batches")),
    "InternVLChatModel": Served(
        "InternVL3.5 with Qwen3-MoE inside", _BY_FAMILY, _FILMS, ("2 ranks, InternVL3.5, one GPU",)
    ),
    "KimiVLForConditionalGeneration": Served("Kimi-VL", _BY_FAMILY, "pictures", ("2 ranks, Kimi-VL, one GPU",)),
    "Glm4vMoeForConditionalGeneration": Served(
        "GLM-4.5V, GLM-4.6V", _BY_FAMILY, _FILMS, ("2 ranks, GLM-4.5V, one GPU",)
    ),
    "Qwen3OmniMoeForConditionalGeneration": Served(
        "Qwen3-Omni, its thinker", _BY_FAMILY, f"{_FILMS}, a sound", ("2 ranks, Qwen3-Omni, one GPU",)
    ),
    "Qwen3_5MoeForConditionalGeneration": Served("Qwen3.5-MoE", ""),
    "DeepseekV3ForCausalLM": Served("DeepSeek-V3", _BY_FAMILY, gpu=("2 ranks, DeepSeek-V3, one GPU",)),
}

# Prefixes of architectures whose MoE layers reach no dispatcher or do not fit one, or that cannot keep ranks in step.
_SUMS = "it sums its MoE layers' outputs over the ranks once more, after the dispatch"
_SUMMING = ("Mixtral", "KimiLinear", "Ernie4_5_Moe", "HunYuanMoE", "Cohere2Moe", "GraniteMoe", "Olmoe", "PhiMoE")
REFUSED = {
    "Llama4": "it builds its MoE layers without a dispatcher",
    "GptOss": "SGLang has not implemented its dispatch",
    "Ernie4_5_VLMoe": "it branches per rank on whether a batch has images, which can deadlock a collective dispatch",
    **dict.fromkeys((*_SUMMING, "Grok1", "Lfm2Moe", "Gemma4"), _SUMS),
}

# Architectures whose vision tower sums over all ranks, and the flag with which it stays on one, if there is any.
TOWERS_OVER_ALL_RANKS = {"InternVLChat": None, "Glm4vMoe": "mm_enable_dp_encoder"}

_CHOOSES = ("InternVLChatModel",)  # whose language model is one of several classes


def does_not_fit(architecture: str, inner: str = "") -> str:
    """Why a model cannot be served at all, "" where nothing is known against it.

    inner: the architecture that its language model's configuration names; it counts where the class goes by it.
    """
    for one in _parts(architecture, inner):
        for prefix, reason in REFUSED.items():
            if one.startswith(prefix):
                return f"{one}: {reason}"
    return ""


def untested(architecture: str, inner: str, device: object) -> str:
    """Which part of a model no test has served on this device, in words; "" where all have been."""
    for one in _parts(architecture, inner):
        served = SERVED.get(one)
        if served is None or not (served.gpu if device == "cuda" else served.cpu):
            return f"{one} on a {'GPU' if device == 'cuda' else 'CPU'}" if served else one
    return ""


def _parts(architecture: str, inner: str) -> tuple[str, ...]:
    return (architecture, inner) if inner and architecture in _CHOOSES else (architecture,)


def served_table() -> str:
    """The families and what shows that they are served, in Markdown."""
    header = ["family", "CPU: stock", "CPU: infinite gamma", "CPU: gamma 1.0", "GPU: MACS off, infinite gamma, 1.0"]
    rows = [header, ["---"] * len(header)]
    for architecture, served in SERVED.items():
        text = f"text, {served.shown}" if served.shown else "text"
        cpu = [f"{shown}: `{served.cpu}`" for shown in ("text", text, "load")]
        gpu = ", ".join(f"`{launch}`" for launch in served.gpu)
        rows.append(
            [
                f"{served.family} (`{architecture}`)",
                *(cpu if served.cpu else ["refused: SGLang's CPU path does not serve it", "refused", "refused"]),
                gpu or "refused: not measured",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def refused_table() -> str:
    """Prefixes of architectures that are refused, by reason, in Markdown."""
    lines = ["| refused, whatever is asked for | why |", "| --- | --- |"]
    for reason in dict.fromkeys(REFUSED.values()):
        names = ", ".join(f"`{prefix}*`" for prefix, why in REFUSED.items() if why == reason)
        lines.append(f"| {names} | {reason} |")
    return "\n".join(lines)
