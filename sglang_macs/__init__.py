"""MACS for SGLang: bounded expert-parallel load for multimodal mixture-of-experts models. See docs/method.md."""

__version__ = "0.1.0"
