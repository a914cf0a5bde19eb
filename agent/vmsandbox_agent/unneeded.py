"""Keeps the agent's start from importing what it never uses.

protobuf imports its implementation in Python, whoever uses it or not, dataclasses what describes classes without a
docstring, and tracebacks what reads source code: under emulation that is a third of a second.  In their places stand
modules that become the real ones as soon as somebody uses anything in them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

MODULES = ("calendar", "google.protobuf.internal.python_message", "inspect", "textwrap", "tokenize")


class _Postponed(ModuleType):
    """A module that is imported when one of its attributes, or a submodule, is first asked for."""

    def __getattr__(self, name: str) -> object:
        # The import system itself looks at other names with underscores; they mean no use.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = import_module(self.__name__)
        self.__dict__.update(real.__dict__)
        found: object = getattr(real, name)
        return found


def postpone() -> None:
    """Put stand-ins where nothing has been imported yet."""
    for name in MODULES:
        sys.modules.setdefault(name, _Postponed(name))
