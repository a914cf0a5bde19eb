"""Commands that are given a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from typing import TYPE_CHECKING

from tests.harness.cli import Result

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROWS, COLUMNS = 31, 97


def typed(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Result:
    """Run a command with a terminal of 31 rows and 97 columns in which a word is typed; all it prints.

    Without an environment it has an empty one.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("hhhh", ROWS, COLUMNS, 0, 0))
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=environment or {}) as process:
        os.close(slave)
        os.write(master, b"word\n")
        said = b""
        while True:
            try:
                said += os.read(master, 4096)
            except OSError:
                break
    os.close(master)
    return Result(process.returncode, said, b"")
