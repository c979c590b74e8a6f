"""The emulator of tools/emulator: what CUDA promises holds, and planted faults are found and named."""

from __future__ import annotations

import pytest
import torch

from tests.support import emulated

pytestmark = pytest.mark.emulated
THREADS, WARP = 128, 32
SEEDS = range(20)


@pytest.fixture(scope="module")
def examples() -> emulated.Library:
    return emulated.build("examples", emulated.EMULATOR / "examples.cu")


@pytest.fixture(autouse=True)
def schedule(examples):
    """Every test starts from the same schedule."""
    examples.configure()


def numbers(n: int, low: int = -5, high: int = 6) -> torch.Tensor:
    return torch.randint(low, high, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(n))


def grid_state() -> torch.Tensor:
    """A GridState, aligned to 256 bytes as device memory is."""
    words = torch.zeros(128, dtype=torch.int32)
    first = -words.data_ptr() % 256 // 4
    return words[first : first + 64]


def block_sums(library: emulated.Library, variant: int = 0, blocks: int = 3) -> tuple[list[int], list[int]]:
    """What the kernel adds up, and the truth."""
    values = numbers(blocks * THREADS)
    out = torch.full((blocks,), 10**6, dtype=torch.int32)
    library("run_block_sum", values, out, blocks, variant)
    return out.tolist(), values.view(blocks, THREADS).sum(1).tolist()


@pytest.mark.parametrize("order", ["random", "round_robin"])
def test_blocks_have_their_own_shared_memory_and_barriers(examples, order):
    for seed in SEEDS:
        examples.configure(seed, order)
        got, want = block_sums(examples)
        assert got == want


def test_the_same_seed_is_the_same_run(examples):
    steps = []
    for seed in (1, 1, 2):
        examples.configure(seed)
        before = examples.steps
        block_sums(examples)
        steps.append(examples.steps - before)
    assert steps[0] == steps[1]


def test_some_schedule_shows_a_missing_barrier(examples):
    wrong = 0
    for seed in SEEDS:
        examples.configure(seed)
        got, want = block_sums(examples, variant=1)
        wrong += got != want
    assert wrong > len(SEEDS) // 2


def test_collectives(examples):
    values = numbers(THREADS)
    out = torch.empty(7, THREADS, dtype=torch.int32)
    examples("run_collectives", values, out)
    for thread in range(THREADS):
        first, lane = thread // WARP * WARP, thread % WARP
        warp = values[first : first + WARP].tolist()
        peers = [i for i in range(WARP) if i % 2 == lane % 2]
        mine = warp[lane]
        want = [
            warp[lane ^ 2],
            warp[lane - 1] if lane % 8 else mine,
            sum(1 << i for i in peers if warp[i] > 0),
            sum(1 << i for i in peers if warp[i] == mine),
            sum(warp[i] for i in peers),
            max(warp[i] for i in peers),
            int((values > 0).sum()),
        ]
        assert [x & 0xFFFFFFFF for x in out[:, thread].tolist()] == [x & 0xFFFFFFFF for x in want]


@pytest.mark.parametrize("seed", range(5))
def test_grid_barrier(examples, seed):
    examples.configure(seed)
    blocks = 6
    values, state = numbers(blocks), grid_state()
    out = torch.empty(3, blocks, dtype=torch.int32)
    examples("run_grid_exchange", values, out, state, blocks)
    total = int(values.sum())
    assert out.tolist() == [values.tolist(), [total] * blocks, [total * blocks] * blocks]
    words = state.view(torch.int32)
    assert words[2] == 1 and words.count_nonzero() == 1, "all is zero again but the number of launches"


