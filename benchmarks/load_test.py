"""Load and faults on the real server, two expert-parallel ranks on this CPU.

    python -m benchmarks.load_test                  # 500 mixed requests at concurrency 16, three times, and faults
    python -m benchmarks.load_test --requests 40    # a quick look

First without planning, for comparison; then at infinite gamma, where every certified question must get the answer it
gets alone; then at gamma 1, where bounds are cut and must hold. Then the faults: bad images, a profile swapped for a
corrupt one, a rank killed under load.
Prints one line a check, writes build/load/summary.json, and exits 0 only if all hold.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import requests
from PIL import Image

from benchmarks.questions import NEW_TOKENS, QUESTIONS, Question
from benchmarks.serving import EP2_ARGS, Server, ServerError, data_uri, photograph_files, prompt, states
from sglang_macs import tiny_models
from sglang_macs.plan import profile

ROOT = Path(__file__).resolve().parent.parent

OUT = ROOT / "build" / "load"
MODEL = ROOT / "build" / "models" / "tiny-qwen3-vl-moe"
CONCURRENCY = 16
CHUNK = 512  # tokens of a prefill chunk over both ranks: long prompts take several
MACS = ["--moe-a2a-backend", "macs", "--macs-verify", "true", "--enable-metrics", "--chunked-prefill-size", str(CHUNK)]
# SGLang's own memory grows with the requests, without MACS, too: what counts is how much more it grows with MACS.
MORE_MB = 64
PREFIX = "You are a careful assistant who looks at pictures and answers in one sentence. " * 6
# kind -> how many of every 20 requests
KINDS = {"image": 5, "text": 4, "images": 2, "long": 2, "shared prefix": 4, "aborted": 3}


@dataclass(frozen=True)
class Check:
    """One claim about the server; `found` in words."""

    name: str
    ok: bool
    found: str


@dataclass(frozen=True)
class Request:
    """One request of the mix. question: a certified one, whose answer is compared; aborted: after the first token."""

    kind: str
    text: str
    images: tuple[str, ...] = ()
    tokens: int = NEW_TOKENS
    question: Question | None = None


# ---- The mix -------------------------------------------------------------------------------------------------------


def crops(count: int) -> list[str]:
    """`count` different parts of the photographs, as data URIs of 200 to 400 pixels."""
    uris, sources = [], [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photograph_files().values()]
    for i in range(count):
        source, side = sources[i % len(sources)], 200 + 50 * (i % 5)
        buffer = io.BytesIO()
        source.crop((10 * i, 3 * i, 10 * i + side, 3 * i + side)).save(buffer, "JPEG")
        uris.append(data_uri(buffer.getvalue()))
    return uris


def mix(count: int, seed: int = 0) -> list[Request]:
    """`count` requests of all kinds in an order that only the seed decides."""
    rng, pictures = random.Random(seed), crops(8)
    kinds = list(itertools.islice(itertools.cycle([kind for kind, n in KINDS.items() for _ in range(n)]), count))
    rng.shuffle(kinds)
    return [_request(kind, i, rng, pictures) for i, kind in enumerate(kinds)]


def _request(kind: str, i: int, rng: random.Random, pictures: list[str]) -> Request:
    if kind in ("image", "text"):
        question = rng.choice([q for q in QUESTIONS if (q.image is not None) == (kind == "image")])
        return Request(kind, question.prompt, _photograph(question), question=question)
    if kind == "images":
        chosen = tuple(rng.sample(pictures, rng.choice((2, 3))))
        return Request(kind, prompt(f"{i} Compare these pictures.", images=len(chosen)), chosen, 8)
    if kind == "long":
        words = " ".join(rng.choice(("expert", "token", "rank", "batch", "image")) for _ in range(250))
        return Request(kind, prompt(f"{i} {words} What is shown?", images=1), (rng.choice(pictures),), 4)
    if kind == "shared prefix":
        return Request(kind, prompt(f"{PREFIX}{rng.choice('abcdefgh')} {i % 7}", images=1), (rng.choice(pictures),), 8)
    return Request(kind, prompt(f"{i} Tell a very long story.", images=1), (rng.choice(pictures),), 200)


def _photograph(question: Question) -> tuple[str, ...]:
    return (data_uri(photograph_files()[question.image]),) if question.image else ()


# ---- Sending it ----------------------------------------------------------------------------------------------------


def answer(server: Server, request: Request) -> list[int]:
    """Greedy ids, all of them; what is to be aborted is left after its first piece, by hanging up or by SGLang's own
    call, and gives [].
    """
    if request.kind != "aborted":
        got = server.generate(request.text, list(request.images), max_new_tokens=request.tokens).ids
        if len(got) != request.tokens:
            raise ServerError(f"{request.kind}: {len(got)} of {request.tokens} tokens")
        return got
    rid = f"abort-{threading.get_ident()}-{time.monotonic_ns()}"
    sampling = {"temperature": 0, "max_new_tokens": request.tokens}
    body = {"text": request.text, "sampling_params": sampling, "image_data": list(request.images)}
    with requests.post(
        f"{server.url}/generate", json={**body, "stream": True, "rid": rid}, stream=True, timeout=120
    ) as stream:
        next(stream.iter_lines())
        if hash(request.text) % 2:
            requests.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=60)
    return []


def send(server: Server, plan: list[Request]) -> tuple[list[list[int] | None], list[str]]:
    """All answers, `CONCURRENCY` at a time, and the errors of those that failed (None)."""
    errors: list[str] = []

    def one(request: Request) -> list[int] | None:
        try:
            return answer(server, request)
        except (ServerError, requests.RequestException, StopIteration) as error:
            errors.append(f"{request.kind}: {str(error).splitlines()[0] if str(error) else error!r}")
            return None

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(one, plan)), errors


def processes(server: Server) -> dict[int, str]:
    """The server's processes: id -> name."""
    return dict(server.of_processes(lambda process: (process.pid, " ".join(process.cmdline()))))


