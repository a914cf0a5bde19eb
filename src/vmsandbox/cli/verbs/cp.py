"""`vmsandbox cp`: files and directories between a container and the host, as docker's `cp` does it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
import tarfile
import zlib

from vmsandbox import records, wire
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.cli.verbs._running import stopped_error
from vmsandbox.cli.verbs._unpack import Unpacker, opened
from vmsandbox.cli.verbs.run import size_mib
from vmsandbox.errors import InvalidArgumentError, NotFoundError, UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from io import BufferedReader
    from typing import IO, Any, cast

    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots
    from vmsandbox.plainsocket import UnixSocket
else:

    def cast(_kind: object, value: object) -> object:
        return value


#: links that are followed from one to the next before that is taken for a circle, as the kernel does
MOST_LINKS = 40


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="vmsandbox cp",
        allow_abbrev=False,
        description="Copies files and directories from or to a running container. A path in a container is "
        "CONTAINER:PATH; '-' is a tar archive on stdin or stdout; one that ends in '/.' stands for what is in it.",
    )
    made.add_argument("-a", "--archive", action="store_true", help="keep the numbers of owners and groups")
    made.add_argument("-L", "--follow-link", action="store_true", help="copy what a source link leads to")
    made.add_argument(
        "--max-size", default="64g", metavar="SIZE", help="the most a container may send, as 10g (default 64g)"
    )
    made.add_argument("source", metavar="SOURCE")
    made.add_argument("destination", metavar="DESTINATION")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    source, destination = place(arguments.source), place(arguments.destination)
    if bool(source[0]) == bool(destination[0]):
        raise InvalidArgumentError("exactly one of source and destination has to be CONTAINER:PATH")
    name = source[0] or destination[0]
    copier = Copier(options.roots(), name, owners=arguments.archive, follow=arguments.follow_link)
    if source[0]:
        return copier.out(source[1], destination[1], most_bytes=(size_mib(arguments.max_size) or 0) << 20)
    return copier.into(source[1], destination[1])


def place(text: str) -> tuple[str, str]:
    """Container ("" for the host) and path; a host path with a colon is written with a slash before it."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or not name:
        if not text:
            raise InvalidArgumentError("an empty path cannot be copied")
        return "", text
    return name, "/" + path.lstrip("/")


def last_name(path: str) -> str:
    return os.path.basename(path.rstrip("/"))


def is_content(path: str) -> bool:
    """Whether the content of a directory is meant, and not the directory."""
    return path == "." or path.endswith("/.")


class Incoming:
    """An archive as it comes from the supervisor, for reading as a file."""

    def __init__(self, sock: UnixSocket) -> None:
        self.sock = sock
        self.ended = False
        self._data = b""

    def read(self, size: int) -> bytes:
        while not self._data and not self.ended:
            try:
                frame = wire.receive(self.sock)
            except (OSError, wire.WireError) as error:
                raise UnavailableError(f"the pod's supervisor broke off: {error}") from error
            if frame is None:
                raise UnavailableError("the pod's supervisor broke off in the middle of an archive")
            if frame.kind == wire.MESSAGE:
                answer = frame.message()
                if "error" in answer:
                    raise client.rebuilt(answer["error"])
                self.ended = True
            else:
                self._data = frame.payload
        data, self._data = self._data[:size], self._data[size:]
        return data


class Outgoing:
    """An archive on its way to the supervisor, for writing as a file; waits as long as the guest is slower."""

    def __init__(self, sock: UnixSocket) -> None:
        self.sock = sock
        self.offset = 0

    def write(self, data: bytes) -> int:
        for at in range(0, len(data), wire.CHUNK):
            piece = data[at : at + wire.CHUNK]
            self.sock.sendall(wire.encode_data(wire.STDIN, self.offset, piece))
            self.offset += len(piece)
        return len(data)


