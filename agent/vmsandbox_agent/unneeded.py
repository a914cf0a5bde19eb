"""Keeps the agent's start from loading and making what it never uses, which under emulation is half a second.

protobuf imports its implementation in Python, whoever uses it or not, dataclasses what describes classes without a
docstring, and tracebacks what reads source code.  In their places stand modules that become the real ones as soon as
somebody uses anything in them.  h2 and what it builds on tell what they do to a log that nobody keeps here, and could
compare and print everything that happens.  Python's own module for sockets makes enumerations of the constants of the
one in C, `_socket`, which therefore is what the agent uses.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

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


class _Silent:
    """A logger to which only details are said, and which keeps none."""

    def debug(self, *_: object) -> None:
        pass


def postpone() -> None:
    """Put stand-ins where nothing has been imported yet."""
    for name in MODULES:
        sys.modules.setdefault(name, _Postponed(name))


@contextmanager
def lightly() -> Iterator[None]:
    """What is imported in the block logs nothing, and its dataclasses have an ``__init__`` and nothing else."""
    import dataclasses

    whole = dataclasses.dataclass

    def bare(cls: type | None = None, **options: bool) -> object:
        return whole(cls, **{**options, "repr": False, "eq": False})

    silent, logger = ModuleType("logging"), _Silent()
    silent.__dict__["getLogger"] = lambda _: logger
    before = sys.modules.get("logging")
    sys.modules["logging"] = silent
    dataclasses.__dict__["dataclass"] = bare
    try:
        yield
    finally:
        dataclasses.__dict__["dataclass"] = whole
        del sys.modules["logging"]
        if before is not None:
            sys.modules["logging"] = before
