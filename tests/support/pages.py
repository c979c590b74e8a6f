"""The pages of this repository, which tests compare with the code and hold to plain prose."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for pattern in (
        "README.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "docs/**/*.md",
        "models/*/README.md",
        "tools/*/README.md",
    )
    for page in ROOT.glob(pattern)
}
OF_THEIR_TIME = "docs/log/"  # pages there stay as they were written
CODE = "`code`"


def passages(text: str) -> Iterator[str]:
    """Paragraphs, list items, headings and cells of tables, each in one line. Of code in a line only `code` is left;
    blocks of it, which an empty line and four spaces begin, and comments are left out.
    """
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "", text)
    for block in re.split(r"\n(?=\s*(?:[-*+#|]|\d+\.)\S* )|\n\s*\n", text):
        line = re.sub(r"`[^`]+`", CODE, " ".join(block.split()))
        yield from line.strip("|").split("|") if line.startswith("|") else [line]


def sentences(passage: str) -> list[str]:
    """Each with what ends it: . ! ? : or the end of the passage."""
    return re.split(r"(?<=[.!?:])[)*_\"]*\s+", passage)


def words(sentence: str) -> list[str]:
    """Code counts as one, a link by its text; where there is nothing but code, there are none."""
    said = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", sentence)
    found = [word for word in said.split() if re.search(r"\w", word)]
    return found if re.search(r"\w", said.replace(CODE, "")) else []
