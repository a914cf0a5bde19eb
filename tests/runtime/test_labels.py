"""Labels of security modules that the host seems to have.

Neither of them is in the kernel here.  What they look like is mounted over /sys, and setpriv stands for
what it asks the kernel for; what QEMU may do under a real profile cannot be seen.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.harness.bundles import Runtime
from tests.harness.members import Members
from vmsandbox.cli.runtime.static import default_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

PROFILE, CONTEXT = "docker-default", "system_u:system_r:container_kvm_t:s0:c1,c2"
#: $1 is a directory for what is mounted, $2 what setpriv is to be
HOST = """
mount -t tmpfs none "$1"; mkdir "$1/cgroup" "$1/selinux"; mount --rbind /sys/fs/cgroup "$1/cgroup"
touch "$1/selinux/enforce" "$1/selinux/context"; mount --rbind "$1" /sys/fs
mount -t tmpfs none /sys/module; mkdir -p /sys/module/apparmor/parameters
echo Y > /sys/module/apparmor/parameters/enabled
mount -t tmpfs none /sys/kernel/security; mkdir /sys/kernel/security/apparmor
echo "docker-default (enforce)" > /sys/kernel/security/apparmor/profiles
if test -n "$2"; then mount --bind "$2" "$(command -v setpriv)"; fi
exec sleep 100000
"""
#: writes down what it is asked for, and does all of it but the labels
SETPRIV = """#!/bin/sh
echo "$@" >> {log}
for word; do
    shift
    case $word in --selinux-label=* | --apparmor-profile=*) ;; *) set -- "$@" "$word" ;; esac
done
exec {real} "$@"
"""


@pytest.fixture
def standin(tmp_path: Path) -> Path | None:
    """What is setpriv on the host."""
    found = shutil.which("setpriv")
    assert found
    real = shutil.copy2(found, tmp_path / "setpriv.real")
    script = tmp_path / "setpriv"
    script.write_text(SETPRIV.format(log=tmp_path / "asked", real=real))
    script.chmod(0o755)
    return script


@pytest.fixture
def labelling(standin: Path | None, data_root: Path, tmp_path: Path) -> Iterator[Runtime]:
    """The command on a host that seems to have both modules."""
    place = tmp_path / "sys"
    place.mkdir()
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", HOST, "sh", str(place), str(standin or "")]
    with subprocess.Popen(argv) as holder, tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        try:
            while psutil.Process(holder.pid).name() != "sleep":
                assert holder.poll() is None
                time.sleep(0.01)
            inside = ("/usr/bin/nsenter", "-t", str(holder.pid), "--mount")
            runtime = Runtime(Path(scratch), data_root, inside=inside)
            yield runtime
            runtime.remove_all()
            assert runtime.leftovers() == []
        finally:
            holder.kill()


def process(*args: str, **more: str) -> dict[str, Any]:
    """A process object with a profile."""
    return {**default_spec()["process"], "terminal": False, "args": [*args], "apparmorProfile": PROFILE, **more}


def labelled(document: dict[str, Any]) -> None:
    document["process"].update(apparmorProfile=PROFILE, selinuxLabel=CONTEXT)
    document["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0:c1,c2"


def said(runtime: Runtime) -> list[str]:
    return [json.loads(line)["msg"] for line in runtime.log.read_text().splitlines()]


def test_a_pods_machine_has_the_labels_of_its_first_container(
    labelling: Runtime, box_rootfs: Path, tmp_path: Path
) -> None:
    members = Members(labelling, box_rootfs, process=process("sleep", "1000000", selinuxLabel=CONTEXT))
    asked = (tmp_path / "asked").read_text()
    machine, share = (line for line in asked.splitlines() if "--selinux-label" in line)
    assert machine.startswith(f"--no-new-privs --selinux-label={CONTEXT} --apparmor-profile={PROFILE} --reuid=")
    assert share.startswith(f"--selinux-label={CONTEXT} -- /")
    # Who joins is in the machine that there is.
    labelling.create("same", members.bundle("same", labelled, "true"))
    assert not labelling.log.exists()
    other = members.bundle("other", lambda document: document["process"].update(selinuxLabel="other"), "true")
    labelling.create("other", other)
    assert said(labelling) == [
        f"'process.selinuxLabel' is 'other', which is not applied: the pod's virtual machine runs under '{CONTEXT}'"
    ]
    unknown = members.bundle("unknown", lambda document: document["process"].update(apparmorProfile="unknown"), "true")
    assert labelling.refused("create", "--bundle", str(unknown), "unknown").startswith(
        "'process.apparmorProfile' is 'unknown': no such profile is loaded: "
    )
    assert (tmp_path / "asked").read_text() == asked


@pytest.mark.parametrize("standin", [None])
def test_a_label_that_the_kernel_refuses_is_named_and_nothing_is_left(labelling: Runtime, box_rootfs: Path) -> None:
    """setpriv is the real one here, and the kernel has no such attribute."""
    bundle = labelling.bundle("one", box_rootfs, process=process("true"))
    message = labelling.refused("create", "--bundle", str(bundle), "one")
    assert "Invalid argument" in message
    assert message.endswith(
        f": QEMU was to run under 'process.apparmorProfile' '{PROFILE}': if that does not let it, name another"
    )
    assert labelling.ok("list", "-q") == ""
