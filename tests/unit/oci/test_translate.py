"""What of an engine's config.json reaches the guest, what stays on the host, and what is refused."""

from __future__ import annotations

import copy
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from vmsandbox.cli.runtime import static
from vmsandbox.cli.runtime.static import default_spec
from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import bindings, bundle, limits, translate

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


@pytest.mark.parametrize("members", [{"type": "bind"}, {"options": ["rbind"], "source": ""}])
def test_a_bind_mount_of_nothing_is_not_one_of_the_bundle(tmp_path: Path, members: dict[str, Any]) -> None:
    with pytest.raises(InvalidBundleError, match=r"^'mounts\[\d+\].source' is empty"):
        made(tmp_path, _mount(**members))


def test_a_relative_destination_begins_at_the_containers_root(tmp_path: Path) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["mounts"].append({"destination": "s/t", "type": "tmpfs", "source": "tmpfs"})
        spec["mounts"].append({"destination": "dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=7k"]})

    mounts = made(tmp_path, change).document["mounts"]
    assert mounts[-2]["destination"] == "/s/t"
    # It is the same place, and the last one wins there.
    (shm,) = (mount for mount in mounts if mount["destination"] == "/dev/shm")
    assert "size=7k" in shm["options"]


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
        (
            lambda spec: spec["linux"]["namespaces"].append({"type": "user", "path": "/proc/1/ns/user"}),
            "user namespace",
        ),
        (
            lambda spec: spec["linux"]["namespaces"].append({"type": "time", "path": "/proc/1/ns/time"}),
            "time namespace",
        ),
        (
            lambda spec: spec["linux"].update(
                namespaces=[*spec["linux"]["namespaces"], {"type": "user"}, {"type": "time"}],
                uidMappings=[{"containerID": 0, "hostID": 1, "size": 1}],
                gidMappings=[{"containerID": 0, "hostID": 1, "size": 1}],
            ),
            "time namespace beside a user namespace",
        ),
        (_linux(intelRdt={"closID": "x"}), "linux.intelRdt"),
        (_linux(sysctl={"vm.swappiness": "1"}), "linux.sysctl"),
        (_linux(devices=[{"type": "c", "path": "/dev/gpu", "major": 226, "minor": 0}]), "linux.devices[0]"),
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
        (_resources(blockIO={"leafWeight": 10}), "leafWeight"),
        (lambda spec: spec["process"].update(scheduler={"policy": "SCHED_ISO"}), "process.scheduler"),
        (_mount(type="nfs", source="host:/x"), "mounts[7].type"),
        (_mount(type="bind", source="/dev/hwrng", options=["bind"]), "mounts[7]"),
        (_mount(type="bind", source="/tmp", options=["bind", "idmap"]), "mounts[7]"),
        (_mount(type="bind", source="/tmp", options=["bind", "nosuch"]), "'mounts[7].options' has 'nosuch'"),
        (_mount(type="bind", source="/tmp", options=["bind", "nosymfollow"]), "mounts[7].options"),
        (_mount(type="tmpfs", source="tmpfs", options=["nosymfollow"]), "mounts[7].options"),
        (_linux(personality={"domain": "LINUX", "flags": ["X"]}), "linux.personality.flags"),
        (lambda spec: spec.update(vm={"kernel": {"path": "/boot/vmlinuz"}}), "'vm'"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_it(tmp_path: Path, change: Any, member: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        made(tmp_path, change)
    assert member in str(raised.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_linux(uidMappings=[{"containerID": 0, "hostID": 1, "size": 1}]), "has no user namespace"),
        (lambda spec: spec["linux"]["namespaces"].append({"type": "user"}), "'linux.uidMappings' is empty"),
        (_linux(timeOffsets={"boottime": {"secs": 1}}), "has no time namespace"),
        (_linux(seccomp={"defaultAction": "SCMP_ACT_NOTIFY"}), "'SCMP_ACT_NOTIFY' is of no use"),
        (
            _linux(
                seccomp={
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
                }
            ),
            "'SCMP_ACT_NOTIFY' is of no use",
        ),
        (
            _linux(
                seccomp={"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]},
            ),
            "WAIT_KILLABLE_RECV' is of no use",
        ),
        (lambda spec: spec["process"].update(scheduler={"policy": "SCHED_FIFO"}), "priority is '0'"),
        (lambda spec: spec["process"].update(scheduler={"policy": "SCHED_DEADLINE", "runtime": 3}), "SCHED_DEADLINE"),
        (lambda spec: spec["process"].update(scheduler={"policy": "SCHED_IDLE", "flags": ["X"]}), "flag 'X'"),
    ],
)
def test_what_contradicts_itself_is_named(tmp_path: Path, change: Any, complaint: str) -> None:
    with pytest.raises(InvalidBundleError, match=complaint):
        made(tmp_path, change)


def test_a_time_namespace_gets_its_offsets(tmp_path: Path) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"].append({"type": "time"})
        spec["linux"]["timeOffsets"] = {"monotonic": {"secs": 5, "nanosecs": 6}, "boottime": {"secs": -7}}

    parts = made(tmp_path, change)
    assert "time" in kinds(parts)
    assert parts.document["linux"]["timeOffsets"]["monotonic"] == {"secs": 5, "nanosecs": 6}


def test_a_user_namespace_comes_with_those_it_has_to_own(tmp_path: Path) -> None:
    mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]

    def change(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"].update(uidMappings=mapping, gidMappings=mapping)
        spec["linux"]["sysctl"] = {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1"}

    parts = made(tmp_path, change)
    assert sorted(kinds(parts)) == ["cgroup", "ipc", "mount", "pid", "user", "uts"]
    assert parts.document["hostname"] == "vmsandbox"
    # What its own namespaces hold is set in them, the network's for the pod.
    assert parts.document["linux"]["sysctl"] == {"kernel.shm_rmid_forced": "1"}
    assert parts.sysctls == {"net.ipv4.ip_forward": "1"}


def test_sockets_are_shared_and_common_devices_are_the_guests(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))

        def change(spec: dict[str, Any]) -> None:
            for source in (str(tmp_path / "socket"), "/dev/null", "/dev", "/sys/fs/cgroup"):
                spec["mounts"].append({"destination": f"/m{source}", "source": source, "options": ["bind"]})

        parts = made(tmp_path, change)
    assert [source.path for source in parts.sources[1:]] == [str(tmp_path / "socket")]
    kept = [mount["source"] for mount in parts.completed(str)["mounts"][-3:]]
    assert kept == ["/dev/null", "/dev", "/sys/fs/cgroup"]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match="/no/such"):
        made(tmp_path, _mount(type="bind", source="/no/such", options=["bind"]))


