"""What of an engine's config.json reaches the guest, what stays on the host, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from vmsandbox.cli.runtime.static import default_spec
from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import bundle, translate

if TYPE_CHECKING:
    from pathlib import Path


def made(tmp_path: Path, change: Any = None, *, kind: Any = "single") -> translate.Translated:
    spec = copy.deepcopy(default_spec())
    if change:
        change(spec)
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(spec))
    return translate.translated(bundle.load(tmp_path), kind=kind, cache=None)


def kinds(parts: translate.Translated) -> list[str]:
    return [namespace["type"] for namespace in parts.document["linux"]["namespaces"]]


def test_the_pods_namespaces_are_the_machines_own(tmp_path: Path) -> None:
    parts = made(tmp_path)
    assert sorted(kinds(parts)) == ["cgroup", "mount", "pid"]
    assert "hostname" not in parts.document


def test_a_member_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    def change(spec: dict[str, Any]) -> None:
        for namespace in spec["linux"]["namespaces"]:
            if namespace["type"] in ("network", "ipc"):
                namespace["path"] = "/proc/1/ns/x"

    parts = made(tmp_path, change, kind="container")
    assert sorted(kinds(parts)) == ["cgroup", "mount", "pid", "uts"]
    assert parts.document["hostname"] == "vmsandbox"


def test_what_is_the_hosts_stays_there(tmp_path: Path) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["linux"].update(cgroupsPath="/x/y", mountLabel="l")
        spec["process"].update(apparmorProfile="p", selinuxLabel="l")
        spec["hooks"] = {"prestart": [{"path": "/bin/true"}], "startContainer": [{"path": "/bin/in"}]}
        spec["annotations"] = {"run.oci.handler": "krun"}
        spec["linux"]["resources"]["cpu"] = {"cpus": "3", "mems": "0", "shares": 0, "quota": 20000, "period": 10000}

    parts = made(tmp_path, change)
    linux = parts.document["linux"]
    assert not {"cgroupsPath", "mountLabel"} & set(linux)
    assert not {"apparmorProfile", "selinuxLabel"} & set(parts.document["process"])
    assert parts.document["hooks"] == {"startContainer": [{"path": "/bin/in"}]}
    assert "annotations" not in parts.document
    assert linux["resources"]["cpu"] == {"quota": 20000, "period": 10000}


def test_bind_mounts_are_shared_and_put_where_they_are_in_the_guest(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()

    def change(spec: dict[str, Any]) -> None:
        spec["mounts"].append({"destination": "/s", "type": "none", "source": "source", "options": ["rbind", "ro"]})

    parts = made(tmp_path, change)
    assert [(source.destination, source.read_only) for source in parts.sources] == [("/", False), ("/s", True)]
    document = parts.completed(lambda number: f"/guest/{number}")
    assert document["root"]["path"] == "/guest/0"
    assert document["mounts"][-1] == {
        "destination": "/s",
        "type": "bind",
        "source": "/guest/1",
        "options": ["rbind", "ro"],
    }


def test_the_last_shared_memory_wins_and_is_the_guests(tmp_path: Path) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["mounts"].append({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind"]})

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    alone = [m for m in made(tmp_path / "a", change).document["mounts"] if m["destination"] == "/dev/shm"]
    assert [mount["type"] for mount in alone] == ["tmpfs"]
    in_pod = [m for m in made(tmp_path / "b", change, kind="sandbox").document["mounts"] if m["source"] == "/dev/shm"]
    assert [mount["type"] for mount in in_pod] == ["bind"]


def test_sysctls_are_the_pods(tmp_path: Path) -> None:
    parts = made(tmp_path, lambda spec: spec["linux"].update(sysctl={"net/ipv4/ip_forward": "1"}))
    assert parts.sysctls == {"net.ipv4.ip_forward": "1"}
    assert "sysctl" not in parts.document["linux"]


def _without(kind: str) -> Any:
    def change(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != kind]

    return change


def _joining(kind: str) -> Any:
    def change(spec: dict[str, Any]) -> None:
        next(each for each in spec["linux"]["namespaces"] if each["type"] == kind)["path"] = "/proc/1/ns/x"

    return change


def _linux(**members: Any) -> Any:
    return lambda spec: spec["linux"].update(members)


def _resources(**members: Any) -> Any:
    return lambda spec: spec["linux"]["resources"].update(members)


def _mount(**members: Any) -> Any:
    return lambda spec: spec["mounts"].append({"destination": "/m", **members})


@pytest.mark.parametrize(
    ("change", "member"),
    [
        (_without("network"), "linux.namespaces"),
        (_without("pid"), "linux.namespaces"),
        (_without("ipc"), "linux.namespaces"),
        (_joining("pid"), "linux.namespaces"),
        (_joining("ipc"), "linux.namespaces"),
        (_joining("uts"), "linux.namespaces"),
        (lambda spec: spec["linux"]["namespaces"].append({"type": "user"}), "user namespace"),
        (_linux(uidMappings=[{"containerID": 0, "hostID": 1, "size": 1}]), "linux.uidMappings"),
        (_linux(intelRdt={"closID": "x"}), "linux.intelRdt"),
        (_linux(sysctl={"vm.swappiness": "1"}), "linux.sysctl"),
        (_linux(devices=[{"type": "b", "path": "/dev/sda", "major": 8, "minor": 0}]), "linux.devices"),
        (_linux(devices=[{"type": "c", "path": "/dev/vfio/1", "major": 8, "minor": 0}]), "linux.devices"),
        (_linux(seccomp={"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}), "linux.seccomp.listenerPath"),
        (_resources(memory={"disableOOMKiller": True}), "disableOOMKiller"),
        (_resources(cpu={"realtimeRuntime": 1}), "realtimeRuntime"),
        (_resources(network={"classID": 1}), "linux.resources.network"),
        (_resources(rdma={"x": {"hcaHandles": 1}}), "linux.resources.rdma"),
        (
            _resources(blockIO={"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}),
            "throttleReadBpsDevice",
        ),
        (lambda spec: spec.update(hooks={"createContainer": [{"path": "/x"}]}), "hooks.createContainer"),
        (lambda spec: spec["process"].update(scheduler={"policy": "SCHED_FIFO"}), "process.scheduler"),
        (
            lambda spec: spec["process"].update(ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 1}),
            "process.ioPriority",
        ),
        (_mount(type="nfs", source="host:/x"), "mounts[7].type"),
        (_mount(type="bind", source="/dev/null", options=["bind"]), "mounts[7]"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_it(tmp_path: Path, change: Any, member: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        made(tmp_path, change)
    assert member in str(raised.value)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match="/no/such"):
        made(tmp_path, _mount(type="bind", source="/no/such", options=["bind"]))


def test_zeros_of_an_update_mean_nothing() -> None:
    given = {"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "cpus": ""}, "pids": {"limit": 0}, "blockIO": {}}
    assert translate.guest_resources(given) == {}
