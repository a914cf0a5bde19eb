"""Tests with real engines are one group: they share daemons, and look at the whole machine for what these leave."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.harness import groups

RUNTIME = Path(__file__).resolve().parents[1] / "runtime"


def uses_engines(path: Path) -> bool:
    """Whether a test or fixture of a file is given engines."""
    given = [node.annotation for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)]
    return any(isinstance(each, ast.Name) and each.id == "Engines" for each in given)


def test_every_file_that_uses_engines_is_named_as_one_that_does() -> None:
    found = {path.stem.removeprefix("test_") for path in RUNTIME.glob("test_*.py") if uses_engines(path)}
    assert found == set(groups.ENGINES), "name the file in tests.harness.groups.ENGINES, and no other"


def test_they_are_one_group_and_every_other_file_is_one_of_its_own() -> None:
    named = [f"tests/runtime/test_{name}.py::test_{name}[{name}::x]" for name in groups.ENGINES]
    assert {groups.group_of(nodeid) for nodeid in named} == {"engines"}
    assert groups.group_of("tests/runtime/test_life.py::test_x") == "tests/runtime/test_life.py"
