"""Children: each status goes to whoever the child belongs to."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# The reaper takes every child of its process, so it is tested in a process of its own.
_PROLOGUE = """
import os, signal, threading
from vmsandbox_agent.reaper import Reaper
from vmsandbox_agent.syscalls import become_subreaper
become_subreaper()
reaper = Reaper()
reaper.start()
def sh(command, **fds):
    return reaper.spawn(["/bin/sh", "-c", command], env={"PATH": "/bin:/usr/bin"}, **fds)
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _PROLOGUE + program], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_codes_and_signals_are_told_as_a_shell_does() -> None:
    assert run("e = sh('exit 7').wait(5); print(e.code, e.signal)") == "7 0"
    assert run("c = sh('exec sleep 100'); c.kill(15); e = c.wait(5); print(e.code, e.signal)") == "143 15"


def test_many_children_at_once_get_their_own_status() -> None:
    assert run("cs = [sh(f'exit {n}') for n in range(100)]; print([c.wait(10).code for c in cs] == [*range(100)])") == (
        "True"
    )


def test_a_child_that_ended_is_not_signalled() -> None:
    assert run("c = sh('true'); c.wait(5); print(c.kill(9))") == "False"


def test_waiting_has_a_deadline() -> None:
    program = """
from vmsandbox_agent.errors import TimedOutError
c = sh('exec sleep 100')
try:
    c.wait(0.01)
except TimedOutError as error:
    print(error)
c.kill(9); c.wait(5)
"""
    assert "has not ended after 0.01 s" in run(program)


@pytest.mark.parametrize("delay", ["0", "0.1"])
def test_an_orphan_is_inherited_and_claimed_even_when_it_has_ended(delay: str) -> None:
    program = f"""
r, w = os.pipe()
with reaper.expecting():
    # Its parent ends at once, it itself before or after it is claimed.
    sh('sh -c "echo \\$\\$; exec >&-; sleep {delay}; exit 9" & exit 0', stdout=w).wait(5)
    os.close(w)
    print(reaper.claim(int(open(r).read())).wait(5).code)
"""
    assert run(program) == "9"


def test_orphans_that_nobody_claims_are_reaped() -> None:
    program = """
sh('for i in 1 2 3 4 5; do (exit 3) & done; exit 0').wait(5)
last = sh('true'); last.wait(5)
import time
deadline = time.monotonic() + 5
def children():
    return open(f'/proc/self/task/{os.getpid()}/children').read().split()
while children() and time.monotonic() < deadline:
    time.sleep(0.01)
print(children())
"""
    assert run(program) == "[]"


def test_a_child_gets_three_streams_and_default_signals() -> None:
    program = """
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
r, w = os.pipe()
sh('ls /proc/self/fd | tr \\\\\\\\n " "; grep SigIgn /proc/self/status', stdout=w).wait(5)
os.close(w)
print(open(r).read())
"""
    out = run(program)
    assert out.startswith("0 1 2 3 ")  # 3 is the directory that ls reads
    assert int(out.split()[-1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_callbacks_are_called_before_and_after_the_end() -> None:
    program = """
told = []
c = sh('sleep 0.05; exit 4')
c.when_ended(lambda e: told.append(e.code))
c.wait(5)
c.when_ended(lambda e: told.append(e.code))
threading.Event().wait(0.05)
print(told)
"""
    assert run(program) == "[4, 4]"
