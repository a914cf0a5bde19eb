"""JSON for programs that live shorter than importing Python's own takes: that brings regular expressions along.

The parser is the one that `json` uses as well, the C one; where it cannot be had alone, `json` itself is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Never

try:
    import _json as _parser
except ImportError:  # another Python
    _parser = None  # type: ignore[assignment]


class _Settings:
    """What the parser asks for: everything as `json.loads` has it."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__
    memo: dict[str, str] = {}  # noqa: RUF012 - the parser's own


_scan: Any = getattr(_parser, "make_scanner", None) and _parser.make_scanner(_Settings)  # type: ignore[arg-type]
_quoted: Any = getattr(_parser, "encode_basestring", None)


def _unwritable(value: object) -> TypeError:
    return TypeError(f"{type(value).__name__} cannot be written as JSON")


def _refuse(value: object) -> Never:
    raise _unwritable(value)


_write: Any = getattr(_parser, "make_encoder", None) and _parser.make_encoder(
    None, _refuse, _parser.encode_basestring_ascii, None, ":", ",", False, False, True
)


def loads(data: bytes) -> Any:  # noqa: ANN401
    """The value in UTF-8 text.  Raises ValueError, or RecursionError for what is too deep."""
    if _scan is None:
        import json

        return json.loads(data)
    text = data.decode().strip(" \t\n\r")
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        raise ValueError("not JSON") from None
    except SystemError:
        # The parser wanted to raise an exception of `json`'s, which was not there.
        import json

        return json.loads(text)
    if end != len(text):
        raise ValueError("more than one value")
    return value


def dumps(value: object) -> str:
    """The value as ASCII text without blanks.  Raises TypeError for what JSON has no word for."""
    if _write is None:
        import json

        return json.dumps(value, separators=(",", ":"))
    return "".join(_write(value, 0))


def quoted(text: str) -> str:
    """A text as JSON has it, with what is not ASCII as it is."""
    if _quoted is None:
        import json

        return json.dumps(text, ensure_ascii=False)
    return str(_quoted(text))


def indented(value: object, *, by: int = 2) -> str:
    """An object of texts, numbers and objects of such, a member a line: as Go's encoder indents it."""
    if _quoted is None:
        import json

        return json.dumps(value, indent=by, ensure_ascii=False)
    return _written(value, " " * by, "\n")


def _written(value: object, step: str, line: str) -> str:
    if isinstance(value, str):
        return str(_quoted(value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return repr(value)
    deeper = line + step
    if isinstance(value, dict):
        members = [f"{_quoted(str(key))}: {_written(item, step, deeper)}" for key, item in value.items()]
        return "{" + deeper + f",{deeper}".join(members) + line + "}" if members else "{}"
    if isinstance(value, list | tuple):
        entries = [_written(item, step, deeper) for item in value]
        return "[" + deeper + f",{deeper}".join(entries) + line + "]" if entries else "[]"
    raise _unwritable(value)
