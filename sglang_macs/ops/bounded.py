"""Received tokens to their experts' rows and back, uncounted (docs/design/bounded.md)."""

from torch import Tensor

from .library import loaded


def bounded_workspace_size(num_tokens: int, num_experts: int) -> int:
    """Numbers of scratch that `bounded_permute` needs for `num_tokens` tokens and `num_experts` experts of a rank."""
    return loaded.bounded_workspace_size(num_tokens, num_experts)


def bounded_permute(
    topk_ids: Tensor,
    tokens: Tensor,
    scales: Tensor | None,
    num_experts: int,
    tile: int,
    place: Tensor,
    expert_end: Tensor,
    rows: Tensor,
    row_scales: Tensor | None,
    workspace: Tensor,
    lost: Tensor,
) -> None:
    """Received tokens into rows by expert: each expert begins at a multiple of `tile`, its rows in the order of tokens.

    Args:
        topk_ids: [N, K] i64, experts of this rank from 0 to num_experts - 1, negative = none.
        tokens: [N, H], a row of 16 bytes or a multiple; scales: [N, S] f32 or None.
        place: [N, K] i32 out, row of each assignment; -1: none, -2: lost.
        expert_end: [num_experts] i32 out, behind the last row of each expert.
        rows: [M, H] out; row_scales: [S, M] f32 out, with scales. Rows that only fill a tile up are left as they are.
        workspace: [bounded_workspace_size] i32.
        lost: [1] i32, to which assignments are added that have no row: the buffer is full, there is no such expert, or
            the token names it twice.
    Source: csrc/include/macs/bounded.h.
    """
    loaded.bounded_permute(
        topk_ids, tokens, scales, num_experts, tile, place, expert_end, rows, row_scales, workspace, lost
    )


def bounded_gather(outputs: Tensor, place: Tensor, weights: Tensor, tokens: Tensor) -> None:
    """Each token's sum of weight times output, in f32 in the order of its slots, rounded once.

    Args:
        outputs: [M, H] bf16; place: [N, K] i32 of `bounded_permute`; weights: [N, K] f32.
        tokens: [N, H] bf16 out; a token with no assignment here is left as it is.
    Source: csrc/include/macs/bounded.h.
    """
    loaded.bounded_gather(outputs, place, weights, tokens)
