"""Behaviour B4: what was plugged while the machine ran is known to the next supervisor as what it was."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.cli import kill
from vmsandbox import remains

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.cli import Cli

pytestmark = pytest.mark.cloned


def described(cli: Cli) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(cli.ok("pod", "inspect", "p"))
    return found[0]


def inside(cli: Cli, name: str, script: str) -> str:
    return cli.ok("exec", name, "sh", "-c", script).strip()


#: how many disks and shares the guest has
PLUGGED = "ls /sys/block | grep -c vd; ls /sys/bus/virtio/drivers/{driver} | grep -c ^virtio"


@pytest.mark.parametrize(("kind", "driver"), [("virtio-fs", "virtiofs"), ("9p", "9pnet_virtio")])
def test_b4_what_was_plugged_into_a_running_machine_is_known_as_what_it_is_after_a_takeover(
    cli: Cli, box: str, tmp_path: Path, pod_template: None, kind: str, driver: str
) -> None:
    (tmp_path / "disk").write_bytes(b"mine".ljust(1 << 20, b"\0"))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("the host's\n")
    given = ("-v", f"{tmp_path}/tree:/data", "--device", f"{tmp_path}/disk:/dev/mine:r")
    cli.ok("pod", "create", "--name", "p", "--shared-fs", kind)
    cli.ok("run", "-d", "--pod", "p", "--name", "stays", box, "sleep", "100000")
    plugged = PLUGGED.format(driver=driver)
    without = cli("exec", "stays", "sh", "-c", plugged).stdout.split()
    read = "cat /data/file; head -c 4 /dev/mine"
    cli.ok("run", "-d", "--pod", "p", "--name", "goes", *given, box, "sleep", "100000")
    before = {key: cli.inspect("goes")[key] for key in ("disks", "shares", "options")}
    assert before["shares"]["fs"] == kind
    assert sorted(before["disks"]) == ["device-0", "image", "scratch"]
    supervisor = described(cli)["supervisor"]["pid"]
    kill(supervisor)
    assert inside(cli, "goes", read) == "the host's\nmine"
    after = described(cli)
    assert after["supervisor"]["pid"] != supervisor
    assert {key: cli.inspect("goes")[key] for key in ("disks", "shares", "options")} == before
    # Each is given back as what it is by the one that did not plug it, and can be plugged again.
    for _ in range(2):
        assert cli.ok("rm", "-f", "goes") == "goes\n"
        assert cli("exec", "stays", "sh", "-c", plugged).stdout.split() == without
        shared = f"{after['run_directory']}/shared"
        assert [place for place in remains.mounts_below(shared) if place != shared] == []
        cli.ok("run", "-d", "--pod", "p", "--name", "goes", *given, box, "sleep", "100000")
        assert inside(cli, "goes", read) == "the host's\nmine"
