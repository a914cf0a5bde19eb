"""Signals by name and number, as users and images write them."""

from __future__ import annotations

import signal

from vmsandbox.errors import InvalidArgumentError

HIGHEST = 64


def parse(text: str) -> int:
    """The number of ``TERM``, ``sigterm``, ``15`` or ``RTMIN+3``.

    Raises InvalidArgumentError for anything that is no signal, 0 included.
    """
    name = text.strip().upper().removeprefix("SIG")
    numeric = name.isascii() and name.isdigit() and len(name) < 4
    number = int(name) if numeric else _by_name(name)
    if not 1 <= number <= HIGHEST:
        raise InvalidArgumentError(f"'{text}' is no signal: give a name like 'TERM' or a number from 1 to {HIGHEST}")
    return number


def _by_name(name: str) -> int:
    for base, number in (("RTMIN", int(signal.SIGRTMIN)), ("RTMAX", int(signal.SIGRTMAX))):
        offset = name.removeprefix(base)
        if name != offset and offset[:1] in ("+", "-") and offset[1:].isascii() and offset[1:].isdigit():
            shifted = number + (int(offset[:4]) if len(offset) < 4 else 1000)
            return shifted if int(signal.SIGRTMIN) <= shifted <= int(signal.SIGRTMAX) else 0
    found = signal.Signals.__members__.get(f"SIG{name}")
    return int(found) if found is not None else 0
