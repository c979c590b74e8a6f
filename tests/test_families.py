"""Families of models in the real server, two expert-parallel ranks: the same answers without a bound, none broken at
gamma 1.0, and visual and text tokens told apart.
"""

import io
import os
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from benchmarks.questions import NEW_TOKENS, Question
from benchmarks.serving import Generation, Server, data_uri, photographs, states
from sglang_macs.cpu_compat import environment
from tests.support import servers
from tests.support.families import FAMILIES, Family, animation
from tests.support.reference import Reference
from tests.support.servers import MACS, own

pytestmark = [pytest.mark.server, pytest.mark.nightly]
STAND_INS = Path(__file__).resolve().parent / "support" / "stand_ins"  # of modules that decode sounds and videos
LOGS = Path(__file__).resolve().parent.parent / "build"
ALONE = 256  # --macs-min-tokens of a server that leaves single questions alone: two ranks, so 512 tokens
ONE_PICTURE = "What is in this picture?"
PICTURES = {ONE_PICTURE: 1, "Compare the two.": 2}
SOUND_TOKENS = 13  # of a second
LONG = " A mixture of experts sends every token to a few experts and adds up what they answer." * 40


def serve(family: Family, log: str, *flags: str) -> Server:
    arguments = [*family.layout, *MACS, *flags]
    env = {"PYTHONPATH": os.pathsep.join([environment(ranks=2)["PYTHONPATH"], str(STAND_INS)])}
    return Server(family.build(), arguments, env=env, log=LOGS / f"test-family-{family.kind}-{log}.log")


def ask(server: Server, family: Family, text: str, pictures: int = 0) -> Generation:
    """Greedy, from a full prefill."""
    server.flush_cache()
    return generate(server, family, text, pictures)


def generate(server: Server, family: Family, text: str, pictures: int = 0) -> Generation:
    images = (photographs() * pictures)[:pictures] or None
    return server.generate(family.prompt(text, pictures), images, max_new_tokens=NEW_TOKENS)


def ask_of_video(server: Server, family: Family) -> list[int]:
    """Greedy ids of an answer about a video, from a full prefill."""
    server.flush_cache()
    body = {"text": family.about_video("What happens?"), "video_data": [data_uri(animation(), "video/mp4")]}
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
    return server.post("/generate", body | {"sampling_params": sampling})["output_ids"]


def assert_bounds_held(server: Server) -> None:
    servers.assert_bounds_held(server)
    assert all(state["checks"]["text_last"] == state["planned"] for state in states(server))


def load(server: Server, family: Family) -> None:
    """Prefills of more than `2 * ALONE` tokens each, several at once."""
    requests = [(f"{i}{LONG}", 0) for i in range(4)]
    if family.slot:
        requests += [(f"{i} What do these show?", 6) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda request: generate(server, family, *request), requests))


def assert_marked(server: Server, before: tuple[int, int], visual: int, text: int) -> None:
    """So many visual and text tokens were counted since `before`, in every layer and slot."""
    (state, *_), now = states(server), counted(server)
    slots = len(state["layers"]) * 4
    assert (now[0] - before[0], now[1] - before[1]) == (visual * slots, text * slots)


def counted(server: Server) -> tuple[int, int]:
    """Assignments of visual and of text tokens."""
    return own(server, "assignments_visual"), own(server, "assignments_text")


def assert_video_is_visual(server: Server, family: Family, control: list[int]) -> None:
    """As many tokens of it as the tower has outputs; marks of time between its frames are text. The same answer as the
    control, if there is one.
    """
    before = counted(server)
    assert ask_of_video(server, family) == (control or mock.ANY)
    (state, *_), now = states(server), counted(server)
    assert now[0] - before[0] == family.video * len(state["layers"]) * 4


def assert_sound_is_not_visual(server: Server, family: Family, visual: int) -> None:
    """A second of a tone beside a picture of `visual` tokens: sounds share the padding, and count as text."""
    server.flush_cache()
    before = counted(server)
    tone = (np.sin(np.arange(16000) * 0.2) * 10000).astype("<i2").tobytes()
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16000, 0, "NONE", ""))
        writer.writeframes(tone)
    words = "What is heard?<|audio_start|><|audio_pad|><|audio_end|>"
    body = {"text": family.prompt(words, 1), "image_data": photographs()[:1]}
    body |= {"audio_data": [data_uri(file.getvalue(), "audio/wav")]}
    answer = server.post("/generate", body | {"sampling_params": {"temperature": 0, "max_new_tokens": 4}})
    tokens = answer["meta_info"]["prompt_tokens"]
    assert tokens > visual + SOUND_TOKENS
    assert_marked(server, before, visual, tokens - visual)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_served(name):
    family = FAMILIES[name]
    reference = Reference(family.build())
    asked = dict.fromkeys(family.decisive, 0) | (PICTURES if family.slot else {})  # text -> pictures beside it
    with serve(family, "bounded", "--macs-gamma", "1.0", "--macs-min-tokens", str(ALONE)) as server:
        control = {text: ask(server, family, text, pictures).ids for text, pictures in asked.items()}
        about_video = ask_of_video(server, family) if 0 < family.video < ALONE else []  # longer ones are planned
        for state in states(server):  # so far, MACS has left everything alone
            assert state["planned"] == 0 and state["skipped"]["small"] > 0
        for text in family.decisive:
            assert control[text] == reference.answer(Question(text)).ids
        load(server, family)
        assert_bounds_held(server)
        assert own(server, "clipped_visual" if family.slot else "clipped_text") > 0
        assert own(server, "rerouted_visual") + own(server, "rerouted_text") > 0
    infinite = ("--macs-gamma", "inf", "--macs-min-tokens", "0")
    with serve(family, "infinite", *infinite) as server:
        before = counted(server)
        answers = {text: ask(server, family, text, pictures) for text, pictures in asked.items()}
        assert {text: answer.ids for text, answer in answers.items()} == control
        assert_bounds_held(server)
        assert own(server, "clipped_visual") + own(server, "clipped_text") == 0
        around = {text: reference.count(family.around_pictures(text, pictures)) for text, pictures in asked.items()}
        visual = {text: answer.meta["prompt_tokens"] - around[text] for text, answer in answers.items()}
        assert (min(visual[text] for text in PICTURES) > 100) if family.slot else not any(visual.values())
        assert_marked(server, before, sum(visual.values()), sum(around.values()))
        if family.video:
            assert_video_is_visual(server, family, about_video)
        if name == "Qwen3-Omni":
            assert_sound_is_not_visual(server, family, visual[ONE_PICTURE])
