"""Stub of the submodule that SGLang's linear-attention layers import on CPU."""

from sgl_kernel import REASON
from sgl_kernel._stub import missing


def __getattr__(name):
    return missing(name, REASON)
