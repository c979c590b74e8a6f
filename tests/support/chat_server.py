"""An HTTP server that answers chats as SGLang with MACS does, without a model: log-probabilities of a few tokens, with
noise at each asking and a loss where MACS is on.
"""

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from sglang_macs import control
from sglang_macs.config import OFF, MacsConfig
from sglang_macs.control import Settings

WORDS = ("red", "green", "blue", "black")


@dataclass
class ChatServer:
    """noise: of logits at each asking; loss: of logits at gamma 0, falling to none at gamma 1; key, admin_key: it asks
    for. fail_after: answers, after which each request gets HTTP 500. refuse: a word; questions with it get HTTP 400.
    """

    noise: float = 0.002
    loss: float = 2.0
    gamma: float = 1.1
    preset: str = "rank"
    key: str | None = None
    admin_key: str | None = None
    fail_after: int | None = None
    refuse: str | None = None
    seed: int = 0
    clips: bool = True
    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    changes: list[dict[str, float]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)  # what was done, in order
    most_at_once: int = 0

    def __post_init__(self) -> None:
        gamma = {} if self.preset in OFF else {"gamma": self.gamma}
        self.settings = Settings.at_launch(MacsConfig.from_preset(self.preset, **gamma))
        self.clipped = self.assignments = self._running = 0
        self._lock = threading.Lock()

    @property
    def in_force(self) -> tuple[str, float]:
        return self.settings.now.preset, self.settings.now.gamma

    def state(self) -> dict[str, Any]:
        count = len(self.changes)
        return {
            "config": self.settings.now.to_json(),
            "control": {"received": count, "applied": count, "refused": ""},
            "own": {"assignments_visual": self.assignments, "clipped_visual": self.clipped},
        }

    def change(self, server_args: dict[str, float]) -> bool:
        self.changes.append(server_args)
        self.settings = self.settings.changed(control.decode(server_args))
        self.tags.append(self.settings.now.preset)
        return True

    def chat(self, body: dict) -> dict | int:
        with self._lock:
            self.bodies.append(body)
            self.tags.append("chat")
            number = len(self.bodies)
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        try:
            return self._answer(body, number)
        finally:
            with self._lock:
                self._running -= 1

    def _answer(self, body: dict, number: int) -> dict | int:
        if self.fail_after is not None and number > self.fail_after:
            return 500
        asked = json.dumps(body["messages"])
        if self.refuse and self.refuse in asked:
            return 400
        same = np.random.default_rng(int.from_bytes(hashlib.sha256(asked.encode()).digest()[:4], "big"))
        noise = np.random.default_rng([self.seed, number])
        preset, gamma = self.in_force
        on = preset not in OFF and gamma < 1 and self.clips
        with self._lock:
            self.assignments += 100 * (preset == "rank")
            self.clipped += 40 * on
        tokens = []
        for _ in range(3):
            logits = same.normal(0, 2, len(WORDS)) + noise.normal(0, self.noise, len(WORDS))
            shift = same.normal(0, 1, len(WORDS))
            logits += self.loss * (1 - gamma) * shift if on else 0
            logprobs = logits - np.log(np.exp(logits).sum())
            top = sorted(zip(logprobs, WORDS, strict=True), reverse=True)
            entries = [{"token": word, "bytes": list(word.encode()), "logprob": float(p)} for p, word in top]
            tokens.append({**entries[0], "top_logprobs": entries[: body["top_logprobs"]]})
        text = " ".join(token["token"] for token in tokens)
        choice = {"message": {"content": text}, "logprobs": {"content": tokens}}
        return {"choices": [choice], "usage": {"prompt_tokens": len(asked) // 4}}


@contextmanager
def serving(chats: ChatServer) -> Iterator[ChatServer]:
    """Serves it on a port of its own, `chats.url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(
                lambda _: (
                    {"/server_info": {"internal_states": [{"macs": chats.state()}]}}.get(self.path)
                    or ({"data": [{"id": "model"}]} if self.path == "/v1/models" else 404)
                ),
                chats.key,
            )

        def do_POST(self):
            changes = self.path == "/set_internal_state"
            work = (lambda body: [chats.change(body["server_args"])]) if changes else chats.chat
            self._send(work, (chats.admin_key or chats.key) if changes else chats.key)

        def _send(self, work, key):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            allowed = key is None or self.headers.get("Authorization") == f"Bearer {key}"
            found = work(body) if allowed else 401
            status, content = (200, found) if not isinstance(found, int) else (found, {"message": "not this one"})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    chats.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield chats
    finally:
        server.shutdown()
        server.server_close()


def questions(count: int, seed: int = 0) -> str:
    """JSON lines: two in three without a picture."""
    draw = random.Random(seed)
    lines = []
    for i in range(count):
        content: list[dict] = [{"type": "text", "text": f"question {i} " + "more " * draw.randrange(20)}]
        if i % 3 == 0:
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{i:08d}"}})
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 8}))
    return "\n".join(lines) + "\n"
