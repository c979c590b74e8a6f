"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, so that rare directions move like frequent
ones. It was taken for the tasks that bind a question to a place; what it is worth beside the other changes was not
measured apart.

All steps are fixed in shape and stay on the device, so that they fit into a CUDA graph.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned by Muon's authors for a steep start


class Muon(torch.optim.Optimizer):
    """For weight matrices [out, in], stacks of them [E, out, in] and convolutions [out, ...]; torch.optim.Muon takes
    single matrices alone.

    An entry's step has the root mean square of AdamW's, 0.2 (Liu et al. 2025, "Muon is scalable"), so both take the
    same `lr`, a float or a 0-dim tensor.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(_as_matrices(p).shape[1:], []).append(p)
            for same in by_shape.values():
                self._step_of_one_shape(same, group)

    def _step_of_one_shape(self, params: list[nn.Parameter], group: dict) -> None:
        """All matrices of one shape at once: few large products instead of many small ones."""
        updates = [_as_matrices(self._momentum(p, group["momentum"])) for p in params]
        orthogonal = orthogonalised(torch.cat(updates))
        rate = 0.2 * max(orthogonal.shape[1:]) ** 0.5 * group["lr"]
        parts = orthogonal.split([len(u) for u in updates])
        for p, part in zip(params, parts, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(part.view_as(p) * rate)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[p]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(p)
        state["mean"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["mean"], momentum)  # Nesterov's


def _as_matrices(x: Tensor) -> Tensor:
    """[n, out, in]."""
    return x.flatten(1)[None] if x.ndim != 3 else x


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, a, b] -> [n, a, b]: the nearest (semi-)orthogonal matrix of each, roughly: singular values of 0.7 to 1.2."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
