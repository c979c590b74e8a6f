"""What tests of real servers share: how they are launched, what they are asked, and what their counters must say."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.questions import NEW_TOKENS, Question
from benchmarks.serving import Server, data_uri, photograph_files, photographs, states
from sglang_macs.cpu_compat import SITE_DIR

ONE_IMPORT = Path(__file__).resolve().parent / "one_import"
BUILD = Path(__file__).resolve().parents[2] / "build"
LAYERS, TOP_K = 3, 4  # of the tiny models
MACS = ["--moe-a2a-backend", "macs", "--macs-verify", "true"]
INFINITE = [*MACS, "--macs-gamma", "inf", "--macs-min-tokens", "0"]
WORDS = "How many visual tokens does a photograph of a flower have? "


def forked(env: dict[str, str | None] | None = None) -> dict[str, str | None]:
    """`env` for a server on CPU whose processes share one import of SGLang (one_import/sitecustomize.py), a third of
    the time of its start. Every night they start as users': MACS_TEST_START=spawn.
    """
    env = dict(env or {})
    if os.environ.get("MACS_TEST_START") != "spawn":
        found = env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE_DIR), str(ONE_IMPORT), found]))
    return env


def serve(model, *arguments: str, log: str, kind: type[Server] = Server, env=None, **options) -> Server:
    return kind(model, list(arguments), log=BUILD / f"test-{log}.log", env=forked(env), **options)


def ask(server: Server, question: Question) -> list[int]:
    """Greedy ids, from a full prefill."""
    server.flush_cache()
    image = data_uri(photograph_files()[question.image]) if question.image else None
    return server.generate(question.prompt, image, max_new_tokens=NEW_TOKENS).ids


def generate(server: Server, text: str, image: str | None = None, **fields) -> dict:
    """SGLang's whole answer to `/generate`: one token, unless `fields` say otherwise."""
    body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 1}, **fields}
    if image:
        body["image_data"] = data_uri(photograph_files()[image])
    return server.post("/generate", body)


def own(server: Server, kind: str) -> int:
    """One counter of the ranks' own assignments, over all ranks, and over both modalities unless `kind` names one."""
    return sum(count for state in states(server) for name, count in state["own"].items() if name.startswith(kind))


def assert_bounds_held(server: Server) -> None:
    for state in states(server):
        assert state["planned"] > 0 and state["misaligned"] == 0
        assert state["checks"]["bound"] == state["planned"]
        assert sum(state["violations"].values()) == 0, state["violations"]


def load(server: Server, count: int = 16) -> None:
    """Image and text chats at once, so that batches mix modalities and both ranks have work."""

    def one(i: int) -> None:
        uri = photographs()[i % 2]
        picture = {"type": "image_url", "image_url": {"url": uri}}
        words = {
            "type": "text",
            "text": f"{i} {WORDS}" * (1 + i % 3),
        }
        server.chat([{"role": "user", "content": [words] if i % 4 == 3 else [words, picture]}])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(count)))
