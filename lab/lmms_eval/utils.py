"""What chats.yaml names: a line of `lab.lab_chats` as lmms-eval takes a question, and whether its answer is right."""

import base64
import io

from PIL import Image


def messages(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> list[dict]:
    """Text and opened pictures, in the chat's order."""
    return [{"role": m["role"], "content": [_part(part) for part in m["content"]]} for m in doc["messages"]]


def _part(part: dict) -> dict:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    _, encoded = part["image_url"]["url"].split(",", 1)
    return {"type": "image", "url": Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")}


def pictures(doc: dict) -> list[Image.Image]:
    return [part["url"] for m in messages(doc) for part in m["content"] if part["type"] == "image"]


def text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return " ".join(part["text"] for m in messages(doc) for part in m["content"] if part["type"] == "text")


def results(doc: dict, answers: list[str]) -> dict[str, float]:
    """As `sglang-macs compare` judges: the reference, case and spaces aside."""
    given, wanted = (" ".join(words.casefold().split()) for words in (answers[0], doc["reference"]))
    return {"right": float(given == wanted)}
