"""Containers made by real crun on this machine, through the host's client."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from tests.agent import harness
from tests.agent.conftest import hear
from vmsandbox.errors import (
    AlreadyExistsError,
    CommandNotExecutableError,
    CommandNotFoundError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
)
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
