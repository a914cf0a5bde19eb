"""The network that config.json names: the host's is never touched, and a pod's has the settings it asks for."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

from tests.harness.bundles import edited
from tests.harness.members import Members
from tests.harness.netns import namespace

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.bundles import Runtime

SETTINGS = {
    "net.ipv4.ip_unprivileged_port_start": "81",
    "net/core/somaxconn": "333",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv4.ping_group_range": "0 7",
}


def shown() -> str:
    """What the network of this process looks like; how long addresses live is left out."""
    script = "ip -o link; ip -o addr | sed 's/valid_lft.*//'; ip route show table all; ip rule; tc qdisc"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False).stdout


def joining(path: str) -> Any:
    def change(document: dict[str, Any]) -> None:
        for each in document["linux"]["namespaces"]:
            if each["type"] == "network":
                each["path"] = path

    return change


def test_the_hosts_network_is_refused_before_anything_is_touched(runtime: Runtime, box_rootfs: Path) -> None:
    before = shown()
    path = f"/proc/{os.getpid()}/ns/net"
    bundle = edited(runtime.bundle("alone", box_rootfs, "true"), joining(path))
    assert "cannot join the host's network" in runtime.refused("create", "--bundle", str(bundle), "alone")
    assert runtime.leftovers() == []
    assert shown() == before


def test_a_member_has_the_network_of_its_pod_and_no_other(runtime: Runtime, box_rootfs: Path) -> None:
    members = Members(runtime, box_rootfs)
    with namespace("other") as other:
        before = other.state(), shown()
        for number, path in enumerate((f"/proc/{os.getpid()}/ns/net", other.path)):
            bundle = members.bundle(f"bad{number}", joining(path), "true")
            said = runtime.refused("create", "--bundle", str(bundle), f"bad{number}")
            assert said.startswith(f"'linux.namespaces' joins the network namespace '{path}', which is not the pod's")
            assert members.remains_alone()
        assert (other.state(), shown()) == before
    bundle = members.bundle("gone", joining(other.path), "true")
    assert f"cannot use the network namespace '{other.path}'" in runtime.refused(
        "create", "--bundle", str(bundle), "gone"
    )
    # By another name it is still the pod's.
    link = runtime.scratch / "net"
    link.symlink_to(f"/proc/{members.pid}/ns/net")
    assert (
        runtime.ok("run", "--bundle", str(members.bundle("good", joining(str(link)), "echo", "in")), "good") == "in\n"
    )


def test_a_pods_network_has_the_settings_that_its_first_container_asks_for(runtime: Runtime, box_rootfs: Path) -> None:
    files = " ".join(name.replace(".", "/") for name in SETTINGS)
    bundle = runtime.bundle("one", box_rootfs, "sh", "-c", f"cd /proc/sys; cat {files}")
    edited(bundle, lambda document: document["linux"].update(sysctl=SETTINGS))
    said = runtime.ok("run", "--bundle", str(bundle), "one").splitlines()
    assert [" ".join(line.split()) for line in said] == [*SETTINGS.values()]
