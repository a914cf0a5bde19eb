"""The door for child processes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from vmsandbox_hypervisor.children import ENVIRONMENT, Child, confined, described, read_start_time, spawn


async def finished(argv: list[str], fds: dict[int, int] | None = None) -> tuple[int | None, str]:
    output = os.memfd_create("output")
    try:
        child = spawn("test", argv, fds=fds or {}, stderr=output)
        status = await child.wait()
        return status, os.pread(output, 65536, 0).decode()
    finally:
        os.close(output)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("kill -6 $$", -6)])
async def test_the_exit_status_is_told(script: str, status: int) -> None:
    assert await finished(["sh", "-c", script]) == (status, "")


async def test_descriptors_arrive_under_their_numbers_even_crosswise() -> None:
    readers = {}
    for name in ("one", "two"):
        reader, writer = os.pipe()
        os.write(writer, name.encode())
        os.close(writer)
        readers[name] = reader
    # Each one's number in the child is the other one's number here, as far as the child allows.
    fds = {readers["two"]: readers["one"], readers["one"]: readers["two"]}
    script = f"cat <&{readers['two']}; cat <&{readers['one']}"
    try:
        assert await finished(["bash", "-c", script], fds) == (0, "onetwo")
    finally:
        for reader in readers.values():
            os.close(reader)


async def test_a_child_inherits_nothing_else() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    try:
        status, output = await finished(["bash", "-c", "echo /proc/$$/fd/*; env"])
    finally:
        os.close(reader)
        os.close(writer)
    assert status == 0
    fds = {int(word.rpartition("/")[2]) for word in output.splitlines()[0].split()}
    # 3 is the listing's own, 255 is bash's
    assert fds - {3, 255} == {0, 1, 2}
    assert reader > 3
    assert "HOME=" not in output
    assert "LC_ALL=C" in output


async def test_signals_are_as_if_nobody_had_touched_them() -> None:
    """Python ignores SIGPIPE, which a child must not inherit."""
    status, _ = await finished(["bash", "-c", "kill -PIPE $$; exit 0"])
    assert status == -signal.SIGPIPE


async def test_a_program_that_is_not_there_is_an_error_and_no_child() -> None:
    with pytest.raises(FileNotFoundError, match="/nonexistent/program"):
        spawn("test", ["/nonexistent/program"], fds={}, stderr=2)


async def test_without_setpriv_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ENVIRONMENT, "PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^no program 'setpriv': install util-linux$"):
        spawn("test", confined(["qemu"], None), fds={}, stderr=2)


async def test_stop_is_polite_first_if_it_may_be() -> None:
    ready, inherited = os.pipe()
    output = os.open("/dev/null", os.O_WRONLY)
    try:
        child = spawn(
            "test", ["sh", "-c", "trap 'exit 7' TERM; echo >&3; while :; do sleep 0.05; done"],
            fds={3: inherited}, stderr=output,
        )  # fmt: skip
        await asyncio.to_thread(os.read, ready, 1)
        assert await child.stop(grace=5) == 7
        stubborn = spawn(
            "test", ["sh", "-c", "trap '' TERM; echo >&3; while :; do sleep 0.05; done"],
            fds={3: inherited}, stderr=output,
        )  # fmt: skip
        await asyncio.to_thread(os.read, ready, 1)
        assert await stubborn.stop(grace=0.1) == -signal.SIGKILL
        assert await stubborn.stop() == -signal.SIGKILL
    finally:
        for fd in (ready, inherited, output):
            os.close(fd)


async def test_only_the_very_process_is_adopted() -> None:
    child = spawn("test", ["sleep", "60"], fds={}, stderr=2)
    with pytest.raises(ProcessLookupError):
        Child.adopted("test", child.pid, child.start_time + 1)
    again = Child.adopted("test", child.pid, child.start_time)
    await child.stop()
    await again.wait()
    assert not again.alive
    with pytest.raises(ProcessLookupError):
        Child.adopted("test", child.pid, child.start_time)


def test_the_start_time_of_a_process_with_an_odd_name_is_found(tmp_path: Path) -> None:
    assert read_start_time(os.getpid()) > 0
    name = Path("/proc/self/comm").read_text()
    try:
        Path("/proc/self/comm").write_text("a) 1 (b")
        assert read_start_time(os.getpid()) > 0
    finally:
        Path("/proc/self/comm").write_text(name)


@pytest.mark.parametrize(
    ("status", "words"),
    [(None, "ended"), (0, "ended with status 0"), (-9, "was killed by SIGKILL"), (-63, "was killed by signal 63")],
)
def test_a_status_is_put_in_words(status: int | None, words: str) -> None:
    assert described(status) == words
