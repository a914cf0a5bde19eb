"""Processes that look like ours and do nothing."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line looks like this, for the block."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    argv = [words[0], "-c", code, *words[1:]]
    with subprocess.Popen(argv, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()
