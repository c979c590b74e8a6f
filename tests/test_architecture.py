"""The folders of the package are what docs/design/architecture.md says: what each imports, a line for every module."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sglang_macs"
PAGE = (ROOT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
TABLE = {
    folder: set(re.findall(r"`(\w+)/`", imports))
    for folder, imports in re.findall(
        r"^\| `(\w+)/` \|[^|]+\|([^|]*)\|$", PAGE.split("Module by module")[0], re.MULTILINE
    )
}
STARTERS = {"__init__": "plan", "__main__": "cli", "entry_point": "engine"}  # at the top: the folder it leads into


def imports(path: Path) -> set[str]:
    """Names below sglang_macs that a module imports, in functions too: the first part of each."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else ()
        if isinstance(node, ast.ImportFrom):
            above = list(path.relative_to(ROOT).parts[: -node.level]) if node.level else []
            names = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in names]
        else:
            names = [alias.name for alias in names]
        found |= {name.split(".")[1] for name in names if name.startswith("sglang_macs.")}
    return found


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "site" not in path.parts]


def test_every_folder_has_its_row():
    assert set(TABLE) == {path.parent.relative_to(PACKAGE).parts[0] for path in modules() if path.parent != PACKAGE}


@pytest.mark.parametrize("folder", TABLE)
def test_a_folder_imports_what_its_row_names(folder):
    found = set().union(*(imports(path) for path in (PACKAGE / folder).rglob("*.py") if "site" not in path.parts))
    assert found & set(TABLE) - {folder} == TABLE[folder]


def test_the_top_imports_no_folder():
    for path in PACKAGE.glob("*.py"):
        assert imports(path) & set(TABLE) <= {STARTERS.get(path.stem)}, path.name


def test_no_folder_imports_one_that_imports_it():
    left = dict(TABLE)
    while bottom := [folder for folder, needed in left.items() if not needed & set(left)]:
        for folder in bottom:
            del left[folder]
    assert not left, "they import each other"


def test_top_folders_do_not_import_each_other():
    """In a circle, that is: what is below can be read without what is above."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    left = {
        folder: {
            name
            for path in (ROOT / folder).rglob("*.py")
            for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            if name in folders - {folder}
        }
        for folder in folders
    }
    assert {"benchmarks", "lab", "reference", "sglang_macs", "tests", "tools"} <= folders
    while bottom := [folder for folder, needed in left.items() if not needed & set(left)]:
        for folder in bottom:
            del left[folder]
    assert not left, "they import each other"


def test_every_module_has_its_line():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    layers = {folder for folder in TABLE if folder not in ("simulate", "cpu_compat", "tiny_models")}
    for path in modules():
        place = path.relative_to(PACKAGE)
        if (len(place.parts) == 1 or (place.parts[0] in layers and len(place.parts) == 2)) and path.stem[:2] != "__":
            assert str(place) in named, place
