"""config.json and other documents of engines: types, bounds, errors that name the member."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vmsandbox.errors import InvalidBundleError
from vmsandbox.oci import bundle
from vmsandbox.oci.compose import compose
from vmsandbox.oci.document import checked
from vmsandbox.oci.linux import Resources
from vmsandbox.oci.options import run_options
from vmsandbox.oci.spec import Process, Spec

if TYPE_CHECKING:
    from pathlib import Path

#: every member of the specification for Linux, each with a value that is not its default
COMPLETE: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 25, "width": 80},
        "user": {"uid": 1, "gid": 2, "umask": 63, "additionalGids": [3]},
        "args": ["sh"],
        "env": ["A=b"],
        "cwd": "/w",
        "capabilities": {
            "bounding": ["CAP_CHOWN"],
            "effective": ["CAP_CHOWN"],
            "inheritable": ["CAP_CHOWN"],
            "permitted": ["CAP_CHOWN"],
            "ambient": ["CAP_CHOWN"],
        },
        "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 18446744073709551615}],
        "apparmorProfile": "a",
        "oomScoreAdj": -10,
        "scheduler": {
            "policy": "SCHED_DEADLINE",
            "nice": 1,
            "priority": 0,
            "flags": ["SCHED_FLAG_RESET_ON_FORK"],
            "runtime": 1,
            "deadline": 2,
            "period": 3000,
        },
        "selinuxLabel": "s",
        "noNewPrivileges": True,
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "h",
    "domainname": "d",
    "mounts": [
        {
            "destination": "/m",
            "type": "bind",
            "source": "/s",
            "options": ["ro"],
            "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
            "gidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
        }
    ],
    "hooks": {
        name: [{"path": "/h", "args": ["h"], "env": ["A=b"], "timeout": 5}]
        for name in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    },
    "annotations": {"a": "b"},
    "linux": {
        "uidMappings": [{"containerID": 0, "hostID": 1, "size": 9}],
        "gidMappings": [{"containerID": 0, "hostID": 1, "size": 9}],
        "sysctl": {"net.core.somaxconn": "1"},
        "cgroupsPath": "/c",
        "namespaces": [
            {"type": "mount"},
            {"type": "uts"},
            {"type": "network", "path": "/n"},
            {"type": "time"},
            {"type": "user"},
        ],
        "devices": [{"type": "c", "path": "/d", "major": 1, "minor": 2, "fileMode": 438, "uid": 1, "gid": 2}],
        "rootfsPropagation": "rslave",
        "maskedPaths": ["/m"],
        "readonlyPaths": ["/r"],
        "mountLabel": "l",
        "intelRdt": {
            "closID": "c",
            "l3CacheSchema": "s",
            "memBwSchema": "b",
            "enableCMT": True,
            "enableMBM": True,
        },
        "personality": {"domain": "LINUX32", "flags": ["f"]},
        "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 2}, "boottime": {"secs": -1, "nanosecs": 3}},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/l",
            "listenerMetadata": "m",
            "syscalls": [
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ALLOW",
                    "errnoRet": 2,
                    "args": [{"index": 5, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}],
                }
            ],
        },
        "resources": {
            "devices": [{"allow": True, "type": "c", "major": 1, "minor": 2, "access": "rwm"}],
            "memory": {
                "limit": 1,
                "reservation": 2,
                "swap": -1,
                "kernel": 3,
                "kernelTCP": 4,
                "swappiness": 5,
                "disableOOMKiller": True,
                "useHierarchy": True,
                "checkBeforeUpdate": True,
            },
            "cpu": {
                "shares": 2,
                "quota": -1,
                "burst": 2,
                "period": 3000,
                "realtimeRuntime": 4,
                "realtimePeriod": 5,
                "cpus": "0-1",
                "mems": "0",
                "idle": 1,
            },
            "pids": {"limit": -1},
            "blockIO": {
                "weight": 10,
                "leafWeight": 20,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 1, "leafWeight": 2}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 1}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
            "network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 1}]},
            "rdma": {"mlx5_1": {"hcaHandles": 1, "hcaObjects": 2}},
            "unified": {"memory.high": "1"},
        },
    },
}


def spec_of(document: Any) -> Spec:
    return checked(Spec, json.dumps(document).encode(), name="config.json")


def unknown_members(part: Any, where: str = "") -> list[str]:
    """The places at which a document has members that the models do not declare."""
    found = []
    if hasattr(part, "model_extra"):
        found += [f"{where}.{name}" for name in part.model_extra or {}]
        for name in type(part).model_fields:
            found += unknown_members(getattr(part, name), f"{where}.{name}")
    elif isinstance(part, tuple):
        for index, item in enumerate(part):
            found += unknown_members(item, f"{where}[{index}]")
    elif isinstance(part, dict):
        for key, item in part.items():
            found += unknown_members(item, f"{where}.{key}")
    return found


def test_the_models_know_every_member_and_lose_nothing() -> None:
    spec = spec_of(COMPLETE)
    assert unknown_members(spec) == []
    assert json.loads(spec.model_dump_json(by_alias=True, exclude_unset=True)) == COMPLETE


def test_members_nobody_knows_are_kept() -> None:
    document = {"ociVersion": "1.0.0", "root": {"path": "r"}, "vm": {"x": 1}, "linux": {"netDevices": {}}}
    spec = spec_of(document)
    assert spec.model_extra == {"vm": {"x": 1}}
    assert json.loads(spec.model_dump_json(by_alias=True, exclude_unset=True)) == document


def test_null_counts_as_absent() -> None:
    nulls = {"ociVersion": "1.0.0", "root": {"path": "r"}, "mounts": None, "process": None, "linux": {"sysctl": None}}
    spec = spec_of(nulls)
    assert (spec.mounts, spec.process, spec.linux.sysctl) == ((), None, {})


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        spec_of(COMPLETE).hostname = "x"  # type: ignore[misc]


def test_what_is_composed_is_valid() -> None:
    made = compose({"Cmd": ["x"]}, run_options({"memory": "1g", "cpus": 2}), rootfs="/r", container_id="abc")
    spec = spec_of(made.spec)
    bundle.check(spec)
    assert unknown_members(spec) == []


def changed(path: str, value: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(COMPLETE))
    part: Any = document
    *parents, last = [int(each) if each.isdigit() else each for each in path.split(".")]
    for parent in parents:
        part = part[parent]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ociVersion", ..., "'ociVersion' is missing"),
        ("ociVersion", "2.0.0", "ociVersion '2.0.0' is not one that is understood"),
        ("root", ..., "'root' is missing"),
        ("root.path", "", "'root.path' string should have at least 1 character"),
        ("process.args", "sh", "'process.args' should be a valid array"),
        ("process.args.0", 3, "'process.args[0]' should be a valid string"),
        ("process.cwd", "w", "'process.cwd' has to be an absolute path"),
        ("process.cwd", ..., "'process.cwd' is missing"),
        ("process.user.uid", -1, "'process.user.uid' should be greater than or equal to 0"),
        ("process.user.uid", 1.0, "'process.user.uid' should be a valid integer"),
        ("process.user.uid", "1", "'process.user.uid' should be a valid integer"),
        ("process.user.uid", 2**32 - 1, "'process.user.uid' should be less than or equal to 4294967294"),
        ("process.user.additionalGids", [2**32 - 1], "'process.user.additionalGids[0]' should be less than or equal"),
        (
            "process.capabilities.effective",
            ["CAP_KILL"],
            "'process.capabilities': 'effective' has 'CAP_KILL', which is not in 'permitted'",
        ),
        ("process.capabilities.inheritable", ["cap_kill"], "'inheritable' has 'CAP_KILL', which is not in 'bounding'"),
        ("linux.uidMappings.0.size", 0, "'linux.uidMappings[0].size' should be greater than or equal to 1"),
        ("linux.resources.memory.limit", 2**40, None),
        (
            "linux.resources.memory",
            {"limit": 5, "swap": 4},
            "'linux.resources.memory': 'swap' is 4, below 'limit', which is 5: it is both together",
        ),
        ("linux.resources.cpu", {"shares": 1}, "'linux.resources.cpu': 'shares' is 1: 2 is the least, 262144 the most"),
        ("linux.resources.cpu", {"shares": 262_145}, "'shares' is 262145: 2 is the least"),
        ("linux.resources.cpu", {"period": 999}, "'period' is 999: 1000 is the least, 1000000 the most"),
        ("linux.resources.cpu", {"period": 1_000_001}, "'period' is 1000001: 1000 is the least"),
        ("linux.resources.cpu", {"quota": 999}, "'linux.resources.cpu': 'quota' is 999: 1000 is the least"),
        ("linux.resources.cpu", {"quota": 2000, "burst": 2001}, "'burst' is 2001, above 'quota', which is 2000"),
        ("linux.resources.cpu", {"shares": 0, "period": 0, "quota": -1, "burst": 5}, None),
        ("linux.resources.cpu.idle", 2, "'linux.resources.cpu.idle' should be less than or equal to 1"),
        ("linux.resources.pids.limit", 2**22 + 1, "'linux.resources.pids.limit' should be less than or equal to"),
        ("linux.seccomp.architectures.0", "SCMP_ARCH_X", "'architectures' has 'SCMP_ARCH_X', which is unknown"),
        ("linux.seccomp.defaultErrnoRet", 4095, "'linux.seccomp': 'defaultErrnoRet' is 4095: 4094 is the most"),
        (
            "linux.seccomp.syscalls.0",
            {"names": ["x"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4095},
            "'linux.seccomp.syscalls[0]': 'errnoRet' is 4095: 4094 is the most",
        ),
        ("process.terminal", 1, "'process.terminal' should be a valid boolean"),
        ("process.oomScoreAdj", 1001, "'process.oomScoreAdj' should be less than or equal to 1000"),
        ("process.rlimits.0.type", "CORE", "'process.rlimits[0].type' string should match pattern"),
        ("linux.namespaces.0.type", "disk", "'linux.namespaces[0].type' should be 'pid', 'network'"),
        ("linux.namespaces.0.type", "uts", "'linux': namespaces has more than one entry of type 'uts'"),
        ("linux.devices.0.major", ..., "'linux.devices[0]': device '/d' has no major or minor number"),
        ("linux.resources.memory.limit", "1g", "'linux.resources.memory.limit' should be a valid integer"),
        ("linux.seccomp.syscalls.0.args.0.index", 6, "'linux.seccomp.syscalls[0].args[0].index' should be less"),
        ("linux.seccomp.flags.0", "X", "'linux.seccomp.flags[0]' should be 'SECCOMP_FILTER_FLAG_TSYNC'"),
        ("linux.seccomp.listenerPath", ..., "'linux.seccomp': 'listenerMetadata' is of no use without 'listenerPath'"),
        ("linux.timeOffsets.tai", {}, "should be 'monotonic' or 'boottime'"),
        ("hooks.prestart.0.path", "h", "'hooks.prestart[0].path' has to be an absolute path"),
        ("annotations.a", 1, "'annotations.a' should be a valid string"),
        ("mounts.0.source", "a\0b", "'mounts[0].source' string should match pattern"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str | None) -> None:
    if message is None:
        spec_of(changed(path, value))
        return
    with pytest.raises(InvalidBundleError) as caught:
        spec_of(changed(path, value))
    assert str(caught.value).startswith("config.json is not valid: ")
    assert message in str(caught.value)


def test_many_errors_are_summed_up() -> None:
    with pytest.raises(InvalidBundleError, match=r"; and 7 more$"):
        spec_of(changed("process.args", list(range(10))))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(COMPLETE))
    return tmp_path


def test_a_bundle_is_loaded(directory: Path) -> None:
    loaded = bundle.load(directory)
    assert loaded.rootfs == directory / "rootfs"
    assert loaded.document == COMPLETE
    assert loaded.spec.hostname == "h"


def test_an_absolute_root_is_taken_as_it_is(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (directory / "config.json").write_text(json.dumps(changed("root.path", str(elsewhere))))
    assert bundle.load(directory).rootfs == elsewhere


def mapped(*ranges: tuple[int, int, int], **user: Any) -> dict[str, Any]:
    """A document whose ids of users are these."""
    made = changed("process.user", {"uid": 0, "gid": 0, **user})
    names = ("containerID", "hostID", "size")
    made["linux"]["uidMappings"] = [dict(zip(names, each, strict=True)) for each in ranges]
    return made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "invalid JSON: EOF while parsing"),
        (json.dumps(COMPLETE).encode()[:500], "invalid JSON: EOF while parsing"),
        (b"[]", "the document should be an object"),
        (b'{"hostname": "\xff"}', "is not UTF-8 at byte 14"),
        (b"[" * 100_000, "invalid JSON: recursion limit exceeded"),
        (b" " * (16 * 1024 * 1024 + 1), "is larger than 16777216 bytes"),
        (json.dumps(changed("process.args", [])).encode(), "'process.args' is empty: there is no program to run"),
        (json.dumps(changed("linux.namespaces", [])).encode(), "'linux.namespaces' has no mount namespace"),
        (json.dumps(changed("linux.namespaces.1", {"type": "pid"})).encode(), "'hostname' is set but"),
        (json.dumps(changed("root.path", "none")).encode(), "/none' is not a directory"),
        (json.dumps(changed("hostname", "x" * 65)).encode(), "'hostname' is longer than 64 bytes"),
        (json.dumps(changed("domainname", "é" * 33)).encode(), "'domainname' is longer than 64 bytes"),
        (json.dumps(mapped((0, 0, 10), (5, 100, 10))).encode(), "'linux.uidMappings' has ranges that overlap"),
        (json.dumps(mapped((0, 0, 10), (10, 9, 10))).encode(), "'linux.uidMappings' has ranges that overlap"),
        (json.dumps(mapped((1, 0, 10))).encode(), "'linux.uidMappings' has no id 0 of the container"),
        (json.dumps(mapped((0, 0, 10), uid=10)).encode(), "'process.user.uid' is 10, which 'linux.uidMappings'"),
        (
            json.dumps(mapped((0, 0, 10), additionalGids=[0, 1, 70])).encode(),
            "'process.user.additionalGids' is 70, which 'linux.gidMappings' does not have",
        ),
    ],
)
def test_a_malformed_config_is_named(directory: Path, content: bytes, message: str) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(InvalidBundleError) as caught:
        bundle.load(directory)
    assert f"{directory}/config.json" in str(caught.value)
    assert message in str(caught.value)


def test_a_config_that_is_missing_or_no_file_is_named(directory: Path) -> None:
    path = directory / "config.json"
    path.unlink()
    with pytest.raises(InvalidBundleError, match=r"config.json' does not exist"):
        bundle.load(directory)
    os.mkfifo(path)
    with pytest.raises(InvalidBundleError, match=r"config.json' is not a regular file"):
        bundle.load(directory)
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidBundleError, match=r"config.json' is not a regular file"):
        bundle.load(directory)
    with pytest.raises(InvalidBundleError, match=r"bundle '.*/none' is not a directory"):
        bundle.load(directory / "none")


def test_the_process_of_an_exec(tmp_path: Path) -> None:
    path = tmp_path / "process.json"
    path.write_text(json.dumps({**COMPLETE["process"], "x": 1}))
    process, document = bundle.load_process(path)
    assert (process.args, process.cwd, document["x"]) == (("sh",), "/w", 1)
    path.write_text(json.dumps({"cwd": "/", "args": []}))
    with pytest.raises(InvalidBundleError, match="'args' is empty"):
        bundle.load_process(path)


def test_the_resources_of_an_update() -> None:
    resources, document = bundle.parse_resources(json.dumps(COMPLETE["linux"]["resources"]).encode())
    assert resources.memory is not None
    assert (resources.memory.limit, document["pids"]) == (1, {"limit": -1})
    with pytest.raises(InvalidBundleError, match=r"resources is not valid: 'pids.limit' is missing"):
        bundle.parse_resources(b'{"pids": {}}')


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = st.sampled_from(
    [
        *COMPLETE,
        *(f"process.{name}" for name in COMPLETE["process"]),
        *(f"linux.{name}" for name in COMPLETE["linux"]),
        *(f"linux.resources.{name}" for name in COMPLETE["linux"]["resources"]),
    ]
)


@given(PATHS, ANYTHING)
def test_no_document_raises_anything_but_our_error(path: str, value: Any) -> None:
    text = json.dumps(changed(path, value)).encode()
    for model, content in ((Spec, text), (Process, text), (Resources, text)):
        try:
            found = checked(model, content, name="config.json")
            if isinstance(found, Spec):
                bundle.check(found)
        except InvalidBundleError:
            continue


@given(st.binary(max_size=40))
def test_no_bytes_raise_anything_but_our_error(content: bytes) -> None:
    try:
        bundle.parse_resources(content)
    except InvalidBundleError:
        return
