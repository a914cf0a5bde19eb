"""What LinuxResources say of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.supervisor import bundled

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """Of a host with memory on two nodes, and a third that has none."""
    listed = tmp_path / "has_memory"
    listed.write_text("0,2\n")
    return listed


@pytest.mark.parametrize("mems", ["", None, "0,2", "2,0", " 0, 2-2"])
def test_all_memory_nodes_may_be_named_or_none(nodes: Path, mems: str | None) -> None:
    bundled.require_mems({"cpu": {"mems": mems}}, nodes=nodes)
    bundled.require_mems({"cpu": None}, nodes=nodes)
    bundled.require_mems({}, nodes=nodes)


@pytest.mark.parametrize(("mems", "node"), [("1", 1), ("0-2", 1), ("0,2-3", 3)])
def test_a_memory_node_that_is_not_there_is_refused(nodes: Path, mems: str, node: int) -> None:
    with pytest.raises(
        InvalidBundleError, match=rf"^'linux.resources.cpu.mems' is '{mems}': .* no memory node {node}$"
    ):
        bundled.require_mems({"cpu": {"mems": mems}}, nodes=nodes)


def test_some_of_the_memory_nodes_are_refused_because_nothing_keeps_the_machine_there(nodes: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"^'linux.resources.cpu.mems' is '2', .* name all of them, '0,2', or"):
        bundled.require_mems({"cpu": {"mems": "2"}}, nodes=nodes)


def test_a_list_that_is_none_is_refused(nodes: Path) -> None:
    with pytest.raises(InvalidBundleError, match="is no list of memory nodes"):
        bundled.require_mems({"cpu": {"mems": "-"}}, nodes=nodes)


def test_a_kernel_without_memory_nodes_has_one(tmp_path: Path) -> None:
    bundled.require_mems({"cpu": {"mems": "0"}}, nodes=tmp_path / "none")
    with pytest.raises(InvalidBundleError, match="no memory node 1"):
        bundled.require_mems({"cpu": {"mems": "0-1"}}, nodes=tmp_path / "none")
