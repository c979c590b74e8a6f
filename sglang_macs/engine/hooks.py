"""A hook on a function of SGLang, and the check that it took: SGLang logs and swallows what goes wrong with hooks."""

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..errors import MacsNotActive
from ..releases import PINNED, SGLANG


@dataclass(frozen=True)
class Hook:
    """One target in SGLang, what replaces or wraps it, and how ("before", "after", "around"; "class": around what
    makes objects of a class; "missing": set where there is none).
    """

    target: str
    function: Any  # to be called; of "missing", any value
    kind: str


registered: list[Hook] = []  # in this process, in order


def register(target: str, function: Callable[..., Any], kind: str) -> None:
    """Hands a hook to SGLang, which applies it when all plugins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    registered.append(Hook(target, function, kind))
    if kind == "class":
        construct_through(target, function)
    elif kind == "missing":
        define_missing(target, function)
    else:
        HookRegistry.register(target, function, HookType(kind))


def register_all(hooks: Iterable[Hook]) -> None:
    """`register`, of each."""
    for hook in hooks:
        register(hook.target, hook.function, hook.kind)


def check(hooks: Iterable[Hook]) -> None:
    """Raises MacsNotActive unless every hook wraps its target in this process."""
    for hook in hooks:
        if found := trouble(hook):
            raise MacsNotActive(f"{found}; {_versions()}")


def trouble(hook: Hook) -> str:
    """Why `hook` does not act in this process, or ""."""
    owner, name = hook.target.rsplit(".", 1)
    try:
        now = getattr(pkgutil.resolve_name(owner), name)
    except Exception as error:
        return f"hook target {hook.target} is gone ({error})"
    return "" if hook.kind == "missing" or is_wrapped_by(now, hook.function) else f"hook on {hook.target} did not take"


def construct_through(target: str, function: Callable[..., Any]) -> None:
    """Puts `function(original, ...)` in place of the class that is called at the dotted path `target`, an attribute of
    another class. HookRegistry would put it in place of the class everywhere else, too.
    """
    owner, name = target.rsplit(".", 1)
    holder = pkgutil.resolve_name(owner)
    original = getattr(holder, name)

    def construct(*args, **kwargs):
        return function(original, *args, **kwargs)

    setattr(holder, name, staticmethod(construct))


def define_missing(target: str, value: Any) -> None:
    """Sets the attribute at the dotted path `target` where there is none."""
    owner, name = target.rsplit(".", 1)
    if not hasattr(found := pkgutil.resolve_name(owner), name):
        setattr(found, name, value)


def is_wrapped_by(now: Any, function: Callable[..., Any]) -> bool:
    """Whether `function` is among the closures of SGLang's chain of wrappers around a target."""
    now = getattr(now, "__func__", now)
    while now is not None:
        if any(cell.cell_contents is function for cell in getattr(now, "__closure__", None) or ()):
            return True
        now = getattr(now, "__wrapped__", None)
    return False


def _versions() -> str:
    made_for = ", ".join(SGLANG)
    return f"sglang {version('sglang')}, made for {made_for}: update sglang-macs or pin sglang=={PINNED}"
