"""Reading files: shared by virtio-fs and by 9p, from the image, and on the host's own file system.

The same program reads the same bytes everywhere.  Each container is new, so the guest has nothing cached; the host
has, since it has just written the files.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

from scripts.benchmarks import processes
from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import Row, measurement
from scripts.benchmarks.workplace import COLD, IDLE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.benchmarks.workplace import Workplace

MIB = 1024 * 1024
LARGE_MIB = 128
SMALL_FILES = 2000
SMALL_BYTES = 1024
#: how often the host does what a container does once
NATIVE_TIMES = 20
TIME = re.compile(r"^real\s+(\d+)m\s*([0-9.]+)s$", re.MULTILINE)


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
    large, small = (natively(words, busybox) for words in _commands(str(directory), busybox))
    found = {"host_seq_read": LARGE_MIB / large, "host_small_files": small}
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
            large, small = seconds(place.vmsandbox("exec", name, *_reading("/files")).output)
            found[f"share_seq_read{suffix}"] = LARGE_MIB / large
            found[f"share_small_files{suffix}"] = small
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


def _commands(directory: str, busybox: str = "") -> tuple[str, str]:
    """What reads the large file, and what the small ones.

    `busybox` is what its programs are prefixed with where they have no names of their own.
    """
    large = f"{busybox} dd if={directory}/large of=/dev/null bs={MIB}"
    return large, f"{busybox} cat {directory}/small/* > /dev/null"


def _reading(directory: str) -> list[str]:
    """Read the large file, then the small ones; the shell's own `time` says how long each took."""
    large, small = _commands(directory)
    return ["sh", "-c", f"{{ time {large}; time {small}; }} 2>&1"]


def natively(command: str, busybox: str) -> float:
    """Seconds that a command takes on the host, where once is less than `time` tells apart."""
    script = f"i=0; while [ $i -lt {NATIVE_TIMES} ]; do {command} || exit; i=$((i+1)); done 2>&1"
    return processes.run([busybox, "sh", "-c", script]).seconds / NATIVE_TIMES


def seconds(output: str) -> tuple[float, float]:
    """Both times out of what the shell's `time` prints: ``real    1m 2.34s``."""
    found = [60 * int(minutes) + float(rest) for minutes, rest in TIME.findall(output)]
    if len(found) != 2 or not all(found):
        raise CommandError(f"the shell did not tell two times: {output.strip()}")
    return found[0], found[1]
