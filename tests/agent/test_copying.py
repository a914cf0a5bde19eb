"""Files into and out of containers, whatever the container and the archive try."""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.agent import harness
from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from vmsandbox.guest.client import AgentClient

pytestmark = pytest.mark.deadline(60)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 100_000):
        yield data[at : at + 100_000]


async def fetch(client: AgentClient, container: str, path: str, *, follow_link: bool = False) -> tarfile.TarFile:
    data = b""
    async for piece in client.copy_out(container, path, follow_link=follow_link, timeout=20):
        data += piece
    return tarfile.open(fileobj=io.BytesIO(data))


async def test_a_tree_comes_back_as_it_went_in(directory: Path) -> None:
    big = os.urandom(3_000_000)
    data = archive(
        (entry("tree", tarfile.DIRTYPE, mode=0o750, uid=70000, gid=5, mtime=1000), b""),
        (entry("tree/big", mode=0o4711, uid=1, gid=2, mtime=12345), big),
        (entry("tree/again", tarfile.LNKTYPE, linkname="tree/big"), b""),
        (entry("tree/link", tarfile.SYMTYPE, linkname="/no/where"), b""),
        (entry("tree/pipe", tarfile.FIFOTYPE, mode=0o600), b""),
        (entry("tree/deep/er/file"), b"text"),
        (entry("tree/" + "n" * 200, pax_headers={"SCHILY.xattr.user.colour": "blue"}), b""),
    )
    async with harness.running(directory) as agent:
        await agent.create("web", ["sleep", "1000"], stdio=pb.Stdio())
        assert await agent.client.copy_in("web", "/tmp", pieces(data), timeout=20) == len(data)
        tar = await fetch(agent.client, "web", "/tmp/tree")
        back = {member.name: member for member in tar.getmembers()}
        assert (back["tree"].mode, back["tree"].uid, back["tree"].mtime) == (0o750, 70000, 1000)
        content = tar.extractfile("tree/again" if back["tree/again"].isreg() else "tree/big")
        assert content is not None
        assert content.read() == big
        regular = back["tree/again"] if back["tree/again"].isreg() else back["tree/big"]
        assert (regular.mode, regular.uid, regular.gid, regular.mtime) == (0o4711, 1, 2, 12345)
        assert sorted([back["tree/big"].islnk(), back["tree/again"].islnk()]) == [False, True]
        assert back["tree/link"].linkname == "/no/where"
        assert back["tree/pipe"].isfifo()
        assert back["tree/deep/er/file"].size == 4
        assert ("tree/" + "n" * 200) in back


async def test_symlinks_of_the_container_do_not_lead_out_of_it(directory: Path) -> None:
    secret = directory / "secret"
    secret.write_text("of the guest")
    outside = directory / "outside"
    outside.mkdir()
    async with harness.running(directory) as agent:
        root = agent.rootfs()
        (root / "up").symlink_to("../../../../../../.." + str(outside))
        (root / "absolute").symlink_to(str(secret))
        await agent.create("web", ["sleep", "1000"], stdio=pb.Stdio(), root=root)
        data = archive((entry("file"), b"text"))
        with pytest.raises(NotFoundError):
            await agent.client.copy_in("web", "/up", pieces(data), timeout=10)
        with pytest.raises(NotFoundError):
            await fetch(agent.client, "web", "/absolute", follow_link=True)
        link = (await fetch(agent.client, "web", "/absolute")).getmembers()[0]
        assert link.issym()
        # A link within the archive, and an entry through it, stay inside too.
        data = archive((entry("d", tarfile.SYMTYPE, linkname=str(outside)), b""), (entry("d/file"), b"text"))
        with pytest.raises(SandboxError, match="cannot write below"):
            await agent.client.copy_in("web", "/tmp", pieces(data), timeout=10)
        assert [*outside.iterdir()] == []


@pytest.mark.parametrize("name", ["../escape", "a/../../escape", "/../escape"])
async def test_names_that_lead_out_are_refused(directory: Path, name: str) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sleep", "1000"], stdio=pb.Stdio())
        with pytest.raises(InvalidArgumentError, match="leads out"):
            await agent.client.copy_in("web", "/tmp", pieces(archive((entry(name), b"x"))), timeout=10)
        assert not (agent.base / "root-web/escape").exists()


async def test_what_is_no_archive_and_what_is_not_there_are_said(directory: Path) -> None:
    async with harness.running(directory) as agent:
        await agent.create("web", ["sleep", "1000"], stdio=pb.Stdio())
        with pytest.raises(InvalidArgumentError, match="not a tar archive"):
            await agent.client.copy_in("web", "/tmp", pieces(b"nonsense" * 1000), timeout=10)
        with pytest.raises(NotFoundError):
            await agent.client.copy_in("web", "/missing", pieces(b""), timeout=10)
        with pytest.raises(NotFoundError):
            await fetch(agent.client, "web", "/missing")
        with pytest.raises(NotFoundError):
            await fetch(agent.client, "nobody", "/tmp")


async def test_mounts_of_a_running_container_are_seen(directory: Path) -> None:
    async with harness.running(directory) as agent:
        document = harness.spec(["sh", "-c", "echo inside > /tmp/file; sleep 1000"], agent.rootfs())
        document["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
        await agent.create("web", [], spec=json.loads(json.dumps(document)), stdio=pb.Stdio())
        await agent.client.copy_in("web", "/tmp", pieces(archive((entry("other"), b"text"))), timeout=10)
        names = (await fetch(agent.client, "web", "/tmp/")).getnames()
        assert "tmp/other" in names
        assert not (agent.base / "root/tmp/other").exists()
