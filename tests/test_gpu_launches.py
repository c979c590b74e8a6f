"""What the servers of benchmarks/gpu are started with, as far as it can be seen without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu import gpu_launches, serve_check
from benchmarks.gpu.gpu_launches import LAUNCHES, ONE_GPU_SITE, RUNS
from sglang_macs.cpu_compat import environment
from sglang_macs.plan.places import Places

REINDEX = """
import json
import os
from sglang.srt.platforms.cuda import CudaDeviceMixin
with CudaDeviceMixin.reindex_device_id(None, 1) as device:
    print("device", device, "of", os.environ["CUDA_VISIBLE_DEVICES"])
"""


def reindexed(*folders: str) -> str:
    """What a scheduler of rank 1 gets as its device, in a process with `folders` on its path."""
    env = {**os.environ, **environment(1), "CUDA_VISIBLE_DEVICES": "3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], *folders])
    done = subprocess.run([sys.executable, "-c", REINDEX], env=env, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.nightly
def test_every_rank_gets_the_one_gpu_there_is():
    assert reindexed(str(ONE_GPU_SITE)) == "device 0 of 3"
    assert reindexed() == "IndexError: list index out of range", "SGLang can do this by itself: drop one_gpu_site"


@pytest.mark.parametrize("name", LAUNCHES)
def test_arguments_say_what_the_name_says(name):
    launch = LAUNCHES[name]
    given = dict(zip(launch.arguments, launch.arguments[1:], strict=False))
    assert given["--tp"] == given["--ep-size"] == name[0]
    assert given.get("--deepep-mode", "v2") == launch.mode
    assert ("--disable-cuda-graph" in launch.arguments) != launch.graphs
    has_own_requests = launch.ranks > 1 and not launch.attention_tp
    assert ("--dp" in given) == ("--enable-dp-attention" in launch.arguments) == has_own_requests


# What SGLang's vision towers and processors need; tests/test_families.py serves the same on CPUs.
ASKED_OF = {"glm4v_moe": "--mm-enable-dp-encoder", "kimi_vl": "--trust-remote-code"}


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_family_gets_the_layout_and_flags_without_which_it_is_not_served(name):
    launch = LAUNCHES[name]
    assert ASKED_OF.get(launch.kind, "--tp") in launch.arguments
    assert launch.attention_tp == (launch.kind in ("internvl", "qwen3_omni"))
    assert ("InternVL3_5" in launch.model_path().name) == (launch.kind == "internvl")
    assert launch.experts % launch.ranks == 0 and launch.hidden in (2048, 4096)


def test_pictures_are_marked_as_the_family_marks_them():
    asked = serve_check.requests(LAUNCHES["2 ranks, auto, Kimi-VL"])
    with_pictures = [text for text, image in asked if image]
    assert len(with_pictures) == 6 and all("<|media_pad|>" in text for text in with_pictures)
    assert not any("<|media_pad|>" in text for text, image in asked if not image)
    assert not any(image for _, image in serve_check.requests(LAUNCHES["2 ranks, auto, DeepSeek-V3"]))


@pytest.mark.parametrize(("experts", "redundant", "ranks"), [(128, 32, 2), (128, 32, 8), (32, 4, 4)])
def test_every_rank_has_its_own_experts_and_some_of_the_next(experts, redundant, ranks):
    layers = json.loads(gpu_launches.expert_location(3, experts, redundant, ranks))["physical_to_logical_map"]
    assert len(layers) == 3 and all(len(layer) == experts + redundant for layer in layers)
    places = Places(experts, experts + redundant, ranks, 0, layers[0])
    linear = [expert // (experts // ranks) for expert in range(experts)]
    assert all(places.on_ranks[range(experts), linear]), "no skew of the model's is evened out by the placement"
    assert places.on_ranks.sum(0).tolist() == [(experts + redundant) // ranks] * ranks, "no rank has an expert twice"


def test_a_launch_with_copies_has_one_run_without():
    launch = LAUNCHES["2 ranks, replicas, bounded, EPLB"]
    assert list(launch.runs) == ["off", "inf", "1.0", "plain"] and list(LAUNCHES["2 ranks, normal"].runs) == list(RUNS)
    assert {"--enable-eplb", "--init-expert-location", "--ep-num-redundant-experts"} <= set(launch.arguments)
    assert launch.without_copies.arguments == LAUNCHES["2 ranks, bounded"].arguments
    assert launch.model_path() == launch.without_copies.model_path()


def test_only_ranks_on_one_gpu_are_told_which(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert "CUDA_VISIBLE_DEVICES" not in LAUNCHES["2 ranks, 128 experts"].environment()
    assert LAUNCHES["1 rank, low latency"].environment()["CUDA_VISIBLE_DEVICES"] == "1"
    shared = LAUNCHES["2 ranks, one GPU"].environment()
    assert shared["CUDA_VISIBLE_DEVICES"] == "1" and shared["SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS"] == "1"
    assert shared["PYTHONPATH"].split(os.pathsep)[0] == str(gpu_launches.ONE_GPU_SITE)


MEET = """
from sglang.srt.layers.moe.token_dispatcher.deepep import _DeepEPDispatcherImplLowLatency as LowLatency
from sglang.srt.utils.common import is_jpeg_with_cuda
met = (hasattr(getattr(LowLatency, name), "__wrapped__") for name in ("dispatch_b", "combine_b", "dispatch_a"))
print(*met, is_jpeg_with_cuda.__name__)
"""


@pytest.mark.nightly
def test_ranks_on_one_gpu_meet_before_they_receive_and_leave_pictures_to_the_cpu():
    env = {**os.environ, **environment(1)}
    for folders, expected in (
        ([], "False False False is_jpeg_with_cuda"),
        ([str(ONE_GPU_SITE)], "True True False <lambda>"),
    ):
        env["PYTHONPATH"] = os.pathsep.join([environment(1)["PYTHONPATH"], *folders])
        done = subprocess.run([sys.executable, "-c", MEET], env=env, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == expected, done.stderr
