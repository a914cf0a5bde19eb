"""Keeps the agent's start from loading and making what it never uses, which under emulation is half a second.

protobuf imports its implementation in Python, whoever uses it or not, dataclasses what describes classes without a
docstring, paths what quotes addresses, and tracebacks what reads source code.  In their places stand modules that
become the real ones as soon as somebody uses anything in them.  h2 and what it builds on tell what they do to a log
that nobody keeps here, and could compare and print everything that happens.  Python's own module for sockets makes
enumerations of the constants of the one in C, `_socket`, which therefore is what the agent uses.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: modules, and functions that are taken from them long before they are called
MODULES = {
    "calendar": (),
    "google.protobuf.internal.python_message": (),
    "inspect": (),
    "textwrap": (),
    "tokenize": (),
    "urllib.parse": ("quote_from_bytes",),
}


class _Postponed(ModuleType):
    """A module, but no package, that is imported when one of its attributes is first asked for.

    Of its `functions` that is when they are called.
    """

    def __init__(self, name: str, *functions: str) -> None:
        super().__init__(name)
        for function in functions:
            self.__dict__[function] = self._called_later(function)

    def __getattr__(self, name: str) -> object:
        # The import system itself looks at other names with underscores; they mean no use.
        if name.startswith("__"):
            raise AttributeError(name)
        found: object = getattr(self._real(), name)
        return found

    def _real(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = import_module(self.__name__)
        self.__dict__.update(real.__dict__)
        return real

    def _called_later(self, function: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            found: object = getattr(self._real(), function)(*arguments)
            return found

        return call


class _Silent:
    """A logger to which only details are said, and which keeps none."""

    def debug(self, *_: object) -> None:
        pass


def postpone() -> None:
    """Put stand-ins where nothing has been imported yet."""
    for name, functions in MODULES.items():
        sys.modules.setdefault(name, _Postponed(name, *functions))


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
