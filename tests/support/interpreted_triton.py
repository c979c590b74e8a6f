"""pytest plugin: the operators on CPU tensors are Triton's, interpreted.

`TRITON_INTERPRET=1 pytest -p support.interpreted_triton tests/test_ops.py` then tests them as it tests those in C++,
with fewer random cases and smaller blocks: loops over blocks take several steps on the small batches, too.
"""

import os

import torch
from hypothesis import settings

from reference import cases
from sglang_macs import ops
from sglang_macs.ops import triton as triton_ops

assert os.environ["TRITON_INTERPRET"] == "1"
library = triton_ops.register("CPU")
for operator in triton_ops.OPERATORS:
    registered = torch._C._dispatch_dump(f"{ops.library.loaded.name}::{operator.__name__}").splitlines()
    assert any(line.startswith("CPU: registered at") and "ops/triton" in line for line in registered)
for module, sizes in {
    triton_ops.entropy: {"ROW_BLOCK": 512, "TOKEN_BLOCK": 64},
    triton_ops.histogram: {"SLOT_BLOCK": 64},
    triton_ops.apply: {"BLOCK": 32, "PREFIX_BLOCK": 2, "TOKENS": 16},
    triton_ops.choose: {"BLOCK": 16, "PREFIX_BLOCK": 2},
}.items():
    for name, size in sizes.items():
        assert getattr(module, name) > size or name == "TOKENS"
        setattr(module, name, size)
cases.PROPERTY = settings(cases.PROPERTY, max_examples=6)
