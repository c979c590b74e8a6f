"""One layer's inputs on the host and the kernels' poisoned outputs on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import kernels_c as c

POISON = 0x7F
POISON_WORD = int.from_bytes(bytes([POISON]) * 4, "little")


@dataclass(frozen=True)
class Config:
    """Sizes and policy of one case; the field names of docs/design/method.md."""

    T: int
    H: int = 2048
    E: int = 128
    K: int = 8
    R: int = 8
    bucket_bits: int = 3
    dtype: str = "bfloat16"
    ids_i64: bool = True
    scope: str = "rank"
    load: str = "rows"
    importance: str = "entropy_gate"
    reroute: str = "global"
    scoring: str = "softmax"
    protect_text: bool = True
    rounds: int = 4
    gamma: float = 1.1
    rho: float = 0.5
    alpha: float = 1.0
    c_min: float = 0.0
    delta: float = 1.0
    num_segments: int = 1
    visual: float = 1.0
    empty: float = 0.0  # share of empty slots
    hot: float = 1.0  # logit bonus of rank 0's experts: the imbalance
    grid: float = 0.0  # logits and gates rounded to this, for ties; 0 = not
    odd: float = 0.0  # share of logits that are not finite
    others: float = 0.0  # size of the group's other ranks' histogram, relative to the own one
    shuffled: bool = False  # segments in no order

    @property
    def buckets(self) -> int:
        return 16 << self.bucket_bits

    def policy(self, needs_entropy: bool = True) -> c.Policy:
        """What the launchers take. needs_entropy: decides in the fused dispatch alone."""
        named = ("bucket_bits", "scope", "load", "importance", "reroute", "scoring", "protect_text")
        own = {name: getattr(self, name) for name in (*named, "gamma", "rho", "alpha", "c_min", "delta")}
        sizes = {"num_experts": self.E, "num_ranks": self.R, "reroute_rounds": self.rounds}
        return c.policy(**own, **sizes, needs_entropy=needs_entropy)

    def sizes(self) -> dict[str, object]:
        sizes = {"T": self.T, "H": self.H, "E": self.E, "K": self.K, "R": self.R, "dtype": self.dtype}
        return sizes | {"scope": self.scope, "hot": self.hot}


@dataclass
class Inputs:
    hidden: torch.Tensor  # [T, H], on the host (or on the device for large cases)
    ids: np.ndarray
    gates: np.ndarray
    logits: np.ndarray
    segment: np.ndarray
    modality: np.ndarray
    other: np.ndarray | None  # histogram of the other ranks


def make_inputs(config: Config, seed: int, device: str = "cpu") -> Inputs:
    """Fresh random inputs: softmax routing with a hot rank 0, runs of visual tokens among text."""
    rng = np.random.default_rng(seed)
    t, e, k = config.T, config.E, config.K
    logits = rng.standard_normal((t, e)).astype(np.float32) * np.float32(1.5)
    logits[:, : e // config.R] += np.float32(config.hot)
    if config.grid:
        logits = np.round(logits / np.float32(config.grid)).astype(np.float32) * np.float32(config.grid)
    top = np.argpartition(-logits, k - 1, axis=1)[:, :k] if t else np.zeros((0, k), np.int64)
    z = np.exp(np.take_along_axis(logits, top, 1).astype(np.float64))
    gates = (z / z.sum(1, keepdims=True)).astype(np.float32)
    if config.grid:
        gates = np.maximum(np.round(gates * 16) / 16, 0).astype(np.float32)
    drop = rng.random((t, k)) < config.empty
    if config.empty >= 0.3 and t:
        drop[rng.random(t) < 0.3] = True  # whole tokens of padding
    ids = np.where(drop, -1, top).astype(np.int64)
    gates = np.where(drop, np.float32(0), gates).astype(np.float32)
    if config.odd:  # anywhere but at the token's own experts, whose logits the re-routed weights refer to
        own = np.zeros((t, e), bool)
        np.put_along_axis(own, top, True, 1)
        logits[(rng.random((t, e)) < config.odd) & ~own] = rng.choice([np.inf, -np.inf, np.nan])
        logits[(rng.random((t, e)) < config.odd) & ~own] = -0.0
    image = np.minimum(np.arange(t) * config.num_segments // max(t, 1), config.num_segments - 1)
    if config.shuffled:
        rng.shuffle(image)
    segment = np.where(rng.random(t) < config.visual, image, -1).astype(np.int32)
    generator = torch.Generator(device=device).manual_seed(seed)
    scale = torch.rand((t, 1), generator=generator, device=device) * 2.0 + 0.5
    hidden = torch.randn((t, config.H), generator=generator, device=device).mul_(scale).to(getattr(torch, config.dtype))
    other = None
    if config.others:
        size = config.E * 2 * config.buckets
        cells = (rng.random(size) < 0.1) * rng.integers(1, max(2, int(config.others * t * k / e / 4) + 2), size)
        n = int(cells.sum())
        other = np.concatenate([cells, [n, n // 2, n * 60, n * 200]]).astype(np.int64)
    modality = rng.integers(-1, 2, e).astype(np.int8)
    return Inputs(hidden, ids, gates, logits, segment, modality, other)


class Run:
    """Device buffers of a case; `separate` and `fused` run the plan, `outputs` brings it back."""

    def __init__(self, kernels: c.Kernels, config: Config, inputs: Inputs) -> None:
        self.kernels, self.config = kernels, config
        cells = config.E * 2 * config.buckets + 4
        bounds = config.E if config.scope == "expert" else config.R
        id_type = torch.int64 if config.ids_i64 else torch.int32
        self.hidden = inputs.hidden.cuda()
        self.segment = torch.from_numpy(inputs.segment).cuda()
        self.ids = torch.from_numpy(inputs.ids).to(id_type).cuda()
        self.gates = torch.from_numpy(inputs.gates).cuda()
        self.logits = torch.from_numpy(inputs.logits).cuda()
        self.modality = torch.from_numpy(inputs.modality).cuda()
        self.other = None if inputs.other is None else torch.from_numpy(inputs.other.astype(np.int32)).cuda()
        self.group = torch.empty(cells, dtype=torch.int32, device="cuda") if self.other is not None else None
        shapes = {
            "entropy": ((config.T,), torch.float32), "weight": ((config.T,), torch.float32),
            "histogram": ((cells,), torch.int32), "shift": ((config.E,), torch.int32),
            "cut": ((bounds, 4), torch.int32), "ids": ((config.T, config.K), id_type),
            "weights": ((config.T, config.K), torch.float32), "counts": ((3, config.E, 2), torch.int32),
        }  # fmt: skip
        self.out = {name: torch.empty(shape, dtype=kind, device="cuda") for name, (shape, kind) in shapes.items()}
        self._params()
        size = kernels.plan_workspace_bytes(self.weight_params, self.apply_params)
        self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.sums = torch.empty(size, dtype=torch.uint8, device="cuda")  # of `weigh`, which prepares nothing for others

    def _params(self) -> None:
        f, out = self.config, {name: tensor.data_ptr() for name, tensor in self.out.items()}
        segment = self.segment.data_ptr()
        self.score_params = c.EntropyScoreParams(
            self.hidden.data_ptr(), segment, out["entropy"], f.T, f.H, c.DTYPES.index(f.dtype)
        )
        self.weight_params = c.EntropyWeightParams(out["entropy"], segment, out["weight"], f.T, f.num_segments, f.delta)
        policy, routing = f.policy(), (self.ids.data_ptr(), self.gates.data_ptr(), out["weight"], segment)
        common = c.Assignments(*routing, f.T, f.K, f.ids_i64, policy)
        self.histogram_params = c.LoadHistogramParams(common, out["histogram"])
        group = out["histogram"] if self.group is None else self.group.data_ptr()
        self.threshold_params = c.ClipThresholdParams(
            out["histogram"], group, self.modality.data_ptr(), out["shift"], out["cut"], policy
        )
        self.apply_params = c.ClipApplyParams(
            common, self.logits.data_ptr(), out["shift"], out["cut"], out["ids"], out["weights"], out["counts"]
        )

    def poison(self) -> None:
        for tensor in (*self.out.values(), self.workspace, self.sums):
            tensor.view(torch.uint8).fill_(POISON) if tensor.numel() else None

    def score(self) -> None:
        self.kernels("entropy_score", self.score_params)

    def weigh(self) -> None:
        self.kernels("entropy_weight", self.weight_params, self.sums.data_ptr())

    def histogram(self) -> None:
        self.kernels("load_histogram", self.histogram_params)

    def exchange(self) -> None:
        if self.group is not None:
            torch.add(self.out["histogram"], self.other, out=self.group)

    def threshold(self) -> None:
        self.kernels("clip_threshold", self.threshold_params)

    def apply(self) -> None:
        self.kernels("clip_apply", self.apply_params, self.workspace.data_ptr())

    def score_histogram(self) -> None:
        workspace = self.workspace.data_ptr()
        self.kernels("score_histogram", self.score_params, self.weight_params, self.histogram_params, workspace)

    def threshold_apply(self) -> None:
        self.kernels("threshold_apply", self.threshold_params, self.apply_params, self.workspace.data_ptr())

    def separate(self) -> None:
        for step in (self.score, self.weigh, self.histogram, self.exchange, self.threshold, self.apply):
            step()

    def fused(self) -> None:
        for step in (self.score_histogram, self.exchange, self.threshold_apply):
            step()

    def outputs(self) -> dict[str, np.ndarray]:
        torch.cuda.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in self.out.items()}


def small_configs(count: int, seed: int) -> list[Config]:
    """Random corners: empty batches, one slot, odd E and H, ties, padding, few rows, no logits to trust."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[int(rng.integers(len(values)))]  # noqa: E731
    configs = []
    for i in range(count):
        e, r = pick((8, 2), (8, 8), (60, 4), (64, 1), (128, 8), (130, 10), (160, 8), (256, 16), (384, 4), (600, 8))
        configs.append(
            Config(
                T=0 if i == 0 else pick(1, 3, 17, 64, 128, 150, 300, 512),
                H=pick(8, 24, 100, 1024, 2048, 2048, 7168, 4100, 5120, 20000),
                E=e, R=r, K=pick(1, 2, 4, 6, 8), bucket_bits=pick(0, 1, 3, 3, 4),
                dtype=pick(*c.DTYPES), ids_i64=pick(True, False), scope=pick(*c.SCOPES), load=pick(*c.LOADS),
                importance=pick(*c.IMPORTANCES), reroute=pick("none", "local", "local", "global", "global"),
                scoring=pick(*c.SCORINGS), protect_text=pick(True, True, False), rounds=pick(0, 1, 2, 4, 8),
                gamma=pick(0.3, 0.7, 1.0, 1.1, 1.3, math.inf), rho=pick(0.0, 0.5, 1.9), alpha=pick(0.0, 0.5, 1.0, 4.0),
                c_min=pick(0.0, 1.0, 3.0), delta=pick(0.0, 1.0, 3.0), num_segments=pick(1, 1, 3, 40, 100),
                visual=pick(0.0, 0.5, 0.9, 1.0), empty=pick(0.0, 0.0, 0.3, 1.0), hot=pick(0.0, 1.0, 3.0),
                grid=pick(0.0, 0.5, 2.0), odd=pick(0.0, 0.0, 0.2), others=pick(0.0, 0.0, 1.0, 3.0),
                shuffled=pick(True, False),
            )
        )  # fmt: skip
    configs.append(replace(configs[-1], T=40, K=8, E=128, R=8, empty=1.0))
    configs.append(replace(configs[-1], T=40, K=32, empty=0.0, gamma=0.8, reroute="global"))
    return configs
