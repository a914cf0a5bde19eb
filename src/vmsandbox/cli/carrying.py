"""What a stand-in does: it carries stdio and signals between its descriptors and the pod's supervisor.

It alone reads and writes the container's stdio on the host, forwards the signals it gets, and ends as the guest process
ended, so whoever waits for it sees an ordinary process.

What a reader would get wrong: the supervisor is *not* its parent and may die.  Every byte has an offset, the
stand-in knows which it has written and which input was accepted, and when its connection breaks, `attachment` finds or
starts a supervisor, and it goes on from there.  If the stand-in is killed, the supervisor kills the guest process.
"""

from __future__ import annotations

import os
import select
import signal
import stat

from vmsandbox import wire
from vmsandbox.cli import terminal
from vmsandbox.cli.attachment import Attachment
from vmsandbox.cli.containerlog import LogWriter
from vmsandbox.cli.standin import LOST
from vmsandbox.errors import one_line
from vmsandbox.records import start_time
from vmsandbox.title import set_title

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.standin import Plan
    from vmsandbox.paths import Roots, SandboxPaths

#: unacknowledged input that is kept, and so the most that is read ahead of the container, in bytes
INPUT_WINDOW = 1024 * 1024
#: output written before it is acknowledged, in bytes
ACK_EVERY = 256 * 1024
#: What a blocking descriptor takes without blocking once it polls writable (PIPE_BUF).
ATOMIC = 4096
NAMES = {wire.STDOUT: "stdout", wire.STDERR: "stderr"}
KINDS = {name: kind for kind, name in NAMES.items()}
#: by which a client says that it has lost its terminal, and that it has it
JOB_CONTROL = {signal.SIGTSTP, signal.SIGCONT}
#: Not taken: what the kernel raises for our own doings, and the rest of job control.
KEPT = {signal.SIGCHLD, signal.SIGPIPE, signal.SIGTTIN, signal.SIGTTOU}