def memory_mb(server: Server) -> float:
    """Private memory of all the server's processes."""
    return sum(server.of_processes(lambda process: process.memory_full_info().uss)) / 2**20


# ---- Checks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """What became of a mix: an answer or None for each request, what failed, seconds, and the memory that grew."""

    answers: list[list[int] | None]
    errors: list[str]
    seconds: float
    before_mb: float
    grown_mb: float

    @property
    def check(self) -> Check:
        found = f"{len(self.answers)} in {self.seconds:.0f} s; errors: {self.errors[:3] or 'none'}"
        return Check("requests", not self.errors, found)


def in_halves(server: Server, plan: list[Request]) -> Sent:
    """Sends the mix; memory is compared between the middle, when everything is warm, and the end."""
    start, half = time.monotonic(), len(plan) // 2
    first, errors = send(server, plan[:half])
    before = memory_mb(server)
    second, more = send(server, plan[half:])
    grown, seconds = memory_mb(server) - before, time.monotonic() - start
    return Sent(first + second, errors + more, seconds, before, grown)


def under_load(server: Server, count: int, gamma: float, control_mb: float = float("inf")) -> Iterator[Check]:
    """Sends the mix and checks everything that must hold on the way. control_mb: what memory grew by without MACS."""
    alone = {q: answer(server, Request("", q.prompt, _photograph(q), question=q)) for q in QUESTIONS}
    plan = mix(count)
    sent = in_halves(server, plan)
    yield sent.check
    found = f"{sent.grown_mb:+.0f} MB in the second half on {sent.before_mb:.0f}, without MACS {control_mb:+.0f}"
    yield Check("memory", sent.grown_mb < control_mb + MORE_MB, found)
    if gamma == float("inf"):
        asked = [(r, got) for r, got in zip(plan, sent.answers, strict=True) if r.question]
        other = [r.text for r, got in asked if got != alone[r.question]]
        yield Check("answers as alone", not other and len(asked) > 0, f"{len(asked) - len(other)} of {len(asked)}")
    yield from _counters(states(server), gamma)


def control(server: Server, count: int, grown_mb: list[float]) -> Iterator[Check]:
    """The same without planning; appends what memory grew by."""
    sent = in_halves(server, mix(count))
    grown_mb.append(sent.grown_mb)
    yield sent.check


def _counters(ranks: list[dict], gamma: float) -> Iterator[Check]:
    planned, checked = ranks[0]["planned"], sum(r["checks"].get("bound", 0) for r in ranks)
    violated = sum(sum(r["violations"].values()) for r in ranks)
    yield Check("bounds", violated == 0 < checked == planned * len(ranks), f"{checked} checked, {violated} violated")
    misaligned = sum(r["misaligned"] for r in ranks)
    yield Check("visual masks", misaligned == 0, f"{misaligned} misaligned of {planned} plans")
    clipped = sum(r["own"]["clipped_visual"] + r["own"]["clipped_text"] for r in ranks)
    yield Check(
        "clipping", (clipped > 0) == (gamma != float("inf")), f"{clipped} assignments clipped at gamma {gamma:g}"
    )


def png(width: int, height: int) -> bytes:
    """A grey picture, small as a file however large it is."""
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "PNG")
    return buffer.getvalue()


