"""A small root file system for container images: busybox under its applets' names, users, nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

BUSYBOX = Path("/bin/busybox")


def make_rootfs(directory: Path) -> Path:
    """Fill `directory`; the static busybox comes from the distribution's package."""
    for name in ("bin", "dev", "etc", "home/alice", "proc", "root", "sys", "tmp", "var/empty"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, directory / "bin/busybox")
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        link = directory / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    (directory / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n"
    )
    (directory / "etc/group").write_text("root:x:0:\nusers:x:1000:\nwheel:x:10:alice\n")
    (directory / "etc/not-executable").write_text("#!/bin/sh\n")
    return directory


def add_program(rootfs: Path, program: Path) -> None:
    """Put one of the host's programs and the libraries it needs into `rootfs`."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = [Path(word) for word in listed.split() if word.startswith("/")]
    for path in (program, *libraries):
        target = rootfs / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy(path, target)
