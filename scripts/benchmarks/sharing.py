"""Reading files: shared by virtio-fs and by 9p, from the image, and on the host's own file system.

The same program reads the same bytes everywhere.  Each container is new, so the guest has nothing cached; the host
has, since it has just written the files.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import Row, measurement
from scripts.benchmarks.workplace import COLD, IDLE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.benchmarks.workplace import Workplace

MIB = 1024 * 1024
LARGE_MIB = 128
SMALL_FILES = 1000
SMALL_BYTES = 1024
WAYS = {"virtiofs": "virtio-fs", "9p": "9p", "block": "the image, a block device"}


@measurement(
    Row("share_seq_read", "MiB/s", "reading a large file shared by virtio-fs", against="host_seq_read"),
    Row("share_seq_read.9p", "MiB/s", "the same by 9p", against="host_seq_read"),
    Row("share_seq_read.block", "MiB/s", "the same out of the image", against="host_seq_read"),
    Row("host_seq_read", "MiB/s", "the same on the host's own file system"),
    Row("share_small_files", "s", f"reading {SMALL_FILES} small files by virtio-fs", against="host_small_files"),
    Row("share_small_files.9p", "s", "the same by 9p", against="host_small_files"),
    Row("share_small_files.block", "s", "the same out of the image", against="host_small_files"),
    Row("host_small_files", "s", "the same on the host's own file system"),
    most_runs=3,
    warm_up=False,
)
def reading(place: Workplace) -> Mapping[str, float]:
    directory, image = _prepared(place)
    busybox = str(place.rootfs / "bin" / "busybox")
    found = {
        "host_seq_read": rate(_on_host([busybox, *_large(str(directory))])),
        "host_small_files": seconds(_on_host([busybox, *_small(str(directory), busybox)])),
    }
    mounts = {
        "virtiofs": (place.template, "--shared-fs", "virtio-fs", "-v", f"{directory}:/files"),
        # 9p exports are part of QEMU's command line: such a pod is never a clone.
        "9p": (COLD, "--shared-fs", "9p", "-v", f"{directory}:/files"),
        "block": (place.template,),
    }
    for way, options in mounts.items():
        suffix = "" if way == "virtiofs" else f".{way}"
        with ExitStack() as stack:
            name, _ = place.start_pod(*IDLE, options=options, image=image)
            stack.callback(place.remove_quietly, name)
            found[f"share_seq_read{suffix}"] = rate(_inside(place, name, _large("/files")))
            found[f"share_small_files{suffix}"] = seconds(_inside(place, name, _small("/files", "")))
    return found


@cache
def _prepared(place: Workplace) -> tuple[Path, str]:
    """A directory with the files, and an image that has the same ones in ``/files``."""
    # Next to the image's root, so that both are on the same file system.
    directory = place.rootfs / "files"
    (directory / "small").mkdir(parents=True)
    with open(directory / "large", "wb") as large:
        for number in range(LARGE_MIB):
            large.write(number.to_bytes(4, "little") * (MIB // 4))
    for number in range(SMALL_FILES):
        (directory / "small" / f"{number:05}").write_bytes(number.to_bytes(4, "little") * (SMALL_BYTES // 4))
    place.vmsandbox("image", "import", "--name", "bench-files", f"rootfs:{place.rootfs}")
    return directory, "bench-files"


def _large(directory: str) -> list[str]:
    return ["dd", f"if={directory}/large", "of=/dev/null", f"bs={MIB}"]


def _small(directory: str, busybox: str) -> list[str]:
    """The shell's own `time` says how long it took; `busybox` is what its programs are prefixed with."""
    return ["sh", "-c", f"time {busybox} cat {directory}/small/* > /dev/null"]


def _on_host(argv: list[str]) -> str:
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout


def _inside(place: Workplace, name: str, argv: list[str]) -> str:
    return place.vmsandbox("exec", name, "sh", "-c", 'exec "$@" 2>&1', "sh", *argv).output


def rate(output: str) -> float:
    """MiB/s out of what `dd` prints: ``134217728 bytes (128.0MB) copied, 0.512345 seconds, 249.8MB/s``."""
    match = re.search(r"^(\d+) bytes .*copied, ([0-9.]+) seconds", output, re.MULTILINE)
    if match is None or float(match[2]) == 0:
        raise CommandError(f"dd did not tell its time: {output.strip()}")
    return int(match[1]) / MIB / float(match[2])


def seconds(output: str) -> float:
    """Seconds out of what the shell's `time` prints: ``real    1m 2.34s``."""
    match = re.search(r"^real\s+(\d+)m\s*([0-9.]+)s$", output, re.MULTILINE)
    if match is None:
        raise CommandError(f"the shell did not tell the time: {output.strip()}")
    return 60 * int(match[1]) + float(match[2])
