"""How start and memory grow with the number of pods, and an import with the size of the image."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from scripts.benchmarks import crowd, memory, processes
from scripts.benchmarks.rows import Row, measurement

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.benchmarks.workplace import Workplace

PODS = (1, 2, 4, 8, 16)
MB = 1000 * 1000
SIZES = {"10_mb": 10 * MB, "100_mb": 100 * MB, "1_gb": 1000 * MB}
FILE = MB


@measurement(
    *(Row(f"start_pods.{n}", "s", f"{n} pods at once, until all run", against="start_pods.1") for n in PODS),
    *(Row(f"pss_pods.{n}", "MiB", f"memory of each of {n} idle pods, private", against="pss_pods.1") for n in PODS),
    most_runs=1,
    warm_up=False,
)
def growth(place: Workplace) -> Mapping[str, float]:
    with crowd.running(place, 1):
        pass  # what is loaded once is loaded now
    found = {}
    for pods in PODS:
        with crowd.running(place, pods) as (seconds, pids):
            found[f"start_pods.{pods}"] = seconds
            found[f"pss_pods.{pods}"] = memory.footprint(pids).total_mib / pods
    return found


@measurement(
    *(Row(f"import_{size}", "s", f"importing a root of {size}", against=f"tar_{size}") for size in SIZES),
    *(Row(f"tar_{size}", "s", "tar writing the same files into one") for size in SIZES),
    most_runs=1,
    warm_up=False,
)
def importing(place: Workplace) -> Mapping[str, float]:
    tar = place.tool("tar")
    found = {}
    for name, size in SIZES.items():
        root = _filled(place.directory / f"root-{name}", size)
        archive = place.directory / f"{name}.tar"
        try:
            found[f"tar_{name}"] = processes.run([tar, "-cf", str(archive), "-C", str(root), "."]).seconds
            archive.unlink()
            words = ("image", "import", "--name", f"bench-{name}", f"rootfs:{root}")
            found[f"import_{name}"] = place.vmsandbox(*words).seconds
            place.vmsandbox("image", "rm", f"bench-{name}")
        finally:
            shutil.rmtree(root)
    return found


def _filled(root: Path, size: int) -> Path:
    """A root file system of so many bytes that cannot be compressed, in files of 1 MB."""
    data = root / "data"
    data.mkdir(parents=True)
    for number in range(size // FILE):
        (data / f"{number:04}").write_bytes(os.urandom(FILE))
    return root
