"""Architectures of the installed SGLang that dispatch through DeepEP, from its sources, and what MACS does there."""

import importlib.util
import re
from pathlib import Path

from sglang_macs.engine import families
from sglang_macs.releases import PINNED
from tools.tables import markdown

DRAFTS = re.compile(r"NextN|MTP|Eagle|DSpark|Draft|^Transformers")  # no models to serve by themselves, and any model


def dispatching() -> list[str]:
    """Names of architectures whose source, or one that it builds on, asks whether DeepEP dispatches."""
    (package,) = importlib.util.find_spec("sglang").submodule_search_locations  # not imported: that takes seconds
    sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(package, "srt", "models").glob("*.py")}
    built_on = {name: set(re.findall(r"sglang\.srt\.models\.(\w+) import", text)) for name, text in sources.items()}
    found = {name for name, text in sources.items() if re.search(r"\bis_deepep\(|\bget_moe_impl_class\(", text)}
    while more := {name for name in sources if built_on[name] & found} - found:
        found |= more
    entries = (re.search(r"^EntryClass = (\[[^]]*\]|\w+)", sources[name], re.MULTILINE) for name in found)
    names = {name for entry in entries if entry for name in re.findall(r"\w+", entry[1])}
    return sorted(name for name in names if not DRAFTS.search(name))


def dispatching_table() -> str:
    """All of them by what becomes of a launch with MACS."""
    names = dispatching()
    tested = [name for name in names if name in families.SERVED]
    refused = [name for name in names if families.does_not_fit(name)]
    others = [name for name in names if name not in (*tested, *refused)]
    rows = [
        (len(tested), "tested, or refused on one device: the table of families", tested),
        (len(refused), "refused: known not to fit, for the reason below", refused),
        (len(others), "refused: no test has served it; `MACS_EXPERIMENTAL=models` tries it", others),
    ]
    cells = [(count, what, ", ".join(f"`{name}`" for name in group)) for count, what, group in rows]
    return f"SGLang {PINNED}.\n\n" + markdown(["", "with MACS", "architectures"], cells)
