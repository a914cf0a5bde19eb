"""Command lines as runc takes them: ``--opt v``, ``--opt=v`` and ``-opt``, before or after the positionals."""

from __future__ import annotations

from vmsandbox.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FLAG = 0
VALUE = 1
#: a value, as often as it is given
VALUES = 2


class Parsed:
    """What was given: `flags`, the last value of each option, all values of those that repeat, and the rest."""

    __slots__ = ("_given", "positional")

    def __init__(self) -> None:
        self._given: dict[str, list[str]] = {}
        self.positional: list[str] = []

    def add(self, name: str, value: str) -> None:
        self._given.setdefault(name, []).append(value)

    def flag(self, name: str) -> bool:
        return self.text(name) in ("true", "1")

    def text(self, name: str, default: str = "") -> str:
        return self._given.get(name, [default])[-1]

    def texts(self, name: str) -> list[str]:
        return self._given.get(name, [])

    def given(self, name: str) -> bool:
        return name in self._given


def parse(
    argv: Sequence[str], known: Mapping[str, int], *, short: Mapping[str, str] | None = None, stop_after: int = -1
) -> Parsed:
    """Take a command line apart.

    `known` maps names of options to `FLAG`, `VALUE` or `VALUES`, `short` one-letter names to long ones.  After
    `stop_after` positionals (and after ``--``) everything else is positional too.  Raises InvalidArgumentError.
    """
    parsed = Parsed()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            parsed.positional += words
            break
        if not word.startswith("-") or word == "-":
            parsed.positional.append(word)
            if len(parsed.positional) == stop_after:
                if words[:1] == ["--"]:
                    words.pop(0)
                parsed.positional += words
                break
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = (short or {}).get(name, name)
        if name not in known:
            raise InvalidArgumentError(f"flag provided but not defined: -{name}")
        if known[name] == FLAG:
            if equals and value not in ("true", "false", "1", "0"):
                raise InvalidArgumentError(f"option '--{name}' is a flag and cannot be '{value}'")
            parsed.add(name, value if equals else "true")
        elif equals:
            parsed.add(name, value)
        elif words:
            parsed.add(name, words.pop(0))
        else:
            raise InvalidArgumentError(f"flag needs an argument: -{name}")
    return parsed
