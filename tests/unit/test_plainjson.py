"""JSON without the module of that name does what that does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox import plainjson

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


@given(values)
def test_values_come_back(value: Any) -> None:
    assert plainjson.loads(json.dumps(value).encode()) == value
    assert plainjson.loads(f" {json.dumps(value, indent=1, ensure_ascii=False)}\n".encode()) == value


@given(values)
def test_what_is_written_is_what_json_writes(value: Any) -> None:
    assert plainjson.indented(value) == json.dumps(value, indent=2, ensure_ascii=False)
    assert plainjson.dumps(value) == json.dumps(value, separators=(",", ":"))


@given(st.text(st.characters(codec="utf-8")))
def test_texts_are_quoted_as_json_quotes_them(text: str) -> None:
    assert plainjson.quoted(text) == json.dumps(text, ensure_ascii=False)


def test_what_json_has_no_word_for_is_refused() -> None:
    for write in (plainjson.dumps, plainjson.indented):
        with pytest.raises(TypeError, match="set cannot be written as JSON"):
            write({"a": {1}})


@given(st.binary(max_size=40) | st.text(alphabet='{}[]",: 0123truefalsn\\', max_size=30).map(str.encode))
def test_what_json_refuses_is_refused(data: bytes) -> None:
    try:
        wanted = json.loads(data.decode())
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
            plainjson.loads(data)
    else:
        assert plainjson.loads(data) == wanted


def test_what_is_too_deep_is_an_error() -> None:
    with pytest.raises(RecursionError):
        plainjson.loads(b"[" * 200_000)


@pytest.mark.parametrize("data", ['{"version": 1, "na', '{"a": tru}', "[1,", '"\\x"', "{1: 2}"])
def test_what_is_refused_is_refused_without_json_too(data: str) -> None:
    code = f"""import sys; sys.path[:0] = {sys.path!r}
from vmsandbox import plainjson
assert 'json.decoder' not in sys.modules
try:
    plainjson.loads({data.encode()!r})
except ValueError as error:
    print('refused')
"""
    assert subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True) == "refused\n"


def test_it_needs_nothing_else() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import vmsandbox.plainjson; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True).split()
    assert not {"json", "re", "enum", "functools", "collections"} & set(loaded)