class Peers:
    """Two ranks of the example, as two streams."""

    def __init__(self, library: emulated.Library) -> None:
        self.library = library
        self.flags = torch.zeros(2, dtype=torch.int32)
        self.data = torch.full((2, THREADS), -7, dtype=torch.int32)
        self.out = torch.full((2, THREADS), -9, dtype=torch.int32)
        self.fault = torch.full((2,), -9, dtype=torch.int32)

    def run(self, *ranks: int, variant: int = 0, timeout_ns: int = 10**9) -> None:
        with self.library.together():
            for rank in ranks:
                self.library(
                    "run_peer_exchange",
                    *(self.flags, self.data, self.out, self.fault, rank, variant, timeout_ns),
                    stream=rank + 1,
                )

    def correct(self) -> bool:
        sent = torch.arange(THREADS, dtype=torch.int32)
        return torch.equal(self.out, torch.stack([100 + sent, sent]))


def test_ranks_exchange_through_flags(examples):
    for seed in SEEDS:
        examples.configure(seed)
        peers = Peers(examples)
        peers.run(0, 1)
        assert peers.correct()
        assert peers.fault.tolist() == [0, 0]


def test_some_schedule_shows_a_flag_before_its_data(examples):
    wrong = 0
    for seed in SEEDS:
        examples.configure(seed)
        peers = Peers(examples)
        peers.run(0, 1, variant=1)
        wrong += not peers.correct()
    assert wrong > 0


@pytest.mark.parametrize("timeout_ns", [10**6, 100 * 10**9])
def test_a_dead_rank_is_timed_out(examples, timeout_ns):
    peers, before, steps = Peers(examples), examples.now_ns, examples.steps
    peers.run(1, timeout_ns=timeout_ns)
    assert peers.fault.tolist() == [-9, 1]
    assert timeout_ns <= examples.now_ns - before < 2 * timeout_ns + 10**8
    assert examples.steps - steps < 10**5


def test_waiting_without_end_is_reported(examples):
    report = r"livelock(.|\n)*PeerArguments(.|\n)*load_acquire_sys at examples.cu:\d+: threads 0\n"
    with pytest.raises(emulated.Failure, match=report):
        Peers(examples).run(0, variant=2)


@pytest.mark.parametrize(
    ("variant", "report"),
    [
        (0, r"deadlock(.|\n)*wait in __syncthreads at examples.cu:\d+: threads 1-31(.|\n)*wait in __syncwarp"),
        (1, r"divergent warp: lanes in \S+ and in \S+ wait for each other"),
        (2, r"has returned while others wait|__reduce_add_sync waits for lanes that have returned: 0x00000020"),
        (3, r"divergent block: __syncthreads, while others wait in __syncthreads at examples.cu:"),
        (4, r"__shfl_sync reads a lane that the mask does not name"),
        (5, r"__trap"),
    ],
)
def test_misuse_is_reported(examples, variant, report):
    out = torch.zeros(THREADS, dtype=torch.int32)
    for seed in range(5):
        examples.configure(seed)
        with pytest.raises(emulated.Failure, match=report) as caught:
            examples("run_misuse", out, variant)
        assert caught.value.code == 719
    assert block_sums(examples)[0] == block_sums(examples)[1], "a failure leaves nothing behind"


