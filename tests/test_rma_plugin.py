"""The RMA plugin over TCP, a tool for tests of NCCL's GIN: between processes of one host, without NCCL and a GPU.

That NCCL and kernels take it is another matter: docs/guide/multinode.md says where that was run.
"""

import multiprocessing
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import multinode
from tests.support import rma_ranks
from tests.support.rma_plugin import REMOTE_ERROR, build, run


def patient_for_5_s(_) -> dict[str, str]:
    """Of the tests that wait for a peer to be given up; long enough for two processes on a busy machine to meet."""
    return {"RMA_TCP_TIMEOUT": "5"}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("rma"))


# ---- What it carries ----


def test_puts_of_all_sizes_both_ways_at_once(library):
    assert run(library, 2, rma_ranks.puts, [0, 1, 7, 8, 4096, 3 << 20, 16 << 20]) == [True, True]


def test_signals_of_all_ranks_add_up_and_a_ranks_own_too(library):
    assert run(library, 3, rma_ranks.signals) == [(15, 3)] * 3


def test_get_reads_another_ranks_memory(library):
    assert run(library, 3, rma_ranks.gets) == [b"\0BBBBB\0", b"\0CCCCC\0", b"\0AAAAA\0"]


def test_a_stride_connects_some_ranks_only(library):
    assert run(library, 4, rma_ranks.stride)[0] == "this context has no connection to rank 1"


@pytest.mark.parametrize("fault", ["", "reorder=4", "delay=2000@1 reorder=3"])
def test_24_rounds_no_signal_overtakes_its_puts(library, fault):
    assert run(library, 2, rma_ranks.rounds, 5, fault) == [24, 24]


def test_memory_and_contexts_are_made_beside_a_thread_that_makes_progress(library):
    assert run(library, 2, rma_ranks.beside_a_progress_thread) == [6, 6]


# ---- Faults on demand, each seen ----


def test_reorder_puts_the_later_one_first(library):
    assert run(library, 2, rma_ranks.reordered, "")[1] == b"second.."
    assert run(library, 2, rma_ranks.reordered, "reorder=2")[1] == b"first..."


