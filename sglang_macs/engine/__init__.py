"""MACS in SGLang: flags, hooks and refusals. The only package that imports sglang, and only in functions."""
