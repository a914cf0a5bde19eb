"""Images and writable layers as containers in real virtual machines see them."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness.cli import kill, wait_until_gone
from tests.unit.images.making import CHARACTER, FIFO, Member, directory, hard_link, layout, link, tar

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.cli import Cli

BUSYBOX = "/bin/busybox"
APPLETS = ("sh", "cat", "stat", "find", "sort", "dd", "sync", "sleep", "mkdir")
STAT = "%n|%f|%u|%g|%s|%Y|%h"


def layers() -> list[bytes]:
    with open(BUSYBOX, "rb") as file:
        busybox = file.read()
    base = tar(
        directory("./", mode=0o755, mtime=5),
        *(directory(name, mode=0o755, mtime=6) for name in ("bin", "dev", "proc", "sys", "etc", "data", "tmp")),
        Member("bin/busybox", data=busybox, mode=0o755, mtime=7),
        *(link(f"bin/{applet}", "busybox", mtime=8) for applet in APPLETS),
        Member("data/hidden", data=b"hidden"),
        Member("data/changed", data=b"before"),
        Member("data/owned", data=b"o", mode=0o640, uid=4_000_000_000, gid=70_000, mtime=1_234_567_890),
        Member("data/setuid", data=b"s", mode=0o4755, uid=1000),
        hard_link("data/hard", "data/owned"),
        directory("data/opaque"),
        Member("data/opaque/below"),
    )
    top = tar(
        directory("data", mode=0o751, uid=12, mtime=9),
        Member("data/.wh.hidden"),
        Member("data/changed", data=b"after"),
        Member("data/opaque/.wh..wh..opq"),
        Member("data/opaque/above", data=b"above"),
        Member("data/fifo", FIFO, mode=0o622, mtime=10),
        Member("data/char", CHARACTER, device=(1, 3), mode=0o600, mtime=11),
        link("data/link", "../bin/busybox", uid=5, gid=6, mtime=12),
        Member("data/caf\u00e9 \u2603", data=b"name"),
    )
    return [base, top]


@pytest.fixture
def image(cli: Cli, tmp_path: Path) -> str:
    """An image of two layers that went through skopeo, as a docker archive."""
    made = layout(tmp_path / "lay", *layers(), name="it", config={"Cmd": ["sleep", "100000"], "Env": ["PATH=/bin"]})
    archive = tmp_path / "d.tar"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{made.path}:it", f"docker-archive:{archive}:whole:1"], check=True)
    return cli.ok("image", "import", "-q", f"docker-archive:{archive}").strip()


def expected(tmp_path: Path) -> list[str]:
    """What `stat` says about the tree that umoci makes of the image."""
    target = tmp_path / "umoci"
    subprocess.run(["umoci", "raw", "unpack", "--image", f"{tmp_path}/lay:it", target], check=True)
    lines = []
    for path in ["data", *(f"data/{name}" for name in os.listdir(target / "data")), "data/opaque/above", "bin/sh"]:
        status = os.lstat(target / path)
        size = 0 if path in ("data", "data/opaque") else status.st_size
        links = 0 if path in ("data", "data/opaque") else status.st_nlink
        facts = (path, f"{status.st_mode:x}", status.st_uid, status.st_gid, size, int(status.st_mtime), links)
        lines.append("|".join(str(fact) for fact in facts))
    return sorted(lines)


@pytest.mark.deadline(300)
def test_a_container_sees_its_image_as_umoci_unpacks_it_and_keeps_it_from_being_removed(
    cli: Cli, image: str, tmp_path: Path
) -> None:
    container = cli.ok("run", "-d", "--name", "sees", "whole:1").strip()
    script = f"cd /; find data bin/sh | sort | while read f; do stat -c '{STAT}' \"$f\"; done"
    seen = []
    for line in cli.ok("exec", "sees", "sh", "-c", script).splitlines():
        path, mode, uid, gid, size, mtime, links = line.split("|")
        if path in ("data", "data/opaque"):
            size = links = "0"  # differ from file system to file system
        seen.append("|".join((path, mode, uid, gid, size, mtime, links)))
    assert sorted(seen) == expected(tmp_path)
    assert (
        cli.ok("exec", "sees", "cat", "data/changed", "data/opaque/above", "data/caf\u00e9 \u2603") == "afterabovename"
    )

    assert cli.ok("exec", "sees", "sh", "-c", "echo mine >/data/changed; cat /data/changed") == "mine\n"
    refused = cli("image", "rm", "whole:1")
    assert refused.code == 1
    assert f"in use by container '{container[:12]}'" in refused.stderr
    assert json.loads(cli.ok("image", "inspect", image))[0]["used_by"] == [container]
    assert cli.ok("image", "rm", "--force", "whole:1") == "untagged: whole:1\n"
    assert cli.ok("exec", "sees", "cat", "/data/setuid") == "s"

    assert cli.ok("run", "--rm", image[:12], "cat", "/data/changed") == "after"
    cli.ok("rm", "-f", "sees")
    assert cli.ok("image", "rm", image) == f"deleted: {image}\n"


@pytest.mark.deadline(300)
def test_a_writable_layer_is_sound_after_its_machine_was_killed(cli: Cli, box: str, tmp_path: Path) -> None:
    writing = "echo kept >/kept; sync; while :; do echo $n >>/file; mkdir -p /d/$n; n=$((n+1)); done"
    container = cli.ok("run", "-d", "--name", "killed", box, "sh", "-c", f"n=0; {writing}").strip()
    cli.ok("exec", "killed", "sh", "-c", "until [ -e /d/50 ]; do sleep 0.1; done; sync")
    document = json.loads((cli.run_root / "s" / container[:12] / "sandbox.json").read_bytes())
    kill(document["vm"]["pid"])
    wait_until_gone(document["vm"]["pid"])
    (layer,) = (cli.data_root / "containers" / container).glob("*.img")
    copy = tmp_path / "copy.img"
    subprocess.run(["cp", "--sparse=always", layer, copy], check=True)
    # 0: the journal was enough; 1: something had to be repaired
    subprocess.run(["/usr/sbin/e2fsck", "-p", copy], check=True, capture_output=True)
    subprocess.run(["/usr/sbin/e2fsck", "-fn", copy], check=True, capture_output=True)
    dump = ["/usr/sbin/debugfs", "-R", "cat upper/kept", copy]
    assert subprocess.run(dump, capture_output=True, check=True).stdout == b"kept\n"
    assert copy.stat().st_blocks * 512 < 100 << 20