class Copier:
    """Copies to and from one container."""

    def __init__(self, roots: Roots, name: str, *, owners: bool, follow: bool) -> None:
        self.roots = roots
        self.name = name
        self.owners = owners
        self.follow = follow
        self.container = records.load(roots, records.resolve(roots, name))
        if self.container.status() == "stopped":
            raise stopped_error(name, wanted="copy files of")

    def _asked(self, request: dict[str, Any]) -> AbstractContextManager[UnixSocket]:
        sock = launch.connect_or_take_over(self.roots, self.container.sandbox)
        try:
            client.send(sock, {**request, "container": self.container.id})
        except BaseException:
            sock.close()
            raise
        return sock

    def _found_inside(self, path: str) -> tuple[str, bool | None]:
        """Where a path in the container leads by links, and whether a directory is there; None if nothing is."""
        for _ in range(MOST_LINKS):
            request = {"verb": "copy-out", "path": path, "follow": False}
            try:
                with self._asked(request) as sock, opened(cast("IO[bytes]", Incoming(sock))) as archive:
                    member = archive.next()
            except NotFoundError:
                return path, None
            if member is None or not member.issym():
                return path, member is not None and member.isdir()
            # Not normalised: '..' is the parent of where a link before it leads, as for the kernel.
            path = os.path.join(os.path.dirname(path.rstrip("/")), member.linkname)
        raise InvalidArgumentError(f"'{path}' in the container is a link that leads to too many others")

    # ------------------------------------------------------------ out of the container

    def out(self, path: str, destination: str, *, most_bytes: int) -> int:
        content = is_content(path)
        source = path[:-1].rstrip("/") or "/" if content else path
        request = {"verb": "copy-out", "path": source, "follow": self.follow or content or path.endswith("/")}
        with self._asked(request) as sock:
            incoming = Incoming(sock)
            if destination == "-":
                while data := incoming.read(wire.CHUNK):
                    sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
                return 0
            directory, name = target_on_host(destination, "" if content else last_name(source))
            if content and name:
                os.mkdir(os.path.join(directory, name), 0o755)
                directory, name = os.path.join(directory, name), ""
            unpacker = Unpacker(directory, last_name(source) or ".", name, owners=self.owners, most_bytes=most_bytes)
            unpacker.only_directory = destination.endswith("/") and not os.path.isdir(destination)
            unpacker.unpack(cast("IO[bytes]", incoming))
            unpacker.report()
        return 0

    # ------------------------------------------------------------ into the container

    def into(self, source: str, path: str) -> int:
        if source == "-":
            self._send(path, pass_on)
            return 0
        try:
            os.lstat(source)
        except OSError as error:
            raise NotFoundError(f"cannot copy '{source}': {error.strerror}") from error
        content = is_content(source)
        followed = self.follow or content or source.endswith("/")
        is_directory = os.path.isdir(source) and (followed or not os.path.islink(source))
        if content and not is_directory:
            raise InvalidArgumentError(f"'{source}' is not a directory")
        directory, name = self._target_inside(path, is_directory=is_directory)
        if not name and not content:
            name = last_name(os.path.abspath(source))
        self._send(directory, lambda outgoing: self._pack(source, name, outgoing))
        return 0

    def _target_inside(self, path: str, *, is_directory: bool) -> tuple[str, str]:
        """The directory to unpack into and what the top entry is called there ("": as on the host)."""
        path, there = self._found_inside(path)
        if there:
            return path, ""
        if there is False and is_directory:
            raise InvalidArgumentError(f"'{path}' in the container is a file: a directory cannot be copied onto it")
        if path.endswith("/") and not is_directory:
            raise NotFoundError(f"directory '{path}' does not exist in the container")
        return os.path.dirname(path.rstrip("/")) or "/", last_name(path)

    def _send(self, directory: str, pack: Callable[[Outgoing], None]) -> None:
        with self._asked({"verb": "copy-in", "path": directory}) as sock:
            try:
                pack(Outgoing(sock))
                sock.sendall(wire.encode_message({"end": True}))
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was refused: the answer says why
            client.answer(sock)

    def _pack(self, source: str, name: str, outgoing: Outgoing) -> None:
        """The source as an archive whose top entry is `name`, or whose entries are what is in it for ""."""

        def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
            if not self.owners:
                member.uid = member.gid = 0
            member.uname = member.gname = ""
            return member

        top = os.path.realpath(source) if self.follow or source.endswith("/") or is_content(source) else source
        with tarfile.open(fileobj=cast("IO[bytes]", outgoing), mode="w|", format=tarfile.PAX_FORMAT) as archive:
            try:
                for path, called in (
                    [(top, name)] if name else [(os.path.join(top, entry), entry) for entry in sorted(os.listdir(top))]
                ):
                    archive.add(path, called, filter=owned)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except OSError as error:
                raise InvalidArgumentError(
                    f"cannot read '{error.filename or source}': {error.strerror or error}"
                ) from error


def pass_on(outgoing: Outgoing) -> None:
    """What is an archive already; a compressed one is unpacked here."""
    plain = decompressed(cast("BufferedReader", sys.stdin.buffer))
    while True:
        try:
            data = plain.read(wire.CHUNK)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InvalidArgumentError(f"the archive on stdin is damaged: {error}") from error
        if not data:
            return
        outgoing.write(data)


def decompressed(source: BufferedReader) -> IO[bytes]:
    """Whatever gzip, bzip2 or xz has packed, as it was before."""
    head = source.peek(6)
    if head.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.open(source))
    if head.startswith(b"BZh"):
        return cast("IO[bytes]", bz2.open(source))
    if head.startswith(b"\xfd7zXZ\0"):
        return cast("IO[bytes]", lzma.open(source))
    return source


def target_on_host(destination: str, name: str) -> tuple[str, str]:
    """The directory to unpack into, and what the top entry is called there."""
    if os.path.isdir(destination):
        return destination, name
    if os.path.islink(destination):
        destination = os.path.realpath(destination)
    if os.path.lexists(destination) and not name:
        raise InvalidArgumentError(f"'{destination}' is a file: a directory cannot be copied onto it")
    directory = os.path.dirname(destination.rstrip("/")) or "."
    if not os.path.isdir(directory):
        raise NotFoundError(f"directory '{directory}' does not exist")
    return directory, last_name(destination)
