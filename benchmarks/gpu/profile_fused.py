"""Where the fused dispatch spends its cycles: the clock at its stages, from a build that writes it down.

    python3 -m benchmarks.gpu.profile_fused [--ranks R] [--tokens T] [--hidden H] [--format bfloat16|fp8]
                                         [--importance gate|entropy_gate] [--clipped SHARE ...] [--scales-with-rows]
    python3 -m benchmarks.gpu.profile_fused --decode   (and the sizes)

For every stage the median over launches of the median over blocks, and of the last block, in cycles since the block's
start. Stages that a launch does not reach (nothing to cut) are left out.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu.time_decode import decode_config
from benchmarks.gpu.time_fused import CLIPPED, GATE, SCORED, Layer, timed_config
from reference import kernels_c as c

# By the number of the stamp (csrc/cuda/fused_dispatch.cu).
STAGES = (
    "start", "assignments sent", "rows read, scored, cast", "assignments received (a warp)", "received and counted",
    "weights", "assignments sent again", "and received (a warp)", "and counted", "cuts found", "clipped", "re-routed",
    "held against the bounds", "rows per expert counted", "experts placed", "rows put", "rows signalled",
    "tokens written", "counts written", "sums and cuts written", "all rows here", "levels cut", "own cuts sent",
    "scales in their places",
)  # fmt: skip
ORDER = (1, 2, 3, 4, 5, 6, 7, 8, 12, 21, 22, 9, 10, 11, 13, 14, 15, 16, 23, 20, 17, 18, 19)  # as they are reached
# Of fused_carry.cu; the last one of the last block: all rows are here.
CARRY_STAGES = ("start", "ids counted", "counts sent, rows in shared memory", "rows put", "rows signalled", "ended")
LAUNCHES = 40


def stamps(layer: Layer) -> torch.Tensor:
    """[launches, blocks, stages] i64 cycles of rank 0."""
    taken = []
    for i in range(LAUNCHES):
        group = layer.groups[i % len(layer.groups)]
        group.part(0, "stamps", torch.int64, group.config.shape.num_blocks, len(STAGES)).zero_()
        group.dispatch()
        torch.cuda.synchronize()
        taken.append(group.part(0, "stamps", torch.int64, group.config.shape.num_blocks, len(STAGES)).clone())
    return torch.stack(taken[4:])


def show(title: str, found: torch.Tensor, stages: tuple[str, ...] = STAGES, order: tuple[int, ...] = ORDER) -> None:
    since = (found - found[..., :1]).double()
    print(f"{title}: cycles since the block's start, median block and last block")
    before = 0.0
    for i in order:
        reached = (found[..., i] > 0).any(dim=0).cpu()
        if not bool(reached.any()):
            continue
        of_blocks = since[:, reached, i]
        middle = float(of_blocks.median(dim=1).values.median())
        last = float(of_blocks.max(dim=1).values.median())
        print(f"  {stages[i]:34s} {middle:8.0f} (+{middle - before:6.0f})   last {last:8.0f}")
        before = middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--format", default="fp8")
    parser.add_argument("--decode", action="store_true", help="rows as they are routed: fused_carry")
    parser.add_argument("--importance", default=GATE, choices=(GATE, SCORED))
    parser.add_argument("--clipped", type=float, nargs="+", default=[0.0, CLIPPED])
    parser.add_argument("--scales-with-rows", action="store_true", help="FP8 as between devices")
    options = parser.parse_args()
    kernels = c.Kernels(("MACS_STAMPS=1",))
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    sizes = (options.ranks, options.tokens, options.hidden, options.format)
    if options.decode:
        config = decode_config(*sizes, num_sms // options.ranks, options.scales_with_rows)
        found = stamps(Layer(kernels, config))
        return show(f"{options.tokens} tokens as routed", found, CARRY_STAGES, tuple(range(1, len(CARRY_STAGES))))
    config = timed_config(*sizes, num_sms, options.importance, options.scales_with_rows)
    layer = Layer(kernels, config)
    for share in options.clipped:
        layer.clip(share)
        show(f"{options.importance}, {share:.0%} clipped", stamps(layer))


if __name__ == "__main__":
    main()