def test_the_options_of_a_bind_mount_are_those_that_are_told_of(tmp_path: Path) -> None:
    assert {*static.MOUNT_OPTIONS} == bindings.OPTIONS
    made(tmp_path, _mount(type="bind", source="/tmp", options=[*static.MOUNT_OPTIONS, ""]))


def test_zeros_of_an_update_mean_nothing() -> None:
    given = {"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "cpus": ""}, "pids": {"limit": 0}, "blockIO": {}}
    assert limits.guest_resources(given) == {}


def test_no_limit_of_processes_is_said_as_the_kernel_takes_it() -> None:
    assert limits.guest_resources({"pids": {"limit": -1}}) == {"unified": {"pids.max": "max"}}


@pytest.mark.parametrize(
    ("resources", "error", "said"),
    [
        ({"memory": {"swappiness": 5}}, UnsupportedError, r"'linux\.resources\.memory\.swappiness' is not supported"),
        ({"unified": {"colour.max": "1"}}, InvalidBundleError, r"'linux\.resources\.unified' names 'colour\.max'"),
        ({"unified": {"memory/x": "1"}}, InvalidBundleError, r"'linux\.resources\.unified' names 'memory/x'"),
    ],
)
def test_what_control_groups_do_not_have_is_named(resources: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        limits.guest_resources(resources)


def test_a_burst_and_an_idle_group_can_be_asked_for_and_undone() -> None:
    for number in (1, 0):
        assert limits.guest_resources({"cpu": {"burst": number, "idle": number, "shares": 0}}) == {
            "cpu": {"idle": number},
            "unified": {"cpu.max.burst": str(number)},
        }
    assert limits.guest_resources({"cpu": {"burst": None, "idle": None}}) == {}
