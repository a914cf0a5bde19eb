"""Programs made of system calls do what they say when a real kernel runs them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from vmsandbox.guestbuild import elf, initramfs, program
from vmsandbox.guestbuild.program import RESULT, Program, Vector

if TYPE_CHECKING:
    from pathlib import Path


def executed(made: Program, directory: Path) -> subprocess.CompletedProcess[bytes]:
    path = directory / "program"
    path.write_bytes(made.elf())
    path.chmod(0o755)
    return subprocess.run([path], capture_output=True, check=False, timeout=10)


def test_calls_are_made_in_their_order(tmp_path: Path) -> None:
    made = Program()
    for word in (b"one ", b"two"):
        made.call(program.WRITE, 1, word, len(word), failure="cannot write")
    done = executed(made, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one two", b"")


def test_a_failing_call_ends_the_program_with_its_message_and_error_number(tmp_path: Path) -> None:
    made = Program()
    made.call(program.OPEN, os.fsencode(tmp_path / "nothing"), 0, 0, failure="cannot open it")
    made.call(program.WRITE, 1, b"unreachable", 11, failure="cannot write")
    done = executed(made, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (errno.ENOENT, b"", b"cannot open it\n")


def test_a_failure_that_does_not_matter_is_passed_over(tmp_path: Path) -> None:
    made = Program()
    made.call(program.UNLINK, os.fsencode(tmp_path / "nothing"), failure=None)
    made.call(program.WRITE, 1, b"on", 2, failure="cannot write")
    assert executed(made, tmp_path).stdout == b"on"


def test_the_result_of_a_call_can_be_used_by_the_next(tmp_path: Path) -> None:
    made = Program()
    flags = os.O_CREAT | os.O_WRONLY
    made.call(program.OPEN, os.fsencode(tmp_path / "made"), flags, 0o644, failure="cannot open", remember=True)
    made.call(program.WRITE, RESULT, b"text", 4, failure="cannot write")
    made.call(program.CLOSE, RESULT, failure="cannot close")
    assert executed(made, tmp_path).returncode == 0
    assert (tmp_path / "made").read_bytes() == b"text"


def test_several_attempts_wait_for_what_comes_later(tmp_path: Path) -> None:
    awaited = os.fsencode(tmp_path / "awaited")
    made = Program()
    made.call(program.WRITE, 1, b"trying\n", 7, failure="cannot write")
    made.call(program.UNLINK, awaited, failure="cannot remove", attempts=1000)
    path = tmp_path / "program"
    path.write_bytes(made.elf())
    path.chmod(0o755)
    with subprocess.Popen([path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"trying\n"
        (tmp_path / "awaited").touch()
    assert process.returncode == 0
    assert not (tmp_path / "awaited").exists()


def test_attempts_run_out_with_the_error_of_the_call(tmp_path: Path) -> None:
    made = Program()
    made.call(program.UNLINK, os.fsencode(tmp_path), failure="cannot remove", attempts=3)
    done = executed(made, tmp_path)
    assert (done.returncode, done.stderr) == (errno.EISDIR, b"cannot remove\n")


def test_a_program_can_become_another_with_arguments_and_environment(tmp_path: Path) -> None:
    code = b"import os, sys; print(sys.argv[1:], dict(os.environ)['NAME'])"
    made = Program()
    interpreter = os.fsencode(os.path.realpath(sys.executable))
    arguments = Vector((b"python", b"-c", code, b"a b"))
    made.call(program.EXECVE, interpreter, arguments, Vector((b"NAME=value",)), failure="cannot execute")
    assert executed(made, tmp_path).stdout == b"['a b'] value\n"


def test_the_launcher_becomes_its_command(tmp_path: Path) -> None:
    path = tmp_path / "init"
    path.write_bytes(initramfs.launcher("/bin/echo", "-n", "agent"))
    path.chmod(0o755)
    assert subprocess.run([path], capture_output=True, check=True).stdout == b"agent"


def test_a_program_is_a_static_elf_and_always_the_same() -> None:
    first, second = initramfs.launcher("/bin/true"), initramfs.launcher("/bin/true")
    assert first == second
    assert elf.needed(first) == []
