"""Fixtures shared by the tests: tiny models, built once into build/models, and transformers' answers for them."""

import os
from pathlib import Path

import pytest

# Before torch is imported, and for every process that tests start. Threads spin while they wait for each other: next to
# a server of two ranks on two cores that doubles a test's time, next to other work it is fifty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "models"
LOGS = ROOT / "build" / "logs"


def _model(kind: str, folder: str) -> Path:
    from sglang_macs import tiny_models

    return tiny_models.ensure(MODELS / folder, kind)


@pytest.fixture(scope="session")
def vl_model() -> Path:
    """Qwen3-VL-MoE: 3 layers, 16 experts, top-4; rebuilt when sglang_macs/tiny_models changed."""
    return _model("qwen3_vl_moe", "tiny-qwen3-vl-moe")


@pytest.fixture(scope="session")
def text_model() -> Path:
    """Qwen3-MoE of the same size."""
    return _model("qwen3_moe", "tiny-qwen3-moe")


@pytest.fixture(scope="session")
def vl_reference(vl_model):
    """transformers' greedy answers for the VL model, cached for the session."""
    from tests.support.reference import Reference

    return Reference(vl_model)


@pytest.fixture(scope="session")
def text_reference(text_model):
    """transformers' greedy answers for the text model, cached for the session."""
    from tests.support.reference import Reference

    return Reference(text_model)


@pytest.fixture
def server_log(request) -> Path:
    """Where a test's server writes: build/logs/TEST.log, kept for reading after a failure."""
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS / f"{request.node.name.replace('/', '_')}.log"
