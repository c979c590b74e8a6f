"""One round of a benchmark: prompts that fill a number of passes, sent to one server, and the time until all answer."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
from PIL import Image

from benchmarks.serving import IMAGE_SLOT, Server, ServerError, data_uri
from sglang_macs import control

FIRST_ID, LAST_ID = 32, 500  # ordinary words of the tiny models' tokenizer
FILLER = "<|endoftext|>"  # always one token
TOKEN_PIXELS = 32
SAMPLING = {"max_new_tokens": 1, "temperature": 0}
WARM_UP_SECONDS, ROUND_SECONDS = 600, 60  # that a server may take for a round: it compiles in the first ones


@dataclass(frozen=True)
class Workload:
    """tokens: of a rank's pass; passes: of a round; prompt: tokens of one."""

    tokens: int
    passes: int
    prompt: int
    ranks: int
    pictures: bool = False

    @classmethod
    def of(cls, tokens: int, prompt: int, ranks: int, pictures: bool, passes: int | None = None) -> Workload:
        """A round of 4 to 16 passes unless `passes` says how many; prompts of at most `prompt` tokens."""
        return cls(tokens, passes or min(16, max(4, 49152 // tokens)), min(tokens, prompt), ranks, pictures)

    @property
    def prompts(self) -> int:
        return self.passes * self.tokens // self.prompt * self.ranks

    def body(self) -> dict:
        """Of POST /generate. Deals round-robin over the ranks, as SGLang does."""
        rng = random.Random(self.tokens)
        body: dict = {"sampling_params": SAMPLING}
        if self.pictures:
            shown = picture_tokens(self.prompt)
            text = IMAGE_SLOT + FILLER * (self.prompt - shown[0] * shown[1] - 2)
            pictures = [picture(*shown, seed) for seed in range(min(self.prompts, 16))]
            of_prompts = [pictures[i % len(pictures)] for i in range(self.prompts)]
            return body | {"text": [text] * self.prompts, "image_data": of_prompts}
        ids = [[rng.randrange(FIRST_ID, LAST_ID) for _ in range(self.prompt)] for _ in range(self.prompts)]
        return body | {"input_ids": ids}


def picture_tokens(prompt: int) -> tuple[int, int]:
    """(rows, columns) of visual tokens of a prompt's picture: about seven eighths of the prompt."""
    rows = 1 << (int((prompt * 7 // 8) ** 0.5).bit_length() - 1)
    return rows, prompt * 7 // 8 // rows


def picture(rows: int, columns: int, seed: int) -> str:
    """A JPEG of so many visual tokens, smooth noise, as a data URI."""
    coarse = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((columns * TOKEN_PIXELS, rows * TOKEN_PIXELS), Image.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return data_uri(buffer.getvalue())


@dataclass(frozen=True)
class Run:
    """One round on one server. seconds: from the first pass's start until the last prompt is answered; ttft: mean over
    the prompts, from the same start, as all are there by then; passes: of each rank, (start in s, tokens); sent,
    answered: s by the same clock; log: what the server printed meanwhile.
    """

    seconds: float
    ttft: float
    passes: list[list[tuple[float, int]]]
    sent: float
    answered: float
    log: str

    def full(self, workload: Workload) -> bool:
        """Whether every rank had exactly the passes asked for. (Passes without tokens are decode's, and idle.)"""
        return all([n for _, n in rank if n] == [workload.tokens] * workload.passes for rank in self.passes)


class Client:
    """Talks to one server whose passes are recorded in `passes`."""

    def __init__(self, server: Server, passes: Path) -> None:
        self.server, self.passes = server, passes
        self._set: tuple[int, int] | None = None

    def choose(self, routing: int, tokens: int) -> None:
        """The routing, and the tokens of a rank's pass, of what is sent from now on. Raises ServerError."""
        if self._set == (routing, tokens):
            return
        if not self._change({"e2e_routing": routing, "chunked_prefill_size": tokens}):
            raise ServerError(f"{self.server.log}: the plugin of routing_site is not loaded")
        self._set = (routing, tokens)

    def change(self, options: Mapping[str, object]) -> None:
        """MACS's options of what is sent from now on. Raises ServerError."""
        if not self._change(control.encode(options)):
            raise ServerError(f"{self.server.log}: refused to change {options}")

    def _change(self, asked: Mapping[str, float]) -> bool:
        answer = self.server.post("/set_internal_state", {"server_args": asked})
        return bool(answer) and all(answer)

    def run(self, body: dict, patience_s: float = WARM_UP_SECONDS) -> Run:
        """Sends one round's prompts as one request. Raises ServerError, after `patience_s` too."""
        before = self.server.log.stat().st_size
        sent = time.perf_counter()
        answers = self.server.post("/generate", body, timeout=patience_s)
        answered = time.perf_counter()
        passes = self._recorded(sent)
        began = min((rank[0][0] for rank in passes if rank), default=sent)
        latencies = [answer["meta_info"]["e2e_latency"] for answer in answers]
        seconds = answered - began
        # The last answer's latency ends where the round does: the others are that much earlier.
        ttft = seconds - (max(latencies) - sum(latencies) / len(latencies))
        with self.server.log.open(errors="replace") as log:
            log.seek(before)
            return Run(seconds, ttft, passes, sent, answered, log.read())

    def _recorded(self, since: float) -> list[list[tuple[float, int]]]:
        """Passes that began after `since`, by rank."""
        ranks = []
        for file in sorted(self.passes.glob("passes-*")):
            lines = (line.split() for line in file.read_text().splitlines() if line.count(" ") == 1)
            found = [(int(start) / 1e9, int(tokens)) for start, tokens in lines]
            if found:  # processes without a model record nothing
                ranks.append([(start, tokens) for start, tokens in found if start >= since])
        return ranks

    def states(self) -> list[dict]:
        """MACS's counters of all ranks; none without MACS."""
        states = [state.get("macs") for state in self.server.get("/server_info")["internal_states"]]
        return [state for state in states if state]

    def counters(self) -> tuple[float, int]:
        """(seconds of the host, dispatches) that plans have taken so far, over all ranks; zeros without MACS."""
        states = self.states()
        return sum(state["plan_seconds"] for state in states), sum(state["planned"] for state in states)

    def profile(self, body: dict, folder: Path, activity: str, ranks: int, patience: float = 60.0) -> list[Path]:
        """Traces of one round, a file a rank; as many as are there after `patience` seconds."""
        start = {"activities": [activity], "output_dir": str(folder)}
        requests.post(f"{self.server.url}/start_profile", json=start, timeout=patience).raise_for_status()
        self.run(body)
        requests.post(f"{self.server.url}/stop_profile", timeout=patience).raise_for_status()
        until = time.monotonic() + patience
        while len(files := list(folder.glob("*.trace.json.gz"))) < ranks and time.monotonic() < until:
            time.sleep(0.2)
        return files
