"""What `import sglang_macs` offers: these names, each where it is defined, and torch only with what needs it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_macs

PUBLIC = {
    "PRESETS", "MacsConfig", "MacsError", "MacsNotActive", "Plan", "PlanResult", "RoutedTokens", "Routing",
    "__version__", "configure",
}  # fmt: skip


def test_the_public_names_are_these():
    """A name less breaks users; one more must be meant."""
    assert set(sglang_macs.__all__) == PUBLIC and len(sglang_macs.__all__) == len(PUBLIC)
    assert set(dir(sglang_macs)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"PRESETS", "__version__"}))
def test_a_name_is_what_its_module_defines(name):
    found = getattr(sglang_macs, name)
    assert found.__name__ == name and found.__doc__
    assert getattr(sys.modules[found.__module__], name) is found


def test_checkers_see_the_names_that_are_there():
    """Their imports, which are not run, lead where the lazy ones do."""
    tree = ast.parse(Path(sglang_macs.__file__).read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == sglang_macs._HOMES and set(seen) == PUBLIC - {"__version__"}
    assert (Path(sglang_macs.__file__).parent / "py.typed").exists()


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'sglang_macs' has no attribute 'Config'"):
        _ = sglang_macs.Config


def test_nothing_is_imported_before_it_is_used():
    program = "import sys, sglang_macs; seen = {m for m in sys.modules if m.startswith('sglang_macs.') or m == 'torch'}"
    program += "; print(seen - {'sglang_macs._version'}); sglang_macs.MacsConfig.from_preset('rank')"
    program += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["set()", "False"]
