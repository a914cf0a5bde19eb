"""A data root of the tests' own: the guest that the machine has built, a template, nothing else."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.cli import Cli

if TYPE_CHECKING:
    from collections.abc import Iterator

#: where `scripts/setup` and `scripts/test` build the guest
BUILT = Path(os.environ.get("VMSANDBOX_DATA_ROOT", "/var/lib/vmsandbox"))


@contextmanager
def prepared_data_root() -> Iterator[Path]:
    """A data root for the block."""
    directory = Path(tempfile.mkdtemp(prefix="vmsandbox-data-"))
    try:
        (directory / "guest").symlink_to(BUILT / "guest")
        with tempfile.TemporaryDirectory(prefix="vs-") as run:
            Cli(Path(run), directory).ok("template", "build", timeout=300)
        yield directory
    finally:
        shutil.rmtree(directory)
