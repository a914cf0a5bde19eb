"""The host's programs that product and tests start are there on a bare machine after `scripts/setup`.

A bare Debian has its essential packages, apt and Python; with recommendations left out `scripts/setup` adds what it
names and what that depends on.  Whatever else this machine has, nothing of ours may start.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
STATUS = Path("/var/lib/dpkg/status")
LISTS = Path("/var/lib/dpkg/info")
BARE = ("apt", "python3")
#: what guests run by images of ours, which have busybox
IN_GUESTS = {"free", "hexdump", "kill", "less", "poweroff", "ps", "time", "top", "vi", "wget"}
#: `guest build --kernel tuned` says which packages it needs; its tests are long ones
COMPILING = {"gcc", "make"}
#: words of ours that happen to be programs somewhere, where a list or a text begins with them
WORDS = {"as", "file", "write"}
#: where a command of a shell begins
COMMAND = re.compile(r"(?:^|[;|&(\n]\s*|\bexec |\bthen |\bdo )([a-z][a-z0-9._+-]*)(?=\s|$)")


def wanted() -> list[str]:
    """The packages that `scripts/setup` installs."""
    found = re.search(r"^packages=\(\n(.*?)^\)", (ROOT / "scripts/setup").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return [word for line in found[1].splitlines() for word in line.partition("#")[0].split()]


def installed() -> dict[str, dict[str, str]]:
    """The fields of each package that this machine has."""
    blocks = (
        dict(re.findall(r"^([A-Za-z-]+): (.*)$", block, re.MULTILINE)) for block in STATUS.read_text().split("\n\n")
    )
    return {block["Package"]: block for block in blocks if block.get("Status", "").endswith(" installed")}


def named(field: str) -> list[list[str]]:
    """A list of packages, each with its alternatives, without versions and architectures."""
    return [
        [re.split(r"[ (:]", one.strip())[0] for one in each.split("|")] for each in field.split(",") if each.strip()
    ]


def closure(packages: dict[str, dict[str, str]], start: list[str]) -> set[str]:
    """Packages and all that they depend on; of alternatives that this machine has, the first."""
    providers: dict[str, str] = {}
    for name, fields in packages.items():
        for (virtual,) in named(fields.get("Provides", "")):
            providers.setdefault(virtual, name)
    found: set[str] = set()
    todo = list(start)
    while todo:
        name = todo.pop()
        if name in found or name not in packages:
            continue
        found.add(name)
        for alternatives in named(f"{packages[name].get('Pre-Depends', '')},{packages[name].get('Depends', '')}"):
            there = [one if one in packages else providers.get(one) for one in alternatives]
            todo += [one for one in there if one is not None][:1]
    return found


@pytest.fixture(scope="module")
def by_chance() -> set[str]:
    """The programs that this machine has and a bare one has not."""
    packages = installed()
    always = [
        name for name, fields in packages.items() if "Essential" in fields or fields.get("Priority") == "required"
    ]
    files: set[str] = set()
    for package in closure(packages, [*always, *BARE, *wanted()]):
        for path in (LISTS / f"{package}.list", *LISTS.glob(f"{package}:*.list")):
            if path.exists():
                files.update(os.path.realpath(line) for line in path.read_text().splitlines() if "bin/" in line)
    entries = [entry for place in PLACES for entry in os.scandir(place)]
    ours = {entry.name for entry in entries if os.path.realpath(entry.path) in files}
    return {entry.name for entry in entries} - ours


def started(path: Path) -> set[str]:
    """What a file seems to start: first words of lists, and commands in texts for a shell."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.List | ast.Tuple) and node.elts:
            first = node.elts[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r" -|;|\n", node.value):
            found.update(COMMAND.findall(node.value))
    return found


def given_to_engines(path: Path) -> set[str]:
    """What a file starts beside engines, on the host, whatever guests have."""
    tree = ast.parse(path.read_text())
    given = [node for node in ast.walk(tree) if isinstance(node, ast.arg)]
    engines = {node.arg for node in given if ast.unparse(node.annotation or node) == "Engines"}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.value if isinstance(node.func, ast.Attribute) else node.func
            if isinstance(called, ast.Name) and called.id in engines:
                found.add(str(node.args[0].value))
    return found


@pytest.mark.parametrize("tree", ["src", "hypervisor", "tests", "scripts"])
def test_every_program_that_is_started_is_one_that_setup_installs(tree: str, by_chance: set[str]) -> None:
    others = by_chance - IN_GUESTS - COMPILING - WORDS
    found = {
        f"{program} in {path.relative_to(ROOT)}"
        for path in (ROOT / tree).rglob("*.py")
        for program in started(path) & others
    }
    assert not found, "name the packages that have them in scripts/setup"


def test_every_program_beside_engines_is_one_that_setup_installs(by_chance: set[str]) -> None:
    given = {path: given_to_engines(path) for path in (ROOT / "tests").rglob("*.py")}
    assert {"podman", "docker", "ctr", "buildah"} <= set().union(*given.values())
    found = {f"{program} in {path.relative_to(ROOT)}" for path, words in given.items() for program in words & by_chance}
    assert not found, "name the packages that have them in scripts/setup"


def test_the_machine_is_told_apart_from_a_bare_one(by_chance: set[str]) -> None:
    """What the other test rests on: essential programs, ours, and those that a dependency brings are no chance."""
    assert not by_chance & {"sh", "mount", "dpkg", "python3", "qemu-system-x86_64", "nft", "crun", "runc", "conmon"}