def appended(library: emulated.Library, variant: int) -> list[int]:
    """Three launches in a row, each of which may start before the last has ended."""
    digits, out = torch.tensor([1, 2, 3], dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    with library.together():
        for digit in digits.split(1):
            library("run_append_digit", digit, out, variant)
    return out.tolist()


def test_dependent_launches_wait_for_the_one_before(examples):
    for seed in SEEDS:
        examples.configure(seed)
        assert appended(examples, 0) == [123] * THREADS


def test_some_schedule_shows_a_launch_that_does_not_wait(examples):
    wrong = 0
    for seed in SEEDS:
        examples.configure(seed)
        wrong += appended(examples, 1) != [123] * THREADS
    assert wrong > 0


@pytest.mark.parametrize(("blocks", "cluster"), [(1, 1), (4, 4), (6, 2), (16, 8)])
def test_clusters_reach_each_other(examples, blocks, cluster):
    values, out = numbers(blocks), torch.empty(blocks, dtype=torch.int32)
    for seed in range(3):
        examples.configure(seed)
        examples("run_cluster_sum", values, out, blocks, cluster)
        assert torch.equal(out.view(-1, cluster), values.view(-1, cluster).sum(1, True).expand(-1, cluster).int())


def test_a_launch_that_a_device_would_refuse_is_refused(examples):
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(emulated.Failure, match="refused before the launch"):
        examples("run_cluster_sum", out, out, 16, 16)


# ---- Races ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched() -> emulated.Library:
    """The same kernels, every access watched."""
    return emulated.build("examples_watched", emulated.EMULATOR / "examples.cu", races=True)


def reverse(library: emulated.Library, variant: int) -> None:
    values, out = numbers(THREADS), torch.empty(THREADS, dtype=torch.int32)
    library("run_reverse", values, out, variant)
    assert torch.equal(out, values.view(-1, WARP).flip(1).flatten())


def grid_exchange(library: emulated.Library) -> None:
    library("run_grid_exchange", numbers(6), torch.empty(3, 6, dtype=torch.int32), grid_state(), 6)


ORDERED = {
    "block_sum": block_sums,
    "grid_exchange": grid_exchange,
    "peers": lambda library: Peers(library).run(0, 1),
    "peers_by_fences": lambda library: Peers(library).run(0, 1, variant=5),
    "dependents": lambda library: appended(library, 0),
    "syncwarp": lambda library: reverse(library, 0),
}
# What each does and where the other access is.
RACES = {
    "missing_barrier": (lambda library: block_sums(library, variant=1), "reads at|writes at"),
    "flag_before_data": (lambda library: Peers(library).run(0, 1, variant=1), "reads at|writes at"),
    "missing_release": (lambda library: Peers(library).run(0, 1, variant=3), "reads at"),
    "missing_acquire": (lambda library: Peers(library).run(0, 1, variant=4), "reads at"),
    "constant_path": (lambda library: Peers(library).run(0, 1, variant=6), "as what nobody writes during the launch"),
    "missing_wait": (lambda library: appended(library, 1), "reads at|writes at"),
    "shuffle_as_barrier": (lambda library: reverse(library, 1), "reads at|writes at"),
}


@pytest.mark.parametrize("name", ORDERED)
def test_ordered_accesses_are_no_race(watched, name):
    for seed in range(5):
        watched.configure(seed)
        ORDERED[name](watched)


@pytest.mark.parametrize("name", RACES)
def test_races_are_found_whatever_the_schedule(watched, name):
    run, report = RACES[name]
    for seed in range(5):
        watched.configure(seed)
        with pytest.raises(emulated.Failure, match=rf"race: launch \d+(.|\n)*({report})(.|\n)*examples.cu:\d+"):
            run(watched)


@pytest.mark.parametrize(
    ("variant", "report"),
    [
        (6, r"leaves its dynamic shared memory at examples.cu:"),
        (7, r"misaligned: (.|\n)*4 past a multiple of 16 at .*:"),
    ],
)
def test_watched_accesses_are_aligned_and_in_bounds(watched, variant, report):
    with pytest.raises(emulated.Failure, match=report):
        watched("run_misuse", torch.zeros(THREADS, dtype=torch.int32), variant)


# ---- Formats --------------------------------------------------------------------------------------------------------


def awkward_floats() -> torch.Tensor:
    """Every bf16, its neighbours in f32, and what lies half-way."""
    high = torch.arange(2**16, dtype=torch.int64) << 16
    words = torch.cat([high + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    return (words - (words >= 2**31) * 2**32).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_narrow_formats_round_as_torch_does(examples, number):
    dtype = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)[number]
    bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
    values = awkward_floats()
    codes, back = torch.empty(len(values), dtype=torch.int16), torch.empty(len(values))
    examples("convert", values, codes, back, len(values), number)
    # torch does not saturate to the greatest e4m3, the intrinsic is asked to.
    want = (values.clamp(-448, 448) if dtype.itemsize == 1 else values).to(dtype)
    nan = values.isnan()
    assert torch.equal(codes.to(bits)[~nan], want.view(bits)[~nan])
    assert torch.equal(back[~nan], want.float()[~nan])
    assert back[nan].isnan().all()
