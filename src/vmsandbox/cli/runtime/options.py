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
#: one-letter names in the verbs of a container's life; which of them a verb has is a matter of its own
SHORT = {"b": "bundle", "f": "force", "d": "detach", "a": "all"}
#: a flag's values as Go reads them
TRUE = ("1", "t", "T", "true", "TRUE", "True")
FALSE = ("0", "f", "F", "false", "FALSE", "False")


class HelpAsked(Exception):
    """``--help`` was given instead of anything to do; `text` lists the options that there are."""

    def __init__(self, known: Mapping[str, int], short: Mapping[str, str]) -> None:
        letters = {name: f", -{letter}" for letter, name in short.items()}
        kinds = {FLAG: "", VALUE: " VALUE", VALUES: " VALUE (may be repeated)"}
        self.text = "\n".join(f"   --{name}{letters.get(name, '')}{kinds[kind]}" for name, kind in known.items())


class Parsed:
    """What was given: `flags`, the last value of each option, all values of those that repeat, and the rest."""

    __slots__ = ("_given", "positional")

    def __init__(self) -> None:
        self._given: dict[str, list[str]] = {}
        self.positional: list[str] = []

    def add(self, name: str, value: str) -> None:
        self._given.setdefault(name, []).append(value)

    def flag(self, name: str) -> bool:
        return self.text(name) in TRUE

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
    `stop_after` positionals (and after ``--``) everything else is positional too.  Raises InvalidArgumentError, and
    `HelpAsked` where that is what was asked for.
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
                parsed.positional += words
                break
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = (short or {}).get(name, name)
        if name not in known and name in ("help", "h"):
            raise HelpAsked(known, short or {})
        if name not in known:
            raise InvalidArgumentError(f"flag provided but not defined: -{name}")
        if known[name] == FLAG:
            boolean(name, value if equals else "true")
            parsed.add(name, value if equals else "true")
        elif equals:
            parsed.add(name, value)
        elif words:
            parsed.add(name, words.pop(0))
        else:
            raise InvalidArgumentError(f"flag needs an argument: -{name}")
    return parsed


def boolean(name: str, value: str) -> bool:
    """What a flag was set to; InvalidArgumentError for what is neither true nor false."""
    if value not in (*TRUE, *FALSE):
        raise InvalidArgumentError(f'invalid boolean value "{value[:64]}" for -{name}')
    return value in TRUE
