"""The lab's held-out questions as JSON lines of OpenAI chats with their answers, for `sglang-macs compare`.

python -m lab.lab_chats questions.jsonl --count 192
"""

import argparse
import base64
import json
from pathlib import Path

from lab.lab_questions import Question, questions

# Of 16 questions, by picture size and task: see lab_tasks.py. A picture has 48 to 256 visual tokens.
MIX = {
    "text": {"copy": 2, "lookup": 2},
    "wide": {"read": 3, "compare": 1},
    "square": {"read": 2, "colour": 1, "where": 1, "count_colour": 1},
    "large": {"read": 2, "scene": 1},
}
LONGEST_ANSWER = 14  # tokens


def line(question: Question) -> str:
    """One chat as a line of JSON; `reference` is the right answer."""
    uris = (f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in question.pictures)
    content: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    content.append({"type": "text", "text": question.text})
    messages = [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, "max_tokens": LONGEST_ANSWER, "reference": question.answer})


def write(path: Path, count: int, seed: int = 0) -> None:
    """`count` questions, rounded up to whole mixes."""
    mixes = -(-count // sum(n for tasks in MIX.values() for n in tasks.values()))
    asked = questions({size: {task: n * mixes for task, n in tasks.items()} for size, tasks in MIX.items()}, seed)
    path.write_text("".join(f"{line(question)}\n" for question in asked), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, options.count, options.seed)


if __name__ == "__main__":
    main()
