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
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
STARTERS = {"__init__": "plan", "__main__": "cli", "entry_point": "engine"}  # at the top: the folder it leads into


def imported(path: Path) -> set[str]:
    """Full names of what a module imports, for types and in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else ()
        if isinstance(node, ast.ImportFrom):
            above = list(path.relative_to(ROOT).parts[: -node.level]) if node.level else []
            names = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in names]
        else:
            names = [alias.name for alias in names]
        found |= set(names)
    return found


def imports(path: Path) -> set[str]:
    """Of the names below sglang_macs that a module imports, the first part of each."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("sglang_macs.")}


def circle(needs: dict[str, set[str]]) -> set[str]:
    """What remains when all that needs nothing of the rest, or that nothing needs, is taken away again and again."""
    left = dict(needs)
    while ends := [name for name in left if not left[name] & set(left) or name not in set().union(*left.values())]:
        for name in ends:
            del left[name]
    return set(left)


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
    assert not circle(TABLE), "they import each other"


def test_no_module_imports_one_that_imports_it():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "site" not in path.parts
    }

    def module_of(name: str) -> str:
        """A name is a module's, or of what stands in one."""
        return name if name in files or not name else module_of(name.rpartition(".")[0])

    needs = {name: {module_of(found) for found in imported(path)} - {name} for name, path in files.items()}
    assert sum(map(len, needs.values())) > len(files)
    assert not circle(needs), "they import each other"


def test_top_folders_do_not_import_each_other():
    """In a circle, that is: what is below can be read without what is above."""
    needs = {
        folder: {
            name
            for path in (ROOT / folder).rglob("*.py")
            for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            if name in FOLDERS - {folder}
        }
        for folder in FOLDERS
    }
    assert {"benchmarks", "lab", "reference", "sglang_macs", "tests", "tools"} <= FOLDERS
    assert not circle(needs), "they import each other"


def test_every_module_has_its_line():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    layers = {folder for folder in TABLE if folder not in ("simulate", "cpu_compat", "tiny_models")}
    for path in modules():
        place = path.relative_to(PACKAGE)
        if (len(place.parts) == 1 or (place.parts[0] in layers and len(place.parts) == 2)) and path.stem[:2] != "__":
            assert str(place) in named, place
