"""Stands in for Hugging Face's `datasets`, which `sglang.bench_serving` imports for a workload not used here."""


def load_dataset(*args, **kwargs):
    raise ModuleNotFoundError("this workload needs the real package: pip install datasets")
