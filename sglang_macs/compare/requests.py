"""Requests to compare by: JSON lines of OpenAI chats, or the log of a server that records its requests."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import files
from ..errors import MacsError

WHAT = "--requests"
MOST_BYTES = 2 << 30  # of the file
MOST_PICTURE = 64 << 20
MOST_REQUESTS = 100_000
RECORDED = "request.received.openai"  # the event of SGLang's --log-requests-format json
# A line of that log begins with the time in brackets.
_STAMP = re.compile(r"\[[\d :,.-]+\] (?=\{)")
# What this comparison sets itself, or what belongs to the client that the request was recorded from.
_OURS = {"model", "stream", "stream_options", "n", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs"}
_OURS |= {"top_logprobs", "rid", "user", "session_id", "session_params", "priority", "cache_salt", "extra_key"}
_OURS |= {"input_ids", "routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank", "custom_logit_processor"}
_OURS |= {"bootstrap_host", "bootstrap_port", "bootstrap_room", "reference"}
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"BM": "image/bmp"}


@dataclass(frozen=True)
class Request:
    """line: of the file, from 1; body: of the chat, without what the comparison sets; pictures: whether there are any;
    references: right answers, or none.
    """

    line: int
    body: Mapping[str, Any]
    pictures: bool
    references: tuple[str, ...]

    @property
    def question(self) -> str:
        """The last text of the user's, to show it."""
        parts = [part for message in self.body["messages"] for part in _parts(message)]
        return next((str(part["text"]) for part in reversed(parts) if isinstance(part.get("text"), str)), "")


def load(path: str, most_tokens: int) -> list[Request]:
    """Every request of the file, each with at most `most_tokens` to answer. Raises MacsError, naming the line."""
    raw = files.read(path, WHAT, MOST_BYTES)
    found: list[Request] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        chat = _chat(line, number)
        if chat is not None:
            found.append(_request(chat, number, os.path.dirname(os.path.abspath(path)), most_tokens))
        if len(found) > MOST_REQUESTS:
            raise MacsError(WHAT, f"{path} of more than {MOST_REQUESTS} requests", "fewer")
    if not found:
        fix = "A server records with --log-requests --log-requests-level 3 --log-requests-format json."
        raise MacsError(WHAT, f"{path} without a request", "JSON lines of OpenAI chats, or such a server's log", fix)
    return found


def fingerprint(requests: list[Request]) -> str:
    """Of all that is asked, and in which order."""
    whole = hashlib.sha256()
    for one in requests:
        whole.update(json.dumps([one.body, one.references], sort_keys=True).encode())
    return whole.hexdigest()


def _chat(line: bytes, number: int) -> Mapping[str, Any] | None:
    """The body in a line; None for an empty one and for other lines of a log."""
    text = line.decode("utf-8", errors="replace").strip()
    text = text[stamp.end() :] if (stamp := _STAMP.match(text)) else text
    if not text.startswith("{"):
        return None
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(number, f"no JSON ({error})", "a JSON object") from error
    if "event" in read:
        return read.get("obj") if read["event"] == RECORDED and _is_chat(read.get("obj")) else None
    return read


def _is_chat(body: object) -> bool:
    return isinstance(body, Mapping) and "messages" in body  # the same event has completions and embeddings


def _request(chat: Mapping[str, Any], number: int, folder: str, most_tokens: int) -> Request:
    messages = chat.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise _wrong(number, "no messages", 'an OpenAI chat: {"messages": [{"role": ..., "content": ...}]}')
    given = chat.get("reference", [])
    references = [given] if isinstance(given, str | int | float) else given
    if not isinstance(references, list) or not all(isinstance(r, str | int | float) for r in references):
        raise _wrong(number, f"reference {given!r}", "a text, a number, or a list of them")
    body = {k: v for k, v in chat.items() if k not in _OURS and not k.startswith("return_") and v is not None}
    asked = [body.pop(name, None) for name in ("max_completion_tokens", "max_tokens")]
    wanted = [tokens for tokens in asked if type(tokens) is int and tokens > 0]
    body["max_tokens"] = min([most_tokens, *wanted])
    body["messages"] = [_message(message, number, folder) for message in messages]
    pictures = any(_is_picture(part) for message in body["messages"] for part in _parts(message))
    return Request(number, body, pictures, tuple(str(r) for r in references))


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _is_picture(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image_url", "image", "video_url", "video")


def _message(message: Mapping[str, Any], number: int, folder: str) -> Mapping[str, Any]:
    """The message with files of pictures as data URIs: a server must not be told to open paths."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_inlined(part, number, folder) for part in content]}


def _inlined(part: object, number: int, folder: str) -> object:
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return part
    image = part.get("image_url")
    image = {"url": image} if isinstance(image, str) else image
    url = image.get("url") if isinstance(image, Mapping) else None
    if not isinstance(url, str) or not url:
        raise _wrong(number, "an image_url without url", "a data URI, http(s) address or file")
    if "..." in url[:4096] and url.startswith("data:"):
        fix = "Record with --log-requests-level 3: below it SGLang cuts what is long."
        raise _wrong(number, "a picture that was cut", "a whole data URI", fix)
    if not url.startswith(("data:", "http://", "https://")):
        url = _data_uri(os.path.join(folder, url.removeprefix("file://")), number)
    return {**part, "image_url": {**image, "url": url}}


def _data_uri(path: str, number: int) -> str:
    content = files.read(path, f"{WHAT} line {number}", MOST_PICTURE)
    kind = next((kind for magic, kind in _KINDS.items() if content.startswith(magic)), None)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        raise _wrong(number, f"{path}, no picture", "PNG, JPEG, WebP, GIF or BMP")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _wrong(number: int, got: str, expected: str, fix: str = "") -> MacsError:
    return MacsError(f"{WHAT} line {number}", got, expected, fix)
