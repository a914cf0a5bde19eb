"""The guest's processes in the ways that ps(1) is asked for: which columns, and no more.

Which processes are shown is settled: those of the container.  So what selects all (``-e``, ``-A``, ``ax``) changes
nothing, and what selects some of them is refused.
"""

from __future__ import annotations

import time

from vmsandbox.errors import UnsupportedError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Row = dict[str, Any]


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


def _elapsed(row: Row) -> float:
    return max(0.0, time.time() - float(row["start_time_ns"]) / 1e9)


def _elapsed_text(row: Row) -> str:
    whole = int(_elapsed(row))
    days, hours, rest = whole // 86400, whole // 3600 % 24, f"{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{days}-{hours:02}:{rest}" if days else f"{hours:02}:{rest}" if hours else rest


def _began(row: Row) -> str:
    return time.strftime("%H:%M" if _elapsed(row) < 86400 else "%b%d", time.localtime(row["start_time_ns"] / 1e9))


def _share(row: Row) -> float:
    return float(row["cpu_ms"]) / 10 / max(_elapsed(row), 0.01)


def _name(row: Row) -> str:
    return str(row["command"]).partition(" ")[0].rpartition("/")[2][:15]


#: column -> (heading, its text, whether it is a number)
COLUMNS: dict[str, tuple[str, Callable[[Row], object], bool]] = {
    "user": ("USER", lambda row: row["user"] or row["uid"], False),
    "uid": ("UID", lambda row: row["uid"], True),
    "pid": ("PID", lambda row: row["pid"], True),
    "ppid": ("PPID", lambda row: row["parent_pid"], True),
    "c": ("C", lambda row: min(99, int(_share(row))), True),
    "pcpu": ("%CPU", lambda row: f"{_share(row):.1f}", True),
    "rss": ("RSS", lambda row: row["rss_kib"], True),
    "stime": ("STIME", _began, False),
    "etime": ("ELAPSED", _elapsed_text, True),
    "tty": ("TTY", lambda row: row["tty"] or "?", False),
    "stat": ("STAT", lambda row: row["state"], False),
    "time": ("TIME", lambda row: _clock(row["cpu_ms"] / 1000), False),
    "comm": ("COMMAND", _name, False),
    "args": ("COMMAND", lambda row: row["command"], False),
    "cmd": ("CMD", lambda row: row["command"], False),
}
ALIASES = {
    "command": "args", "ucmd": "comm", "euser": "user", "uname": "user", "euid": "uid", "tgid": "pid", "%cpu": "pcpu",
    "rssize": "rss", "rsz": "rss", "start_time": "stime", "start": "stime", "tt": "tty", "tname": "tty", "s": "stat",
    "state": "stat", "cputime": "time",
}  # fmt: skip
FULL = (("user", "UID"), ("pid", ""), ("ppid", ""), ("c", ""), ("stime", ""), ("tty", ""), ("time", ""), ("cmd", ""))
SHORT = (("pid", ""), ("tty", ""), ("time", ""), ("comm", "CMD"))
USED = ("user", "pid", "pcpu", "rss", "tty", "stat", "stime", "time", "args")


def columns(words: Sequence[str]) -> list[tuple[str, str]]:
    """Which columns arguments of ps(1) ask for, with their headings (empty: the usual one).

    Raises UnsupportedError for those that ask for something else.
    """
    chosen: list[tuple[str, str]] = []
    style: list[tuple[str, str]] = list(FULL if not words else SHORT)
    rest = list(words)
    while rest:
        word = rest.pop(0)
        letters = word.removeprefix("-")
        if word in ("--format", "--no-headers", "--no-heading", "--pid", "--ppid") or word.startswith("--"):
            raise _unsupported(word)
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter == "o":
                text = letters.removeprefix("=") or (rest.pop(0) if rest else "")
                chosen += _listed(text)
                break
            if letter == "f" and word.startswith("-"):
                style = list(FULL)
            elif letter == "u" and not word.startswith("-"):
                style = [(name, "") for name in USED]
            elif letter not in "eAaxwd":
                raise _unsupported(word)
    return chosen or style


def _listed(text: str) -> list[tuple[str, str]]:
    found = []
    for part in text.split(","):
        name, equals, heading = part.strip().partition("=")
        name = ALIASES.get(name, name)
        if name not in COLUMNS:
            raise UnsupportedError(f"column '{name[:32]}' of ps(1) is not known: choose of {', '.join(COLUMNS)}")
        found.append((name, heading if equals else ""))
    return found


def _unsupported(word: str) -> UnsupportedError:
    return UnsupportedError(
        f"'{word[:32]}' of ps(1) is not supported: '-ef', 'aux' and '-o COLUMNS' are; run ps in the container for more"
    )


def table(rows: Sequence[Row], chosen: Sequence[tuple[str, str]]) -> str:
    """The processes as lines, a heading first."""
    lines = [[heading or COLUMNS[name][0] for name, heading in chosen]]
    lines += [[printable(str(COLUMNS[name][1](row))) for name, _ in chosen] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(chosen))]
    made = []
    for line in lines:
        cells = [
            cell.rjust(width) if COLUMNS[name][2] else cell.ljust(width)
            for cell, width, (name, _) in zip(line, widths, chosen, strict=True)
        ]
        made.append(" ".join(cells).rstrip())
    return "\n".join(made)