def test_delay_of_one_connection_lets_others_overtake(library):
    assert run(library, 2, rma_ranks.delayed)[1] == (0, 1, 1)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("killed", "rank 1 (connection N) has closed its connection"),
        ("close=0", "rank 1 (connection N) has closed its connection"),
        ("silent=0", "rank 1 (connection N) has been silent for 5 s with 1 answers due"),
        ("corrupt=length", "rank 1 (connection N) sent a corrupt frame: length 4104, offset 8, expected checksum "),
        (
            "corrupt=offset",
            "rank 1 sent a frame that is refused: memory: bytes 1099511627784 + 8 of region 0, which has 64",
        ),
    ],
)
def test_a_fault_is_named_writes_nothing_and_lasts(library, fault, line):
    status, said, failed, again = run(library, 2, rma_ranks.failure, fault, environment=patient_for_5_s)[0]
    for connection in range(4):
        said = said.replace(f"(connection {connection})", "(connection N)")
    assert said.startswith(line) and failed and (status, again) == (REMOTE_ERROR, REMOTE_ERROR)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("slow=1", "fault slow=1: expected delay, reorder,"), ("delay=x", "fault delay=x: expected a number from 0 on")],
)
def test_refuses_what_is_no_fault(library, text, expected):
    program = "from support.rma_plugin import Plugin; import sys; Plugin(sys.argv[1]).fault(sys.argv[2])"
    command = [sys.executable, "-c", program, str(library), text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert expected in done.stderr


# ---- Calls that are wrong ----


def test_a_put_beyond_the_peers_region_is_refused_where_it_is_posted(library):
    assert run(library, 2, rma_ranks.beyond) == [
        "put to: bytes 32 + 8 of region 0, which has 32 on rank 1",
        "put to: bytes 64 + 8 of region 0, which has 64 on rank 0",
    ]


def test_a_signal_is_a_whole_word(library):
    assert run(library, 1, rma_ranks.misaligned) == ["signal: expected an offset of whole 8 bytes"]


def test_ranks_that_do_different_things_are_both_told(library):
    first, second = run(library, 2, rma_ranks.unequal_calls, False)
    assert first == "rank 1 is creating contexts (call 1), expected registering memory (call 1) as on rank 0"
    assert second == "rank 0 is registering memory (call 1), expected creating contexts (call 1) as on rank 1"


def test_a_rank_that_calls_alone_is_told_who_did_not(library):
    said, _ = run(library, 2, rma_ranks.unequal_calls, True, environment=patient_for_5_s)
    assert said == "rank 1 has not answered for 5 s"


# ---- Between two hosts ----


@pytest.mark.multinode
def test_over_a_cable_and_a_cut_is_named(library):
    if missing := multinode.why_not():
        pytest.skip(f"no network namespaces here: {missing}")

    def environment(rank):
        return {"RMA_TCP_ADDRESS": multinode.ADDRESSES[rank], "RMA_TCP_TIMEOUT": "5"}

    cut = multiprocessing.get_context("spawn").Event()
    with multinode.Network("100mbit") as network:
        puller = threading.Thread(target=lambda: cut.wait(60) and network.cut())
        puller.start()
        first, second = run(library, 2, rma_ranks.over_a_cable, cut, environment=environment, host=network.inside)
        sent = network.sent_bytes()
        puller.join()
    assert first[0] == second[0] == 24
    assert sent > rma_ranks.bytes_of_rounds(7)
    expected = r"rank 1 \(connection \d\) cannot be reached: Connection timed out"
    assert re.fullmatch(expected, first[1]) and re.fullmatch(expected.replace("rank 1", "rank 0"), second[1])


# ---- GPU memory ----

# Stands in for the driver: "device" addresses are host addresses with the top bit turned, which only it can read.
DRIVER = """
#include <cstring>
#include <cstdlib>
#include <cstdint>
static int to_host, to_device, gone;
static char* real(uint64_t device) { return reinterpret_cast<char*>(device ^ (1ull << 62)); }
extern "C" {
int copies_to_host() { return to_host; }
int copies_to_device() { return to_device; }
int cuCtxGetCurrent(void** context) { *context = &to_host; return 0; }
void shut_down(int status) { gone = status; }
int cuCtxSetCurrent(void* context) { return gone ? gone : context != &to_host; }
int cuThreadExchangeStreamCaptureMode(int* mode) { return *mode != 2; }
int cuStreamCreate(void** stream, unsigned flags) { *stream = &to_device; return flags != 1; }
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) { *memory = std::malloc(bytes); return 0; }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
  ++to_host;
  std::memcpy(to, real(from), bytes);
  return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
  ++to_device;
  std::memcpy(real(to), from, bytes);
  return 0;
}
int cuStreamSynchronize(void*) { return 0; }
}
"""


@pytest.fixture
def driver(tmp_path) -> Path:
    (tmp_path / "driver.cc").write_text(DRIVER)
    library = tmp_path / "libcuda.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "driver.cc"), "-o", str(library)], check=True)
    return library


def test_a_driver_that_ends_with_the_process_is_no_fault(library, driver):
    """Seen under NCCL: its progress thread outlives CUDA. Any other error of the driver is one."""
    got = run(library, 2, rma_ranks.driver_goes, environment=lambda _: {"RMA_TCP_LIBCUDA": str(driver)})
    assert got == [(False, "cuCtxSetCurrent: CUDA error 999")] * 2


def test_gpu_memory_goes_through_the_driver_in_pieces_of_a_megabyte(library, driver):
    got = run(library, 2, rma_ranks.cuda_copies, environment=lambda _: {"RMA_TCP_LIBCUDA": str(driver)})
    assert got == [(True, (1 + 3, 1 + 3))] * 2  # 8 bytes, then 3 MB
