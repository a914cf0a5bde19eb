"""What crun refuses is told in words that a user can act on."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.agent.recorder import Recorder
from vmsandbox_agent import reasons
from vmsandbox_agent.errors import CommandNotExecutableError, CommandNotFoundError, InvalidArgumentError
from vmsandbox_agent.syscalls import LinuxCalls, begin_namespaces_with_sysctls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    rootfs = tmp_path / "rootfs"
    for name in ("etc", "tmp"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "etc/passwd").touch()
    (rootfs / "link").symlink_to("/etc/passwd")
    (tmp_path / "volume/below").mkdir(parents=True)
    (tmp_path / "volume/file").touch()
    fd = os.open(rootfs, os.O_PATH)
    yield fd
    os.close(fd)


def bind(source: Path, destination: str) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "destination": destination, "options": ["rbind", "ro"]}


def tmpfs(destination: str, *options: str) -> dict[str, Any]:
    return {"type": "tmpfs", "source": "tmpfs", "destination": destination, "options": [*options]}


def looked(root: int, tmp_path: Path, **spec: Any) -> None:
    """Look as the agent does; the temporary directory stands for that of the control groups as well."""
    reasons.of_container(root, spec, group=tmp_path, scratch=tmp_path / "scratch", calls=Recorder())


MOUNTS = {
    "a directory over a file": (["volume:/etc/passwd"], "a directory at '/etc/passwd': that is not a directory"),
    "over a link to a file": (["volume:/link"], "a directory at '/link': that is not a directory"),
    "a file over a directory": (["volume/file:/tmp"], "a file at '/tmp': that is not a file"),
    "below a file": (["volume:/etc/passwd/x"], "at '/etc/passwd/x': a part of it is not a directory"),
    "tmpfs over a file": ([":/etc/passwd"], "tmpfs at '/etc/passwd': that is not a directory"),
    "within another volume": (["volume:/v", "volume:/v/file"], "a directory at '/v/file': that is not a directory"),
}


@pytest.mark.parametrize("name", list(MOUNTS))
def test_what_is_mounted_has_to_suit_what_it_is_mounted_on(root: int, tmp_path: Path, name: str) -> None:
    mounts, said = MOUNTS[name]
    split = [text.partition(":") for text in mounts]
    asked = [bind(tmp_path / source, place) if source else tmpfs(place) for source, _, place in split]
    with pytest.raises(InvalidArgumentError) as caught:
        looked(root, tmp_path, mounts=asked)
    assert f"cannot mount {said}: choose another destination" == str(caught.value)


def test_what_suits_or_cannot_be_seen_is_left_to_crun(root: int, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    mounts = [
        bind(volume, "/tmp"), bind(volume / "file", "/etc/passwd"), bind(volume / "file", "/new"),
        bind(volume, "/link/.."), bind(tmp_path / "nothing", "/etc/passwd"), tmpfs("/t"), bind(volume, "/t/passwd"),
        bind(volume / "below", "/tmp/below"), {"type": "proc", "destination": "/proc"},
    ]  # fmt: skip
    looked(root, tmp_path, mounts=mounts, process={"cwd": "/tmp/below", "rlimits": []}, linux={})
    looked(root, tmp_path, mounts=mounts, process={"cwd": "/t/somewhere"})
    looked(root, tmp_path)


@pytest.mark.parametrize(
    ("cwd", "words", "of_added"),
    [
        ("/etc/passwd", "not a directory", CommandNotExecutableError),
        ("/etc/passwd/x", "not a directory", CommandNotExecutableError),
        ("/nosuch", "no such file or directory", CommandNotFoundError),
    ],
)
def test_a_working_directory_has_to_be_one(
    root: int, tmp_path: Path, cwd: str, words: str, of_added: type[Exception]
) -> None:
    said = rf"^cannot enter working directory '{cwd}' \('--workdir', 'process\.cwd'\): {words}: choose another$"
    if of_added is CommandNotFoundError:
        looked(root, tmp_path, process={"cwd": cwd})  # crun makes it
    else:
        with pytest.raises(InvalidArgumentError, match=said):
            looked(root, tmp_path, process={"cwd": cwd})
    with pytest.raises(of_added, match=said):
        reasons.of_process(root, {"cwd": cwd}, {})


def test_limits_are_compared_with_the_guests(root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nr_open").write_text("1000\n")
    monkeypatch.setattr(reasons, "NR_OPEN", tmp_path / "nr_open")

    def limited(kind: str, soft: int, hard: int) -> dict[str, Any]:
        return {"rlimits": [{"type": kind, "soft": soft, "hard": hard}]}

    reasons.of_process(root, limited("RLIMIT_NOFILE", 1000, 1000), {})
    reasons.of_process(root, limited("RLIMIT_CORE", 2000, (1 << 64) - 1), {})
    with pytest.raises(InvalidArgumentError, match=r"'nofile' \('--ulimit', .*at most 1000 in the guest"):
        looked(root, tmp_path, process=limited("RLIMIT_NOFILE", 5, (1 << 64) - 1))
    with pytest.raises(InvalidArgumentError, match=r"'core' \('--ulimit', .*is 5, above its hard limit 4"):
        reasons.of_process(root, limited("RLIMIT_CORE", 5, 4), {})


class Refusing(LinuxCalls):
    """A kernel that knows one option."""

    def __init__(self) -> None:
        self.mounted: list[str] = []

    def mount(self, source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
        if data != "size=1m":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.mounted.append(target)

    def umount(self, target: str, flags: int = 0) -> None:
        self.mounted.remove(target)


def test_an_option_that_the_kernel_refuses_is_named(root: int, tmp_path: Path) -> None:
    calls = Refusing()
    spec = {"mounts": [tmpfs("/tmp", "ro", "nosuid", "tmpcopyup", "size=1m", "colour=red")]}
    with pytest.raises(InvalidArgumentError, match="tmpfs at '/tmp': the guest's kernel refuses option 'colour=red'"):
        reasons.of_container(root, spec, group=tmp_path, scratch=tmp_path / "scratch", calls=calls)
    assert calls.mounted == []
    assert not (tmp_path / "scratch").exists()


def test_files_of_control_groups_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "memory.high").touch()
    reasons.of_resources({"unified": {"memory.high": "1"}}, group=tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"'linux\.resources\.unified' names 'memory\.hihg'"):
        reasons.of_resources({"unified": {"memory.hihg": "1"}}, group=tmp_path)
    reasons.of_resources({"unified": {"memory.hihg": "1"}}, group=tmp_path / "of v1")
    assert [path.name for path in tmp_path.iterdir()] == ["memory.high"]


def test_a_file_system_that_the_kernel_does_not_have_is_named(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "filesystems").write_text("nodev\tproc\nnodev\ttmpfs\n\text4\n")
    monkeypatch.setattr(reasons, "FILESYSTEMS", tmp_path / "filesystems")
    mounts = [{"type": kind, "destination": "/tmp"} for kind in ("", "none", "cgroup", "tmpfs", "ext4")]
    looked(root, tmp_path, mounts=mounts)
    with pytest.raises(InvalidArgumentError, match=r"^cannot mount configfs at '/tmp': .* no such file system: leave"):
        looked(root, tmp_path, mounts=[{"type": "configfs", "destination": "/tmp"}])


def test_processes_are_shown_right_below_the_root_only(root: int, tmp_path: Path) -> None:
    looked(root, tmp_path, mounts=[{"type": "proc", "destination": "/elsewhere/"}])
    with pytest.raises(InvalidArgumentError, match=r"^cannot mount proc at '/tmp/proc': "):
        looked(root, tmp_path, mounts=[{"type": "proc", "destination": "/tmp/proc"}])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("maskedPaths", ["/nosuch", "/etc/passwd/x"]),
        ("readonlyPaths", ["/etc/passwd/x"]),
        ("devices", [{"path": "/etc/passwd/x"}]),
    ],
)
def test_a_path_that_cannot_be_there_is_named(root: int, tmp_path: Path, name: str, value: list[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^'linux\.{name}' names '/etc/passwd/x', a part of which is not "):
        looked(root, tmp_path, linux={name: value})


def test_memory_that_ran_out_is_told_by_its_limit(root: int, tmp_path: Path) -> None:
    spec = {"linux": {"resources": {"memory": {"limit": 5}}}}
    with pytest.raises(InvalidArgumentError, match=r"^'linux\.resources\.memory\.limit' \('--memory'\) is 5, which is"):
        reasons.of_container(root, spec, group=tmp_path, scratch=tmp_path / "scratch", out_of_memory=True)


def test_a_sysctl_that_the_kernel_refuses_is_named(root: int, tmp_path: Path) -> None:
    looked(root, tmp_path, linux={"sysctl": {"kernel.shm_rmid_forced": "0"}})
    with pytest.raises(
        InvalidArgumentError, match=r"^'linux\.sysctl' sets 'kernel\.shm_rmid_forced' to '7', .*: Invalid argument$"
    ):
        looked(root, tmp_path, linux={"sysctl": {"kernel.shm_rmid_forced": "7"}})


@pytest.mark.parametrize("kind", ["ipc", "uts"])
def test_sysctls_are_tried_in_namespaces_of_nobody_else(kind: str) -> None:
    found: list[str] = []

    def body() -> None:
        begin_namespaces_with_sysctls()
        found.append(os.readlink(f"/proc/thread-self/ns/{kind}"))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found != [os.readlink(f"/proc/self/ns/{kind}")]
    assert found


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ({"uid": 10}, "'process.user.uid' is 10, which the container's 'linux.uidMappings' does not have"),
        ({"gid": 10}, "'process.user.gid' is 10, which the container's 'linux.gidMappings' does not have"),
        ({"additionalGids": [5, 10]}, "'process.user.additionalGids' is 10, which the container's 'linux.gidMappings'"),
    ],
)
def test_an_id_that_the_container_does_not_have_is_named(root: int, user: dict[str, Any], said: str) -> None:
    mapping = [{"containerID": 0, "hostID": 100, "size": 10}]
    linux = {"uidMappings": mapping, "gidMappings": mapping}
    reasons.of_process(root, {"user": {"uid": 9, "gid": 0}}, linux)
    reasons.of_process(root, {"user": user}, {})
    with pytest.raises(InvalidArgumentError) as caught:
        reasons.of_process(root, {"user": user}, linux)
    assert said in str(caught.value)
