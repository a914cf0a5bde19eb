"""Containers made by real crun on this machine, through the host's client."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from tests.agent import harness
from tests.agent.hearing import hear
from vmsandbox.errors import (
    AlreadyExistsError,
    CommandNotExecutableError,
    CommandNotFoundError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
)
from vmsandbox.guest.client import AgentClient
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.deadline(60)
OUTPUT = pb.Stdio(stdout=True, stderr=True)


async def test_a_container_gets_its_input_and_its_output_and_exit_arrive(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sh", "-c", "echo before; cat; echo wrong >&2; exit 7"])
        async with agent.client.attach("web", "") as attachment:
            hearing = asyncio.create_task(hear(attachment))
            await attachment.send_input(0, b"some input\n", eof=True)
            heard = await hearing
        assert (heard.stdout, heard.stderr) == (b"before\nsome input\n", b"wrong\n")
        assert heard.exit is not None
        assert heard.exit.code == 7
        assert heard.accepted == len(b"some input\n")
        await agent.client.remove_container("web")
        assert await agent.client.containers() == []
        assert not (agent.base / "containers/web").exists()


async def test_an_exec_runs_as_a_user_of_the_image_with_what_init_has(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sleep", "1000"], stdio=pb.Stdio())
        document = json.dumps({"args": ["sh", "-c", "id; env; pwd"]}).encode()
        request = pb.ExecRequest(
            container_id="web",
            exec_id="one",
            process_json=document,
            inherit=True,
            user="web",
            default_home=True,
            stdio=OUTPUT,
        )
        await agent.client.exec(request, timeout=10)
        async with agent.client.attach("web", "one") as attachment:
            heard = await hear(attachment)
        assert b"uid=1000(web) gid=1001(web) groups=1001(web),2000(extra)" in heard.stdout
        assert b"HOME=/home/web\n" in heard.stdout
        assert b"PATH=/bin\n" in heard.stdout
        await agent.client.acknowledge("web", "one")
        with pytest.raises(NotFoundError):
            await agent.client.wait("web", "one")
        assert [*agent.base.rglob("exec-one*")] == []


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["nothing-like-this"], CommandNotFoundError),
        (["/no/such/file"], CommandNotFoundError),
        (["/etc/passwd"], CommandNotExecutableError),
        (["/bin"], CommandNotExecutableError),
        (["/bin/junk"], CommandNotExecutableError),
        (["/bin/script"], CommandNotExecutableError),
    ],
)
async def test_a_program_that_cannot_run_is_told_apart(
    directory: Path, argv: list[str], error: type[Exception]
) -> None:
    async with harness.running(directory) as agent:
        root = agent.rootfs()
        (root / "bin/junk").write_text("neither program nor script")
        (root / "bin/junk").chmod(0o755)
        (root / "bin/script").write_text("#!/no/such/interpreter\n")
        (root / "bin/script").chmod(0o755)
        with pytest.raises(error):
            await agent.create("web", argv, root=root)
        assert await agent.client.containers() == []
        await agent.create("other", ["sleep", "1000"], root=root)
        with pytest.raises(error):
            await agent.client.exec(
                pb.ExecRequest(
                    container_id="other", exec_id="x", process_json=json.dumps({"args": argv}).encode(), inherit=True
                ),
                timeout=10,
            )
        await agent.create("web", ["true"], root=root)


async def test_signals_reach_the_process_and_its_status_says_so(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"])
        async with agent.client.attach("web", "") as attachment:
            await hear(attachment, until=b"ready")
        await agent.client.signal("web", "", 15)
        assert (await agent.client.wait("web", "")).code == 3
        with pytest.raises(InvalidStateError) as caught:
            await agent.client.signal("web", "", 15)
        assert caught.value.state == "stopped"
        await agent.create("other", ["sleep", "1000"])
        await agent.client.signal("other", "", 9, all=True)
        status = await agent.client.wait("other", "")
        assert (status.code, status.signal) == (137, 9)


async def test_states_and_names_are_respected(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sleep", "1000"], start=False)
        with pytest.raises(AlreadyExistsError):
            await agent.create("web", ["true"])
        with pytest.raises(InvalidStateError):
            await agent.client.pause("web")
        await agent.client.start_container("web")
        with pytest.raises(InvalidStateError):
            await agent.client.start_container("web")
        with pytest.raises(InvalidStateError):
            await agent.client.remove_container("web")
        with pytest.raises(InvalidArgumentError):
            await agent.create("../up", ["true"])
        with pytest.raises(NotFoundError):
            await agent.client.remove_container("nobody")
        await agent.client.remove_container("web", force=True)


async def test_destroying_with_power_off_ends_the_agent(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.client.create_sandbox(pb.CreateSandboxRequest(sandbox_id="pod", entropy=bytes(32)), timeout=10)
        await agent.create("web", ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"])
        await agent.client.destroy_sandbox(power_off=True, grace=5, timeout=10)
        assert await agent.process.wait() == 0


async def test_processes_are_listed_with_their_user_and_exec(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sleep", "1000"], stdio=pb.Stdio())
        request = pb.ExecRequest(
            container_id="web", exec_id="one", process_json=b'{"args": ["sleep", "2000"]}', inherit=True, user="web"
        )
        await agent.client.exec(request, timeout=10)
        # crun answers before the processes that it made have become the programs.
        rows: dict[str, pb.ProcessRow] = {}
        while not {"sleep 1000", "sleep 2000"} <= rows.keys():
            rows = {row.command: row for row in await agent.client.processes("web")}
        init, extra = rows["sleep 1000"], rows["sleep 2000"]
        assert (init.pid, init.exec_id, init.user, init.uid) == (1, "", "root", 0)
        assert (extra.exec_id, extra.user, extra.uid) == ("one", "web", 1000)
        assert extra.rss_kib > 0
        assert extra.start_time_ns >= init.start_time_ns > 0


async def test_a_paused_container_stands_still_and_its_limits_can_change(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sleep", "1000"], stdio=pb.Stdio())
        await agent.client.pause("web")
        assert [row.status for row in await agent.client.containers()] == ["paused"]
        request = pb.ExecRequest(container_id="web", exec_id="one", process_json=b'{"args": ["true"]}', inherit=True)
        with pytest.raises(InvalidStateError):
            await agent.client.exec(request, timeout=10)
        request.ignore_paused = True
        await agent.client.exec(request, timeout=10)
        assert [row.status for row in await agent.client.containers()] == ["paused"]
        await agent.client.resume("web")
        assert (await agent.client.wait("web", "one")).code == 0
        await agent.client.update_container("web", json.dumps({"pids": {"limit": 33}}).encode())
        assert (await agent.client.stats("web")).pids_limit == 33
        await agent.client.pause("web")
        await agent.client.remove_container("web", force=True)


async def test_a_container_that_is_killed_for_memory_says_so(directory: Path) -> None:
    async with harness.running(directory) as agent:
        eat = "dd if=/dev/zero of=/dev/shm/x bs=1M count=200"
        document = harness.spec(["sh", "-c", f"sleep 0.1; exec {eat}"], agent.rootfs())
        document["mounts"].append({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"})
        document["linux"]["resources"] = {"memory": {"limit": 16 << 20, "swap": 16 << 20}}
        events = agent.client.events()
        await agent.create("web", [], spec=document, stdio=pb.Stdio())
        status = await agent.client.wait("web", "")
        assert (status.code, status.signal, status.oom_killed) == (137, 9, True)
        told = set()
        async for event in events:
            told.add(event.WhichOneof("what"))
            if told == {"oom", "exited"}:
                break
        await events.aclose()
        assert [row.oom_kills > 0 for row in await agent.client.containers()] == [True]


async def test_containers_can_share_their_processes(directory: Path) -> None:
    async with harness.running(directory) as agent:
        request = pb.CreateSandboxRequest(sandbox_id="pod", shared_pid_namespace=True)
        await agent.client.create_sandbox(request, timeout=10)
        await agent.create("one", ["sleep", "1111"], stdio=pb.Stdio())
        await agent.create("two", ["sh", "-c", "cat /proc/*/cmdline"])
        async with agent.client.attach("two", "") as attachment:
            heard = await hear(attachment)
        assert b"sleep\x001111" in heard.stdout
        # An init that goes takes its container's other processes along, but not the namespace's.
        await agent.create("three", ["sh", "-c", "sleep 2222 & sleep 0.1"], stdio=pb.Stdio())
        await agent.client.wait("three", "")
        await agent.client.remove_container("three")
        assert [row.status for row in await agent.client.containers()] == ["running", "stopped"]


async def test_another_connection_sees_what_happened_before(directory: Path) -> None:
    """What a supervisor needs that takes over."""
    async with harness.running(directory) as agent:
        await agent.create("web", ["sh", "-c", "echo text; exit 4"])
        assert (await agent.client.wait("web", "")).code == 4
        async with agent.client.attach("web", "") as attachment:
            await hear(attachment, acknowledge=False)
        second = directory / "second"
        second.mkdir()
        async with AgentClient.dialled(harness.through_socket(agent.socket), directory=second) as other:
            (row,) = await other.containers()
            (process,) = row.processes
            assert (row.status, process.started, process.exit.code) == ("stopped", True, 4)
            assert process.stdout_offset == len("text\n")
            events = other.events()
            assert (await anext(events)).exited.code == 4
            await events.aclose()
            async with other.attach("web", "") as attachment:
                assert (await hear(attachment)).stdout == b"text\n"
