"""Imports point down, siblings ignore each other, and every dependency has one home.

`LAYERS` is the picture in docs/design.md; a package that is not in it may not exist.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "vmsandbox": ROOT / "src" / "vmsandbox",
    "vmsandbox_hypervisor": ROOT / "hypervisor" / "vmsandbox_hypervisor",
    "vmsandbox_agent": ROOT / "agent" / "vmsandbox_agent",
    "vmsandbox_protocol": ROOT / "agent" / "vmsandbox_protocol",
}

#: From the top down; a part may import only from the rows below its own.
LAYERS: list[set[str]] = [
    {"vmsandbox.cli", "vmsandbox.admin"},
    {"vmsandbox.supervisor"},
    {"vmsandbox.resources", "vmsandbox.guest", "vmsandbox.guestbuild"},
    {"vmsandbox_hypervisor", "vmsandbox_protocol", "vmsandbox.oci", "vmsandbox.config"},
    {"vmsandbox.lent"},
    {"vmsandbox.remains"},
    {"vmsandbox.records"},
    {"vmsandbox.oci.annotations"},
    {
        "vmsandbox.arguments",
        "vmsandbox.cache",
        "vmsandbox.cgroups",
        "vmsandbox.documents",
        "vmsandbox.locks",
        "vmsandbox.machines",
        "vmsandbox.paths",
        "vmsandbox.surroundings",
        "vmsandbox.wire",
        "vmsandbox.log",
    },
    {"vmsandbox.plainjson", "vmsandbox.plainsocket"},
    {"vmsandbox.errors", "vmsandbox"},
]
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}

#: Parts whose imports are restricted further than the table says.
ONLY: dict[str, set[str]] = {
    "vmsandbox.cli": {
        "vmsandbox",
        "vmsandbox.arguments",
        "vmsandbox.cgroups",
        "vmsandbox.documents",
        "vmsandbox.errors",
        "vmsandbox.lent",
        "vmsandbox.locks",
        "vmsandbox.oci.annotations",
        "vmsandbox.paths",
        "vmsandbox.plainjson",
        "vmsandbox.plainsocket",
        "vmsandbox.records",
        "vmsandbox.remains",
        "vmsandbox.surroundings",
        "vmsandbox.wire",
    },
    "vmsandbox_hypervisor": set(),
    "vmsandbox_agent": {"vmsandbox_protocol"},
    "vmsandbox_protocol": set(),
}

#: Third-party package -> the modules (or parts, with a trailing dot) that may import it.
HOMES: dict[str, tuple[str, ...]] = {
    "qemu": ("vmsandbox_hypervisor.qemu.monitor",),
    "grpc": ("vmsandbox.guest.", "vmsandbox_protocol."),
    "h2": ("vmsandbox_agent.http2",),
    "google": ("vmsandbox.guest.", "vmsandbox_agent.rpc", "vmsandbox_protocol."),
    "pyroute2": ("vmsandbox.resources.network.rtnl",),
    "pydantic": ("vmsandbox.oci.", "vmsandbox.config."),
    "psutil": (),  # for tests and benchmarks
    "pytest": ("vmsandbox_hypervisor.testing",),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, directory in SOURCES.items():
        for path in sorted(directory.rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found.append((".".join((package, *parts)), path))
    return found


def part_of(module: str) -> str:
    """The row entry a module belongs to: the longest name in the table that is a prefix of it."""
    fits = [part for part in RANK if module == part or module.startswith(part + ".")]
    return max(fits, key=len, default=module.split(".", maxsplit=1)[0])


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def ours(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in SOURCES


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(module: str, path: Path) -> None:
    part = part_of(module)
    for name in filter(ours, imports(path)):
        other = part_of(name)
        if other == part:
            continue
        if part in ONLY:
            assert other in ONLY[part], f"{module} may not import {name}"
        else:
            assert RANK[other] > RANK[part], f"{module} may not import {name}"


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_every_dependency_has_one_home(module: str, path: Path) -> None:
    for name in imports(path):
        homes = HOMES.get(name.split(".", maxsplit=1)[0])
        if homes is not None:
            assert any(module == home or (home.endswith(".") and module.startswith(home)) for home in homes), (
                f"{module} may not import {name}: its home is {homes}"
            )
