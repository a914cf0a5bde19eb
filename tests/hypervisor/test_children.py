"""Processes that a machine needs, and their end."""

from __future__ import annotations

import errno
import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest

from vmsandbox_hypervisor import children
from vmsandbox_hypervisor.api import Confinement, SecurityLabels

if TYPE_CHECKING:
    from pathlib import Path

#: a host with both security modules, but for the kernel: what the program asks it for is in a file
MODULES = """
mount -t tmpfs none /sys/kernel/security && mkdir /sys/kernel/security/apparmor
mount -t tmpfs none /sys/fs && mkdir /sys/fs/selinux
mount --bind "$0" /proc/$$/attr/exec
exec "$@"
"""


def test_a_child_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(children, "read_start_time", no_room)
    with subprocess.Popen(["sleep", "1000"]) as process:
        with pytest.raises(OSError, match="Too many open files"):
            children.watched("sleeper", process.pid)
        assert not psutil.pid_exists(process.pid)
        process.returncode = -9  # it was reaped


@pytest.mark.parametrize(
    ("labels", "asked"),
    [
        (SecurityLabels(apparmor="a profile"), "exec a profile"),
        (SecurityLabels(selinux="u:r:t:s0:c1,c2"), "u:r:t:s0:c1,c2"),
        (SecurityLabels(), ""),
    ],
)
def test_the_kernel_is_asked_to_execute_the_program_under_its_label(
    labels: SecurityLabels, asked: str, tmp_path: Path
) -> None:
    attribute = tmp_path / "exec"
    attribute.touch()
    line = children.confined(["id", "-u"], Confinement(uid=65534, gid=65534), labels)
    argv = ["unshare", "--mount", "sh", "-ec", MODULES, str(attribute), *line]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == "65534\n"
    assert attribute.read_text() == asked


@pytest.mark.parametrize("labels", [SecurityLabels(apparmor="profile"), SecurityLabels(selinux="u:r:t:s0")])
def test_without_the_module_nothing_is_executed_without_its_label(labels: SecurityLabels) -> None:
    argv = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /sys; exec "$@"', "sh"]
    done = subprocess.run(
        [*argv, *children.confined(["id"], None, labels)], check=False, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stdout == ""
