"""What a scheduler process does after a pass, and while it is idle."""

from types import SimpleNamespace

import pytest

from sglang_macs.config import MacsConfig
from sglang_macs.engine import worker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its `now` is what the worker takes for the time."""
    stopped = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: stopped.now))
    return stopped


def test_an_idle_process_looks_at_its_kernels_now_and_then(clock: SimpleNamespace) -> None:
    """Each look copies from the GPU: an idle server that does it in every round keeps the GPU busy for nothing."""
    process, looks = worker.Worker(MacsConfig.from_preset("rank")), []
    process.transports = SimpleNamespace(check=lambda: looks.append(clock.now))

    for _ in range(5):
        process.tick()
    assert len(looks) == 5  # after every pass

    for _ in range(1000):
        clock.now += worker.IDLE_LOOK_SECONDS / 100
        process.tick(idle=True)
    assert 9 <= len(looks) - 5 <= 10  # of ten periods


def test_an_idle_process_still_raises_what_a_kernel_found(clock: SimpleNamespace) -> None:
    process = worker.Worker(MacsConfig.from_preset("rank"))

    def check() -> None:
        raise RuntimeError("rank 1 never sent its part of a sum")

    process.transports = SimpleNamespace(check=lambda: None)
    process.tick()
    process.transports = SimpleNamespace(check=check)
    clock.now += worker.IDLE_LOOK_SECONDS
    with pytest.raises(RuntimeError, match="rank 1 never sent"):
        process.tick(idle=True)
