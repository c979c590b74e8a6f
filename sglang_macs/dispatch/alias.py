"""A tensor's memory under another name, which does not keep it."""

from __future__ import annotations

import torch
from torch import Tensor


def alias(tensor: Tensor, rows: int | None = None) -> Tensor:
    """The memory of `tensor`; whoever uses it must know that it is still there. rows: as if its first dimension were so
    long, which it need not be.
    """
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    last = sum((size - 1) * stride for size, stride in zip(shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size()
    # torch has no public way to make a storage of an address.
    storage = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), tensor.device, size)
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, shape, tensor.stride())
