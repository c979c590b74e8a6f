"""Cases of the fused dispatch for a GPU: the sizes that matter, and random corners."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from . import fused_c as fc
from . import kernels_c as c
from .fused_case import FusedConfig, masked
from .kernel_case import Config

HIDDEN_SIZES = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)


def named(num_sms: int) -> list[FusedConfig]:
    """T = 1, 127, 128, 511 on 1, 2 and 8 ranks that share the GPU evenly; idle ranks; everything to one rank."""
    plan = Config(T=128, hot=1.5, visual=0.8)

    def split(tokens: tuple[int, ...], **changes) -> FusedConfig:
        own = {name: value for name, value in changes.items() if name in FusedConfig.__dataclass_fields__}
        policy = {name: value for name, value in changes.items() if name not in own}
        ranks = len(tokens)
        sized = replace(plan, R=ranks, T=max(*tokens, 1), **policy)
        return FusedConfig(sized, tokens, blocks=num_sms // ranks, **own)

    expert = {"scope": "expert", "load": "effective", "importance": "entropy", "reroute": "local"}
    return [
        *(split((tokens,), gamma=1.0, **expert) for tokens in (1, 127, 128, 511)),
        split((511,), H=7168, scope="expert", reroute="none", format="fp8_ue8m0"),
        *(split((tokens, tokens), format="fp8") for tokens in (1, 127, 128, 511)),
        masked(split((511, 0), H=7168, copies_outputs=True)),
        *(split((tokens,) * 8) for tokens in (1, 127, 511)),
        masked(split((128,) * 8, format="fp8_ue8m0", row_experts=True)),
        masked(split((128, 0, 1, 127, 0, 64, 128, 3), H=7168, format="fp8")),
        *(split((tokens, tokens), format="fp8", scales_with_rows=True) for tokens in (1, 127, 511)),
        masked(split((128, 0, 1, 127, 0, 64, 128, 3), H=7168, format="fp8", scales_with_rows=True)),
        masked(split((128,) * 8, format="fp8_ue8m0", scales_with_rows=True)),
        split((511,), H=7168, scope="expert", reroute="none", format="fp8_ue8m0", scales_with_rows=True),
        split((128,) * 8, hot=60.0, gamma=math.inf, format="fp8", scales_with_rows=True),
        split((0,) * 8, format="fp8", scales_with_rows=True),
        split((128,) * 8, hot=60.0),
        split((128,) * 8, hot=60.0, gamma=math.inf, copies_outputs=True),
        split((0,) * 8),
        split((128,) * 8, **expert),
        *(masked(split((tokens, tokens), carried=True)) for tokens in (1, 128, 511)),
        *(masked(split((tokens,), H=7168, format="fp8", carried=True)) for tokens in (1, 8, 128)),
        masked(split((128, 0, 1, 127, 0, 64, 128, 3), H=7168, format="fp8", scales_with_rows=True, carried=True)),
        masked(split((1023,), K=4, carried=True)),
        masked(split((128,) * 8, hot=60.0, copies_outputs=True, carried=True)),
        split((1023,), K=4, gamma=0.7, scope="expert", needs_entropy=False, importance="gate", delta=0.0),
    ]


def random_configs(count: int, seed: int, num_sms: int) -> list[FusedConfig]:
    """Small groups with any policy, shape and raggedness."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[int(rng.integers(len(values)))]  # noqa: E731
    configs = []
    for _ in range(count):
        e, r = pick((8, 2), (8, 8), (64, 1), (64, 4), (128, 8), (130, 10), (160, 8), (256, 16))
        most = pick(1, 3, 17, 40)
        delta = pick(0.0, 1.0, 3.0)
        plan = Config(
            T=most, H=pick(*HIDDEN_SIZES), E=e, R=r, K=pick(1, 2, 4, 6, 8, 8), bucket_bits=pick(1, 2, 3, 3, 4),
            ids_i64=pick(True, False), scope=pick(*c.SCOPES), load=pick(*c.LOADS), importance=pick(*c.IMPORTANCES),
            reroute=pick("none", "local", "global", "global"), scoring=pick(*c.SCORINGS),
            protect_text=pick(True, True, False), rounds=pick(0, 1, 4, 60), gamma=pick(0.3, 0.7, 1.0, 1.1, math.inf),
            rho=pick(0.0, 0.5, 1.9), alpha=pick(0.0, 1.0, 4.0), c_min=pick(0.0, 1.0, 3.0), delta=delta,
            num_segments=pick(1, 1, 3, 40), visual=pick(0.0, 0.5, 0.9, 1.0), empty=pick(0.0, 0.0, 0.3, 1.0),
            hot=pick(0.0, 1.0, 3.0, 60.0), grid=pick(0.0, 0.5), odd=pick(0.0, 0.0, 0.2), shuffled=pick(True, False),
        )  # fmt: skip
        tokens = tuple(int(rng.integers(0, most + 1)) for _ in range(r))
        config = FusedConfig(
            plan, tokens, blocks=max(1, pick(1, 2, num_sms // r)), format=pick(*fc.FORMATS),
            alignment=pick(1, 8, 128), needs_entropy=delta > 0, row_experts=pick(True, False),
            copies_outputs=pick(True, False), scales_with_rows=pick(True, False),
        )  # fmt: skip
        configs.append(pick(config, masked(config), masked(replace(config, carried=True))))
    return configs
