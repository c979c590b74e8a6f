"""MACS for SGLang: bounded expert-parallel load for multimodal mixture-of-experts models. See docs/design/method.md.

What `__all__` names is the public interface. A name is imported when it is first used: SGLang's launcher imports this
package, and a fault in it must not pass for a plugin that nobody asked for (entry_point.py).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import PRESETS, MacsConfig, configure
    from .errors import MacsError, MacsNotActive
    from .plan.plan import Plan, PlanResult
    from .plan.routing import Routing
    from .plan.tokens import RoutedTokens

try:
    from ._version import __version__  # with the commit; written by a build
except ImportError:
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "MacsConfig",
    "MacsError",
    "MacsNotActive",
    "Plan",
    "PlanResult",
    "RoutedTokens",
    "Routing",
    "__version__",
    "configure",
]

_HOMES = {
    "PRESETS": "config",
    "MacsConfig": "config",
    "MacsError": "errors",
    "MacsNotActive": "errors",
    "Plan": "plan.plan",
    "PlanResult": "plan.plan",
    "RoutedTokens": "plan.tokens",
    "Routing": "plan.routing",
    "configure": "config",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
