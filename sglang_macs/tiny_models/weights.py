"""The weights of a tiny checkpoint: random, but not blindly so. The package's docstring says what they must show.

Each tensor is drawn from a generator seeded by (seed, its name): same seed, same bits, whatever the order of creation.
"""

import math
import re
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch

# Root mean square of what each part adds to the residual stream; embeddings count 1. See the package's docstring.
ATTENTION_GAIN = 0.7
EXPERT_GAIN = 0.7
MOOD = 4.0  # weight of the direction by which the context chooses between a word's two successors
# Standard deviation of router logits. With 3, top-4 weights are about 0.7, 0.2, 0.07, 0.03. With 1.5 the fourth gets
# 0.1, and bfloat16, which swaps the fourth and fifth expert of some tokens in a hundred, then changes the answer.
ROUTER_GAIN = 3.0
SIGMOID_GAIN = 1.0  # the same before a sigmoid, which would bring all of the best to 1 otherwise
CORRECTION_BIAS = "e_score_correction_bias"
BIAS_SPREAD = 0.05  # standard deviation of a router's correction bias: it decides for some tokens, not for all
VISUAL_PULL = 0.8  # shift of a visual token's router logits: up for the first half of the experts, down for the second


def empty(kind, config):
    """A model without values: `initialise` sets every tensor, and transformers would draw them all before."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return kind(config)


def tensors_of(model) -> dict[str, torch.Tensor]:
    """What a checkpoint of `model` holds, by name: parameters, and routers' correction biases, which are buffers."""
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(CORRECTION_BIAS)}
    return dict(model.named_parameters()) | biases


def initialise(
    tensors: dict[str, torch.Tensor], words: range, seed: int, *, visual: str = "", pull: float = VISUAL_PULL
) -> None:
    """Set every one of `tensors`, in place.

    words: the ids that the model may generate.
    visual: regular expression for the last biases on the way from the vision tower to the language model, "" where
    there is none. They tell visual tokens from text, and the routers see it (`pull`).
    """
    router_gain = SIGMOID_GAIN if any(name.endswith(CORRECTION_BIAS) for name in tensors) else ROUTER_GAIN
    with ThreadPoolExecutor() as pool:  # a generator draws on one thread; every tensor has its own
        values = pool.map(lambda item: _draw(*item, seed, router_gain), tensors.items())
        for tensor, value in zip(tensors.values(), values, strict=True):
            tensor.data = value
    embed = _one(tensors, "embed_tokens.weight")
    if visual:
        _pull_visual_tokens(tensors, embed, visual, pull, seed)
    _map_to_successors(embed, _one(tensors, "lm_head.weight"), words, seed)


def _one(tensors: dict[str, torch.Tensor], suffix: str) -> torch.Tensor:
    """The only tensor whose name ends in `suffix`."""
    found = [name for name in tensors if name.endswith(suffix)]
    if len(found) != 1:
        raise KeyError(f"tiny model: expected one tensor ending in {suffix!r}, got {found}; was it renamed?")
    return tensors[found[0]]


def _generator(seed: int, name: str) -> torch.Generator:
    """CPU generator for one tensor."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _draw(name: str, parameter: torch.Tensor, seed: int, router_gain: float) -> torch.Tensor:
    """Initial value of one tensor: norms 1, biases 0, others normal with unit output times the part's gain."""
    if name.endswith(CORRECTION_BIAS):
        return BIAS_SPREAD * torch.randn(parameter.shape, generator=_generator(seed, name))
    if parameter.ndim == 1:
        return torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
    value = torch.randn(parameter.shape, generator=_generator(seed, name))
    if name.endswith(("embed_tokens.weight", "pos_embed.weight")):
        return value
    # Expert tensors are [E, out, in]; convolutions [out, ...in], of more dimensions; all others [out, in].
    fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 3 else parameter.shape[-1]
    return value.mul_(_gain(name, router_gain) / math.sqrt(fan_in))


def _gain(name: str, router_gain: float) -> float:
    """Output scale of a weight matrix by its role."""
    if name.endswith("o_proj.weight"):
        return ATTENTION_GAIN
    if "experts" in name and "down_proj" in name:
        return 2.0 * EXPERT_GAIN  # silu(gate) * up of unit normals has a root mean square of about 0.5
    if name.endswith("mlp.gate.weight"):
        return router_gain
    return 1.0


def _pull_visual_tokens(
    tensors: dict[str, torch.Tensor], embed: torch.Tensor, visual: str, pull: float, seed: int
) -> None:
    """Give visual tokens a common direction `u [H]`, text none of it, and let the routers see it.

    The biases that `visual` names add `u` times sqrt(H), i.e. unit root mean square, to every visual token and every
    deepstack addition. A router row of the first half of the experts then gains about `pull` on visual tokens, one of
    the second half loses as much.
    """
    hidden = embed.shape[1]
    u = torch.randn(hidden, generator=_generator(seed, "visual direction"))
    u /= u.norm()
    embed.data -= embed.data @ u[:, None] * u
    biases = [name for name in tensors if re.search(visual, name)]
    if not biases:
        raise KeyError(f"tiny model: expected a tensor like {visual!r}, got none; was it renamed?")
    for name in biases:
        tensors[name].data = u * math.sqrt(hidden)
    for name, parameter in tensors.items():
        if name.endswith("mlp.gate.weight"):
            half = parameter.shape[0] // 2
            side = torch.cat([torch.ones(half), -torch.ones(half)])
            parameter.data -= parameter.data @ u[:, None] * u
            parameter.data += pull / math.sqrt(hidden) * side[:, None] * u


def _map_to_successors(embed: torch.Tensor, head: torch.Tensor, words: range, seed: int) -> None:
    """Set the output layer so that every word has two possible successors, and the context decides between them.

    Half of the words have `+MOOD * d [H]` in their row, the others `-MOOD * d`. Embeddings have no part along `d`:
    its sign comes from attention and experts alone. Each half covers all words: a row is the sum of two embeddings.
    All other rows are 0: no special token is ever generated, so an answer always has the requested length.
    """
    hidden = embed.shape[1]
    d = torch.randn(hidden, generator=_generator(seed, "mood direction"))
    d /= d.norm()
    embed.data -= embed.data @ d[:, None] * d
    half = len(words) // 2
    order = words.start + torch.randperm(2 * half, generator=_generator(seed, "successor"))
    head.data.zero_()
    for sign, rows in ((1.0, order[:half]), (-1.0, order[half:])):
        before = words.start + torch.randperm(2 * half, generator=_generator(seed, f"predecessors {sign}"))
        pair = embed.data[before[:half]] + embed.data[before[half:]]
        head.data[rows] = pair / math.sqrt(hidden) + sign * MOOD * d
