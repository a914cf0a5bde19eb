"""The control socket: one request a connection, or one stand-in's stdio.

This is one of the three edges at which any error becomes an answer.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmsandbox import log as logs
from vmsandbox import wire
from vmsandbox.errors import SandboxError, UnavailableError, room_for
from vmsandbox.supervisor import copying, execution
from vmsandbox.supervisor.explaining import explained
from vmsandbox.supervisor.reserve import Reserve

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from vmsandbox.supervisor.service import Service

log = logging.getLogger(__name__)

#: Verbs whose caller wants the pod's resources released when the connection closes, not only the answer.
UNTIL_RELEASED = {"run", "create", "start", "stop", "delete", "pod-start", "pod-stop", "pod-remove"}
#: what to do about it
HELP = {
    errno.ENOSPC: "make room where '--root' and '--data-root' are, or choose others",
    errno.EDQUOT: "make room where '--root' and '--data-root' are, or choose others",
    errno.EROFS: "choose another '--root' or '--data-root'",
}


class Control:
    """Serves connections on the pod's control socket until it is closed."""

    def __init__(self, service: Service, tasks: asyncio.TaskGroup) -> None:
        self.service = service
        self.tasks = tasks
        #: requests without an answer yet, and stand-ins that are not done: a pod does not go before they are
        self._open = 0
        #: closed by the end of this process: their callers wait for it
        self._until_exit: list[asyncio.StreamWriter] = []
        self._quiet = asyncio.Event()
        self._quiet.set()
        #: set when everything is released
        self.released = asyncio.Event()
        #: somebody has asked for something
        self._asked = asyncio.Event()
        self._reserve = Reserve()

    async def idle(self) -> None:
        """Wait until something was asked and answered, and nothing is asked any more."""
        await self._asked.wait()
        await self._quiet.wait()

    async def heard(self, *, timeout: float) -> None:
        """Wait until somebody has asked for something, but not for ever."""
        try:
            async with asyncio.timeout(timeout):
                await self._asked.wait()
        except TimeoutError:
            return

    async def quiet(self) -> None:
        """Wait until every request is answered and every stand-in has what it is owed."""
        await self._quiet.wait()

    @contextmanager
    def _owed(self) -> Iterator[None]:
        self._open += 1
        self._quiet.clear()
        self._asked.set()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._quiet.set()

    async def listen(self, listener: socket.socket) -> asyncio.Server:
        asyncio.get_running_loop().set_exception_handler(self._reserve.handle)
        return await asyncio.start_unix_server(self._accepted, sock=listener, limit=1 << 20)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.create_task(self._serve(reader, writer), name="control connection")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with self._owed():
                frame = await wire.read(reader)
                if frame is None:
                    return
                if self.released.is_set():
                    # Too late.  Without an answer it is asked again, of what is on disk when this process has ended.
                    self._until_exit.append(writer)
                    return
                request = frame.message()
                logs.container_id.set(str(request.get("container") or request.get("id") or "-"))
                if request.get("verb") == "attach":
                    await execution.attach(self.service, request, reader, writer)
                    return
                until_released = await self._answer(request, reader, writer)
            if until_released:
                self._until_exit.append(writer)
                await self.released.wait()
            elif request.get("verb") == "run":
                await self._departed(str(request.get("id")))
        except (wire.WireError, OSError) as error:
            log.info("a connection broke: %s", error)
        except SandboxError as error:
            log.info("a connection ended: %s", error)
        except Exception:
            log.exception("a connection failed")
        finally:
            if writer not in self._until_exit:
                writer.close()
                # Its descriptor is free when the loop has come round to it.
                asyncio.get_running_loop().call_later(0, self._reserve.refill)

    async def _departed(self, container_id: str) -> None:
        """Until a container of a pod that goes on has ended and is released, or the pod has."""
        waiting = [
            asyncio.ensure_future(self.service.departed(container_id)),
            asyncio.ensure_future(self.released.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Carry out a request; says whether its caller waits for the pod's end as well."""
        verb = request.get("verb")
        try:
            if verb in copying.VERBS:
                answer = await self.service.copy(request, reader, writer)
            elif verb in ("run", "create"):
                with self._giving_up(reader):
                    answer = await self.service.dispatch(request)
            else:
                answer = await self.service.dispatch(request)
        except SandboxError as error:
            answer = _told(await explained(self.service, str(verb), error))
        except (wire.WireError, ConnectionError):
            raise
        except OSError as error:
            log.exception("request '%s' failed", verb)
            answer = {"error": {"code": UnavailableError.code, "message": _words(error)}}
        except Exception as error:
            log.exception("request '%s' failed", verb)
            answer = {"error": {"code": "internal", "message": f"internal error: {type(error).__name__}: {error}"}}
        if self.released.is_set():
            return True  # it cannot have been done: what it was about was given back meanwhile
        writer.write(wire.encode_message(answer))
        await writer.drain()
        if verb in ("run", "create", "create-bundle") and self.service.implicit():
            return True
        return verb in UNTIL_RELEASED and self.service.ending()

    @contextmanager
    def _giving_up(self, reader: asyncio.StreamReader) -> Iterator[None]:
        """While a request is carried out, its caller may say that it wants nothing of it any more.

        One that only goes away has not said so: what it asked for is made.
        """
        hearing = self.tasks.create_task(self._hear(reader), name="caller of a request")
        try:
            yield
        finally:
            hearing.cancel()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        try:
            frame = await wire.read(reader)
            given_up = frame is not None and frame.message().get("give_up")
        except (wire.WireError, OSError):
            return
        if given_up:
            self.service.give_up()


async def refuse(listener: socket.socket, error: SandboxError, *, timeout: float) -> None:
    """Tell the first who asks why there is no pod, where not even a service can be had; for `timeout` seconds."""
    told = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            frame = await wire.read(reader)
            if frame is not None and frame.message().get("verb") != "attach":
                writer.write(wire.encode_message(_told(error)))
                await writer.drain()
                told.set()
        except (wire.WireError, OSError) as broken:
            log.info("a connection broke: %s", broken)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, sock=listener, limit=1 << 20)
    try:
        async with asyncio.timeout(timeout):
            await told.wait()
    except TimeoutError:
        pass
    finally:
        server.close()


def _told(error: SandboxError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": str(error), "detail": error.detail}}


def _words(error: OSError) -> str:
    """What the machine lacks, and where."""
    where = f" for '{error.filename}'" if error.filename else ""
    next_step = HELP.get(error.errno or 0, "'--debug' and the supervisor's log say more")
    return f"the machine refuses{where}: {error.strerror or error}{room_for(error) or f'; {next_step}'}"