class Output:
    """One output stream: bytes that came, and those the host's descriptor has not taken yet."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self.fd = fd
        self.received = 0
        self.acked = 0
        self.eof = False
        #: nobody reads it any more
        self.closed = False
        self.pending = bytearray()
        self.limit = ATOMIC
        if fd >= 0 and stat.S_ISFIFO(os.fstat(fd).st_mode):
            # A second description of the same pipe can be non-blocking without changing the caller's.
            try:
                self.fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
                self.limit = wire.CHUNK
            except OSError:
                self.fd = fd

    @property
    def written(self) -> int:
        return self.received - len(self.pending)

    def flush(self) -> bool:
        """Write what the descriptor takes now; False once nobody reads it any more."""
        try:
            count = os.write(self.fd, memoryview(self.pending)[: self.limit])
        except BlockingIOError:
            return True
        except OSError:
            self.fd = -1
            self.closed = True
            self.pending.clear()
            return False
        del self.pending[:count]
        return True

    def detach(self) -> None:
        """Write nothing more, as if everything had been taken."""
        if self.fd > 2:
            os.close(self.fd)
        self.fd = -1
        self.pending.clear()


class Standin:
    def __init__(self, roots: Roots, sandbox: SandboxPaths, plan: Plan) -> None:
        self.plan = plan
        self.attachment = Attachment(roots, sandbox, starter=plan.starter)
        self.outputs = {
            wire.STDOUT: Output(1 if plan.stdout else -1, "stdout"),
            wire.STDERR: Output(2 if plan.stdout else -1, "stderr"),
        }
        self.log: LogWriter | None = None
        self.input = bytearray()  # sent, not accepted
        self.input_sent = 0
        self.input_eof = not plan.stdin
        self.eof_sent = not plan.stdin
        self.exit: dict[str, Any] | None = None
        #: not yet taken by the supervisor: said again over the next connection
        self.signals: list[int] = []
        #: pidfd of the client in the foreground
        self.client = -1
        #: stdin is left alone: a terminal before the client says that it has it, and while the client is stopped
        self.paused = plan.client is not None and plan.stdin and os.isatty(0)
        # In a pid namespace of its own it is number 1; what counts is what others know it by.
        pid = int(os.readlink("/proc/self"))
        self.me = {"pid": pid, "start_time": start_time(pid)}

    # ------------------------------------------------------------ set-up

    def run(self) -> int:
        wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._catch_signals(wake_out)
        self._close_inherited({wake_in, wake_out, self.plan.starter})
        what = (self.plan.exec_id or self.plan.container_id)[:12]
        set_title(f"vmsandbox stand-in {what}" + (f": {self.plan.command}" if self.plan.command else ""))
        self._attach(first=True)
        if self.plan.client is not None:
            try:
                self.client = os.pidfd_open(self.plan.client)
            except ProcessLookupError:
                self._client_died()
        if self.plan.root:
            from vmsandbox.cli.runtime import namespaces

            self.attachment.enclosure = namespaces.Enclosure(self.plan.root)
        while True:
            if not self.attachment.connected and not self._attach(first=False):
                self._explain("its pod is gone")
                return LOST
            self._turn(wake_in)
            if self.exit is not None and self._drained():
                self._finish()
                return int(self.exit.get("code", LOST))

    def _catch_signals(self, wake: int) -> None:
        for number in signal.valid_signals():
            if number in (signal.SIGKILL, signal.SIGSTOP) or number in KEPT:
                continue
            if number in JOB_CONTROL and self.plan.client is None:
                continue
            if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
                continue
            signal.signal(number, lambda _number, _frame: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def _close_inherited(self, keep: set[int]) -> None:
        keep |= {output.fd for output in self.outputs.values()}
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd > 2 and fd not in keep:
                try:
                    os.close(fd)
                except OSError:
                    continue

    def _attach(self, *, first: bool) -> bool:
        """(Re)connect to the supervisor and say from which offsets on; False when the pod is gone."""
        if not self.attachment.connect(first=first):
            return False
        plan = self.plan
        hello = {
            "verb": "attach",
            "container": plan.container_id,
            "exec": plan.exec_id,
            "standin": self.me,
            "stdout": self.outputs[wire.STDOUT].received,
            "stderr": self.outputs[wire.STDERR].received,
        }
        size = terminal.window_size() if plan.terminal else None
        if size:
            hello["size"] = size
        self.attachment.send(hello)
        # What was read but not accepted is offered again; the supervisor drops what the guest already has.
        if self.input:
            self.attachment.send_data(wire.STDIN, self.input_sent - len(self.input), bytes(self.input))
        if self.plan.stdin and self.eof_sent:
            self.attachment.send({"eof": "stdin", "offset": self.input_sent})
        for number in self.signals:
            self.attachment.send({"signal": number})
        for kind, output in self.outputs.items():
            self._repeat(kind, output)
        return True

    def _repeat(self, kind: int, output: Output) -> None:
        """Say again what of an output may not have arrived; the agent stops a process whose output nobody takes."""
        if output.closed:
            self.attachment.send({"closed": output.name})
        if output.acked:
            self.attachment.send({"ack": NAMES[kind], "offset": output.acked})

    # ------------------------------------------------------------ one turn of the loop

    def _turn(self, wake: int) -> None:
        poll = select.poll()
        self.attachment.register(poll)
        poll.register(wake, select.POLLIN)
        if self.client >= 0:
            poll.register(self.client, select.POLLIN)
        if self._reads():
            poll.register(0, select.POLLIN)
        for output in self.outputs.values():
            if output.pending:
                poll.register(output.fd, select.POLLOUT)
        ready = dict(poll.poll())
        if wake in ready:
            self._take_signals(os.read(wake, 256))
        if self.client in ready:
            self._client_died()
        if 0 in ready and self._reads():
            self._read_input()
        for kind, output in self.outputs.items():
            if output.pending and output.fd in ready:
                self._write_output(kind, output)
        for frame in self.attachment.turn(ready):
            if frame.kind == wire.MESSAGE:
                self._take_message(frame.message())
            else:
                self._take_output(frame)

    def _reads(self) -> bool:
        room = len(self.input) < INPUT_WINDOW and self.attachment.backlog < INPUT_WINDOW
        return room and not self.input_eof and not self.paused

    def _take_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in JOB_CONTROL:
                self.paused = number == signal.SIGTSTP
            elif number == signal.SIGWINCH:
                size = terminal.window_size()
                if size:
                    self.attachment.send({"size": size})
            else:
                self._signal(number)

    def _signal(self, number: int) -> None:
        self.signals.append(number)
        self.attachment.send({"signal": number})

    def _client_died(self) -> None:
        """Give its stdio up, which others have now; what still comes is for the log."""
        if self.client >= 0:
            os.close(self.client)
            self.client = -1
        terminal.give_back(self.plan.mode)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.close(null)
        for kind, output in self.outputs.items():
            output.detach()
            self._acknowledge(kind, output)
        if not self.input_eof:
            self.input_eof = True
            if not self.plan.terminal:  # of which there is no end while the container has it
                self._end_input()
        if self.plan.ends_with_client:
            self._signal(int(signal.SIGKILL))

    def _read_input(self) -> None:
        try:
            data = os.read(0, wire.CHUNK)
        except OSError:
            data = b""  # a hung-up terminal
        if data:
            self.input += data
            self.attachment.send_data(wire.STDIN, self.input_sent, data)
            self.input_sent += len(data)
        else:
            self.input_eof = True
            self._end_input()

    def _end_input(self) -> None:
        self.eof_sent = True
        self.attachment.send({"eof": "stdin", "offset": self.input_sent})

    def _write_output(self, kind: int, output: Output) -> None:
        if not output.flush():
            self.attachment.send({"closed": output.name})
        self._acknowledge(kind, output)

    def _acknowledge(self, kind: int, output: Output) -> None:
        written = output.written
        if written - output.acked >= ACK_EVERY or (not output.pending and written > output.acked):
            output.acked = written
            self.attachment.send({"ack": NAMES[kind], "offset": written})

    # ------------------------------------------------------------ what the supervisor says

    def _take_output(self, frame: wire.Frame) -> None:
        output = self.outputs[frame.kind]
        data = frame.payload[max(0, output.received - frame.offset) :]
        if frame.offset > output.received or not data:
            return  # a gap cannot be: the supervisor resumes from what we said; a repetition is dropped
        output.received += len(data)
        if self.log is not None:
            self.log.write(output.name, data)
        if output.fd >= 0:
            output.pending += data
        else:
            self._acknowledge(frame.kind, output)

    def _take_message(self, message: dict[str, Any]) -> None:
        if "log" in message and self.log is None:
            log = message["log"]
            self.log = LogWriter(log["path"], max_bytes=log["max_bytes"], files=log["files"])
        elif "accepted" in message:
            keep = self.input_sent - int(message["accepted"])
            if 0 <= keep < len(self.input):
                del self.input[: len(self.input) - keep]
        elif "stdin_closed" in message:
            self.input.clear()
            self.input_eof = True
        elif "eof" in message:
            self.outputs[KINDS[message["eof"]]].eof = True
        elif "signalled" in message:
            if message["signalled"] in self.signals:
                self.signals.remove(message["signalled"])
        elif "exit" in message:
            self.exit = message["exit"]
        elif "unknown" in message:
            # It was never created, or is long forgotten; whoever asked for it has been told why.
            self.exit = {"code": LOST}

    # ------------------------------------------------------------ the end

    def _drained(self) -> bool:
        return not any(output.pending for output in self.outputs.values())

    def _explain(self, reason: str) -> None:
        """Tell whoever waits for the process what ended it, where that was not its own doing."""
        if self.plan.client is None:
            return
        terminal.give_back(self.plan.mode)  # in which a line ends as it should
        what = f"exec '{self.plan.exec_id[:12]}' in container" if self.plan.exec_id else "container"
        try:
            os.write(2, f"vmsandbox: {what} '{self.plan.container_id[:12]}' was ended: {one_line(reason)}\n".encode())
        except OSError:
            return  # nobody reads it

    def _finish(self) -> None:
        """Say that everything was written, so that the supervisor may forget the process."""
        assert self.exit is not None
        if self.exit.get("reason"):
            self._explain(str(self.exit["reason"]))
        if self.log is not None:
            self.log.close()
        self.attachment.finish({"done": True})