def bad_images() -> dict[str, bytes]:
    """Pictures that must be refused or served, but never end the server."""
    jpeg = photograph_files()["china"]
    return {
        "empty": b"",
        "no picture": b"not a picture at all",
        "truncated": jpeg[: len(jpeg) // 3],
        "cut in the header": jpeg[:30],
        "one pixel": png(1, 1),
        "a line": png(4000, 2),
        "100 megapixels": png(10_000, 10_000),
        "a bomb": png(30_000, 30_000),
    }


def images(server: Server) -> Iterator[Check]:
    """Each bad picture gets an answer or a refusal, within a minute, and the next request is served.

    SGLang refuses with HTTP 400, but passes on Pillow's refusal of a decompression bomb as 500.
    """
    for name, content in bad_images().items():
        body = {"text": prompt("What?", images=1), "image_data": [data_uri(content)]}
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": 2}
        start = time.monotonic()
        try:
            code = str(requests.post(f"{server.url}/generate", json=body, timeout=60).status_code)
        except requests.RequestException as error:
            code = type(error).__name__
        ok = code in ("200", "400") or (name, code) == ("a bomb", "500")
        yield Check(f"image: {name}", ok, f"{code} after {time.monotonic() - start:.1f} s")
    question = QUESTIONS[-1]
    served = len(answer(server, Request("image", question.prompt, _photograph(question), question=question)))
    yield Check("served after bad images", served == NEW_TOKENS, f"{served} tokens")


def rank_killed(server: Server, within_s: float = 60.0) -> Iterator[Check]:
    """SIGKILL to one scheduler while requests run: the whole server must end, soon, and say why. Ends the server."""
    ranks = sorted(pid for pid, name in processes(server).items() if "scheduler" in name)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(send, server, mix(2 * CONCURRENCY, seed=1))
        time.sleep(1.0)
        killed = time.monotonic()
        os.kill(ranks[-1], signal.SIGKILL)
        with contextlib.suppress(Exception):
            server.process.wait(timeout=within_s)
        seconds, code = time.monotonic() - killed, server.process.poll()
        server.stop()
        _, errors = pending.result()
    yield Check("rank killed: the server ends", code is not None, f"exit status {code} after {seconds:.0f} s")
    said = [line for line in server.log_text().splitlines() if re.match(r"sglang-macs: .* rank \d of \d stops", line)]
    yield Check("rank killed: the other one says so", len(said) == 1, said[0] if said else "no line")
    yield Check("rank killed: clients are told", bool(errors), f"{len(errors)} requests failed, none hung")


def run(name: str, server: Server, *parts: Callable[[Server], Iterator[Check]]) -> list[Check]:
    """The parts' checks on one server, printed as they come."""
    done = []
    with server:
        for part in parts:
            for check in part(server):
                done.append(Check(f"{name}: {check.name}", check.ok, check.found))
                print(f"{'ok  ' if check.ok else 'FAIL'} {done[-1].name:<44} {check.found}", flush=True)
    return done


def a_profile(path: Path) -> Path:
    """A good one for the tiny model: half of the experts visual."""
    layers = dict.fromkeys(range(3), [1] * 8 + [-1] * 8)
    profile.save(profile.Profile("Qwen3VLMoeForConditionalGeneration", 16, layers), str(path))
    return path


def profile_swapped(path: Path) -> Callable[[Server], Iterator[Check]]:
    """The file is swapped for a corrupt one under the running server, which must go on as before."""

    def part(server: Server) -> Iterator[Check]:
        path.write_text(path.read_text()[:40])
        _, errors = send(server, mix(CONCURRENCY, seed=2))
        yield Check("profile swapped: still served", not errors, f"errors: {errors[:2] or 'none'}")

    return part


def profile_refused(path: Path) -> Check:
    """The next launch with the corrupt profile must end with one line."""
    server = _server("profile", "--macs-profile", str(path))
    try:
        with server:
            return Check("profile swapped: the next launch", False, "it serves")
    except ServerError:
        said = [line for line in server.log_text().splitlines() if line.startswith("sglang-macs: --macs-profile")]
        return Check("profile swapped: the next launch", len(said) == 1, said[0][-140:] if said else "no line")


def _server(name: str, *flags: str) -> Server:
    return Server(MODEL, [*EP2_ARGS, *MACS, *flags], log=OUT / f"{name}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500, help="for each gamma (default: %(default)s)")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    tiny_models.ensure(MODEL, "qwen3_vl_moe")
    corrupt = a_profile(OUT / "profile.json")
    grown: list[float] = []
    checks = run("off", _server("off", "--macs-preset", "off"), lambda server: control(server, options.requests, grown))
    for gamma, extra, parts in (
        (float("inf"), ["--macs-min-tokens", "0"], []),
        (
            1.0,
            ["--macs-act", "always", "--macs-profile", str(corrupt)],
            [images, profile_swapped(corrupt), rank_killed],
        ),
    ):
        load = partial(under_load, count=options.requests, gamma=gamma, control_mb=grown[0])
        name = f"gamma {gamma:g}"
        checks += run(name, _server(name.replace(" ", "-"), "--macs-gamma", str(gamma), *extra), load, *parts)
    checks.append(profile_refused(corrupt))
    print(f"{'ok  ' if checks[-1].ok else 'FAIL'} {checks[-1].name:<44} {checks[-1].found}")
    (OUT / "summary.json").write_text(json.dumps([asdict(check) for check in checks], indent=1))
    failed = [check.name for check in checks if not check.ok]
    print(f"load test {'FAILED: ' + ', '.join(failed) if failed else 'OK'}: {len(checks)} checks.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
