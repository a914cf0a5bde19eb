"""Processes that are added to a container are known by ids of which there is one each."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox import documents
from vmsandbox.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from vmsandbox.paths import SandboxPaths
from vmsandbox.supervisor import execution
from vmsandbox.supervisor.container import Container

if TYPE_CHECKING:
    from pathlib import Path

ID = "ab" * 32


@pytest.fixture
def container(tmp_path: Path) -> Container:
    around = SimpleNamespace(paths=SandboxPaths(tmp_path))
    os.mkdir(around.paths.containers_dir)
    return Container(cast("Any", around), {"id": ID, "name": "web", "status": "running"})


async def test_a3_an_exec_s_id_is_there_once_and_noted_with_the_pid_that_stands_for_it(container: Container) -> None:
    service = SimpleNamespace(container=lambda _request: container)
    standin = {"pid": 7, "start_time": 70}
    first = container.add_exec("one", standin=standin)
    with pytest.raises(AlreadyExistsError, match="an exec with id 'one' already exists in container 'web'"):
        await execution.exec_(cast("Any", service), {"exec": "one", "standin": {"pid": 8, "start_time": 80}})
    assert container.process("one") is first
    assert container.process("") is container.init
    noted = documents.read(container.around.paths.container_file(ID))["execs"]
    assert noted == {"one": {"terminal": False, "standin": standin}}
    container.drop_exec(first)
    with pytest.raises(NotFoundError, match="no such exec"):
        container.process("one")


@pytest.mark.parametrize("exec_id", ["", None, "../x", "a/b", "x" * 129])
async def test_a3_what_names_an_exec_is_an_id(container: Container, exec_id: str | None) -> None:
    service = SimpleNamespace(container=lambda _request: container)
    with pytest.raises(InvalidArgumentError, match="'exec'"):
        await execution.exec_(cast("Any", service), {"exec": exec_id})
    assert container.execs == {}
