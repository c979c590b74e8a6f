"""Answers: how a chat is asked for one, and the file they are kept in while a comparison runs.

A line of that file is a pass: all answers of one block of requests in one arm. What is there is whole, so that a run
that was killed goes on with the pass it was in.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import MacsError
from ..observe.server_info import RefusedError, Server
from .arms import ARMS, Clipped
from .divergence import Token
from .requests import Request

TOP = 10  # log-probabilities of a token
WAIT_S = 600.0  # for an answer, which comes in one piece
MOST_BYTES = 16 << 30  # of a file of answers
DIGITS = 7  # of log-probabilities


@dataclass(frozen=True)
class Answer:
    """refused: why a server did not take the request; else text, tokens and the prompt's length."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Pass:
    """Answers of one block in one arm, in the order of the requests. clipped: by the servers' counters, if any."""

    block: int
    arm: str
    answers: tuple[Answer, ...]
    clipped: Clipped | None
    seconds: float


def ask(server: Server, model: str, request: Request, salt: str) -> Answer:
    """A greedy answer with log-probabilities. salt: keeps what others have put into the prefix cache apart. Raises
    MacsError where the server fails; a request that it refuses is an answer.
    """
    body = {
        **request.body,
        "model": model,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
        "cache_salt": salt,
    }
    try:
        raw = server.ask("/v1/chat/completions", body, WAIT_S)
    except RefusedError as error:
        return Answer(refused=str(error))
    try:
        return _read(json.loads(raw))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        got = f"line {request.line} answered in another form ({error!r})"
        raise MacsError("server", got, "an OpenAI chat completion with logprobs") from error


def model_of(server: Server) -> str:
    """The name that a server's model has."""
    try:
        return str(json.loads(server.ask("/v1/models"))["data"][0]["id"])
    except MacsError:
        raise
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise MacsError("server", f"/v1/models in another form ({error!r})", "an OpenAI endpoint") from error


def _read(answer: Mapping[str, Any]) -> Answer:
    choice = answer["choices"][0]
    message = choice["message"]
    text = message.get("content") or message.get("reasoning_content") or ""
    tokens = tuple(_token(entry) for entry in choice["logprobs"]["content"])
    if not isinstance(text, str) or not tokens:
        raise ValueError("no text or no tokens")
    return Answer(text, tokens, int(answer.get("usage", {}).get("prompt_tokens", 0)))


def _token(entry: Mapping[str, Any]) -> Token:
    top: dict[str, float] = {}
    for one in entry["top_logprobs"]:
        top.setdefault(_name(one), _logprob(one))  # the first of two that have one text is the more likely
    top.setdefault(_name(entry), _logprob(entry))
    return Token(_name(entry), _logprob(entry), top)


def _name(entry: Mapping[str, Any]) -> str:
    """Bytes where there are any: texts of parts of a character are alike."""
    raw = entry.get("bytes")
    return bytes(raw).decode("latin-1") if raw else str(entry["token"])


def _logprob(entry: Mapping[str, Any]) -> float:
    value = float(entry["logprob"])
    if not value <= 1e-3:  # NaN fails
        raise ValueError(f"a log-probability of {value}")
    return round(min(max(value, -1e4), 0.0), DIGITS)


class Kept:
    """Passes by (block, arm), kept in a file if `path` is given: those of an earlier run of the same comparison too.

    what: by which a comparison is known, JSON values. Raises MacsError for a file of another comparison.
    """

    def __init__(self, path: str | None, what: Mapping[str, Any]) -> None:
        self.path, self.passes = path, dict[tuple[int, str], Pass]()
        self.own: Mapping[str, Any] | None = None  # options of the server that has been switched
        self._what = dict(what)
        if path is not None and os.path.exists(path):
            self._load(path)

    def begin(self, own: Mapping[str, Any] | None) -> None:
        """own: options to put back, which a later run must know should this one be killed."""
        if self.path is not None and not os.path.exists(self.path):
            files.write(self.path, json.dumps({"compare": self._what, "own": own}) + "\n", "--answers", private=True)

    def add(self, one: Pass) -> None:
        self.passes[one.block, one.arm] = one
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(_as_json(one)) + "\n")
            except OSError as error:
                raise MacsError("--answers", f"{self.path} ({error.strerror})", "a file that can be written") from error

    def _load(self, path: str) -> None:
        raw = files.read(path, "--answers", MOST_BYTES)
        *lines, rest = raw.split(b"\n")
        fix = "Name another file, or remove it to begin anew."
        try:
            head = json.loads(lines[0])
            if head["compare"] != self._what:
                raise MacsError("--answers", f"{path} of another comparison", "these requests and servers", fix)
            self.own = head["own"]
            for line in lines[1:]:
                one = _from_json(json.loads(line))
                self.passes[one.block, one.arm] = one
        except MacsError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise MacsError("--answers", f"{path} ({error!r})", "what an earlier run has written", fix) from error
        if rest:  # it was killed while it wrote a line
            with Path(path).open("r+b") as file:
                file.truncate(len(raw) - len(rest))


def _as_json(one: Pass) -> dict[str, Any]:
    answers = [
        {"refused": a.refused}
        if a.refused
        else {"text": a.text, "prompt": a.prompt_tokens, "tokens": [[t.text, t.logprob, t.top] for t in a.tokens]}
        for a in one.answers
    ]
    counted = None if one.clipped is None else [one.clipped.assignments, one.clipped.clipped]
    return {"block": one.block, "arm": one.arm, "clipped": counted, "seconds": one.seconds, "answers": answers}


def _from_json(raw: Mapping[str, Any]) -> Pass:
    answers = tuple(
        Answer(refused=str(a["refused"]))
        if "refused" in a
        else Answer(str(a["text"]), tuple(Token(*t) for t in a["tokens"]), int(a["prompt"]))
        for a in raw["answers"]
    )
    if raw["arm"] not in ARMS:
        raise ValueError(f"arm {raw['arm']!r}")
    counted = None if raw["clipped"] is None else Clipped(*raw["clipped"])
    return Pass(int(raw["block"]), raw["arm"], answers, counted, float(raw["seconds"]))
