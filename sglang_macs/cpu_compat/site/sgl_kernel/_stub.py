"""What the stub offers: schemas that SGLang looks up while modules are imported, and names that raise when called."""

import torch

# `torch.ops.sgl_kernel.X` read at module level by sglang when SGLANG_USE_CPU_ENGINE=1 (models/qwen3_5.py,
# models/qwen3_next.py, layers/attention/linear). Schemas only: there is no kernel behind them.
_LOOKED_UP_AT_IMPORT = (
    "fused_gdn_gating_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
)
_keep = []  # a Library withdraws its schemas when collected


def declare_schemas():
    """Make the operators above exist, except those that a half-loaded real package has registered already."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name in _LOOKED_UP_AT_IMPORT:
        if not hasattr(torch.ops.sgl_kernel, name):
            library.define(f"{name}(Tensor a, Tensor b) -> Tensor")
    _keep.append(library)


def missing(name, reason):
    """A callable for any public `name`; raises when called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this is the CPU stub without kernels (real package: {reason}). "
            "Install an sgl_kernel for this machine, or choose an SGLang option that does not need it."
        )

    absent.__name__ = name
    return absent
