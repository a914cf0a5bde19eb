"""Imports an image: finds it in its source, unpacks its layers, makes one file of them, puts that into the store.

Nothing appears in the store before it is whole.  The image's id is the digest of its configuration, which lists the
digests of its layers' content: an id that is in the store already means that nothing needs to be read.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError, printable
from vmsandbox.resources.images import erofs
from vmsandbox.resources.images.archive import Archive, Directory
from vmsandbox.resources.images.description import configuration
from vmsandbox.resources.images.document import Image
from vmsandbox.resources.images.layer import Layers
from vmsandbox.resources.images.reference import normalised
from vmsandbox.resources.images.source import Chosen, Source, architecture, choose, parse
from vmsandbox.resources.images.store import storage_error
from vmsandbox.resources.images.streams import Budget, Measured, Section, decompressed, is_compressed
from vmsandbox.resources.images.workplace import Workplace, working

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmsandbox.resources.images.archive import Blobs
    from vmsandbox.resources.images.source import LayerBlob
    from vmsandbox.resources.images.store import ImageStore

    Progress = Callable[[str], None]

CHUNK = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What an image may unpack to at most, over all its layers; a bound for hostile ones."""

    max_bytes: int = 64 << 30
    max_entries: int = 1_000_000


@dataclass(frozen=True)
class RootfsOptions:
    """The configuration of an image made of a directory, which brings none."""

    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    env: Sequence[str] = ()
    workdir: str = ""
    user: str = ""

    def config(self) -> dict[str, Any]:
        """As the ``config`` object of an OCI image configuration."""
        for entry in self.env:
            if not entry.partition("=")[0] or "=" not in entry:
                raise InvalidArgumentError(f"'{entry}' is not an environment entry: write 'NAME=VALUE'")
        if self.workdir and not self.workdir.startswith("/"):
            raise InvalidArgumentError(f"working directory '{self.workdir}' is not an absolute path")
        config = {
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "Env": list(self.env),
            "WorkingDir": self.workdir,
            "User": self.user,
        }
        return {key: value for key, value in config.items() if value}


def _ignored(_: str) -> None:
    pass


@dataclass(frozen=True)
class Importer:
    """Imports into `store`; `progress` gets one line for each step."""

    store: ImageStore
    limits: Limits = field(default_factory=Limits)
    progress: Progress = _ignored

    def run(self, source: str, *, names: Sequence[str] = (), rootfs: RootfsOptions | None = None) -> Image:
        """Import ``KIND:PATH[:REFERENCE]`` under `names`, or under those the source has.

        Raises `InvalidArgumentError` for what is no image or a hostile one, `NotFoundError`, `UnsupportedError`, and
        `ExhaustedError` on a full disk; then the store is as it was.
        """
        wanted = tuple(normalised(name) for name in names)
        parsed = parse(source)
        if rootfs is not None and parsed.kind != "rootfs":
            raise InvalidArgumentError(f"only 'rootfs:' takes a configuration, '{source}' brings its own")
        try:
            if parsed.kind == "rootfs":
                return self._import_directory(parsed, wanted, rootfs or RootfsOptions())
            with self._opened(parsed) as blobs:
                return self._import_chosen(parsed, blobs, choose(parsed, blobs), wanted)
        except SandboxError as error:
            # Names out of an archive must not steer a terminal.
            error.args = (printable(str(error)),)
            raise
        except OSError as error:
            raise storage_error(error, f"import '{source}'", self.store.root) from error

    @contextmanager
    def _opened(self, source: Source) -> Iterator[Blobs]:
        if source.kind == "oci":
            yield Directory(source.path)
            return
        with open(source.path, "rb") as file, ExitStack() as stack:
            whole = Section(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            if is_compressed(whole):
                self.progress(f"decompressing '{source.path}'")
                place = stack.enter_context(working(self.store.work))
                file = stack.enter_context(self._unpacked_archive(whole, place))
            yield Archive(file.fileno(), source.path)

    @contextmanager
    def _unpacked_archive(self, whole: Section, place: Workplace) -> Iterator[Any]:
        budget = Budget(self.limits.max_bytes)
        with open(place.directory / "archive.tar", "w+b") as file:
            with decompressed(whole) as content:
                measured = Measured(content, budget)
                while data := measured.read(CHUNK):
                    file.write(data)
            file.flush()
            yield file

    def _import_chosen(self, source: Source, blobs: Blobs, chosen: Chosen, wanted: tuple[str, ...]) -> Image:
        image_id = chosen.configuration.id
        names = wanted or chosen.names
        present = self._present(image_id, names)
        if present is not None:
            return present
        with self._workplace(image_id) as place:
            present = self._present(image_id, names)
            if present is not None:
                return present
            tree = place.directory / "tree"
            tree.mkdir(mode=0o755)
            self._unpack(blobs, chosen, tree)
            return self._finish(source, place, tree, chosen, names)

    def _import_directory(self, source: Source, wanted: tuple[str, ...], options: RootfsOptions) -> Image:
        config = options.config()
        self._refuse_own_store(source.path)
        with self._workplace(None) as place:
            staged, digest = self._build(place, source.path)
            document = {
                "architecture": architecture(),
                "os": "linux",
                "config": config,
                # Not a layer, but what stands in its place: the digest of the file system.
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            }
            made = configuration(json.dumps(document, sort_keys=True).encode())
            fallback = source.path.name.lower() or "rootfs"
            chosen = Chosen(made, (), "", wanted or _usable(fallback))
            return self._present(made.id, chosen.names) or self._publish(source, staged, digest, chosen, chosen.names)

    def _present(self, image_id: str, names: tuple[str, ...]) -> Image | None:
        image = self.store.get(image_id)
        if image is None:
            return None
        self.progress(f"image {image_id[:12]} is already there")
        missing = [name for name in names if name not in image.names]
        return self.store.tag(image_id, missing) if missing else image

    @contextmanager
    def _workplace(self, key: str | None) -> Iterator[Workplace]:
        def waiting() -> None:
            self.progress("waiting for another import of the same image")

        with working(self.store.work, key, waiting=waiting) as place:
            self.store.sweep()
            yield place

    def _unpack(self, blobs: Blobs, chosen: Chosen, tree: Path) -> None:
        count = len(chosen.layers)
        with Layers(tree, max_bytes=self.limits.max_bytes, max_entries=self.limits.max_entries) as layers:
            for number, (layer, wanted) in enumerate(zip(chosen.layers, chosen.configuration.layers, strict=True), 1):
                title = f"'{layer.digest or wanted}'"
                with self._layer(blobs, layer, title) as section:
                    self.progress(f"unpacking layer {number} of {count} ({megabytes(section.size)})")
                    if layer.digest and section.sha256() != layer.digest:
                        raise InvalidArgumentError(f"layer {title} is damaged: its file has another digest")
                    actual = layers.add(section.rewound(), title=title)
                if actual != wanted:
                    raise InvalidArgumentError(
                        f"layer {title} is damaged: its content has the digest '{actual}', "
                        f"the image's configuration says '{wanted}'"
                    )
            layers.finish()

    @contextmanager
    def _layer(self, blobs: Blobs, layer: LayerBlob, title: str) -> Iterator[Section]:
        with ExitStack() as stack:
            try:
                section = stack.enter_context(blobs.opened(layer.name))
            except NotFoundError as error:
                raise NotFoundError(f"layer {title} is missing: {error}") from error
            yield section

    def _finish(self, source: Source, place: Workplace, tree: Path, chosen: Chosen, names: tuple[str, ...]) -> Image:
        staged, digest = self._build(place, tree)
        return self._publish(source, staged, digest, chosen, names)

    def _build(self, place: Workplace, tree: Path) -> tuple[Path, str]:
        self.progress("writing the file system")
        staged = place.directory / "image.erofs"
        return staged, erofs.build(tree, staged, pass_fds=(place.lock,))

    def _publish(self, source: Source, staged: Path, digest: str, chosen: Chosen, names: tuple[str, ...]) -> Image:
        made = chosen.configuration
        image = Image(
            id=made.id,
            names=(),
            erofs=self.store.blobs / f"{digest}.erofs",
            size=staged.stat().st_size,
            config=made.config,
            architecture=made.architecture or architecture(),
            created=made.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            source=source.text,
            digest=chosen.digest,
            layers=made.layers,
        )
        return self.store.publish(image, staged, names)

    def _refuse_own_store(self, directory: Path) -> None:
        store = Path(os.path.realpath(self.store.root))
        real = Path(os.path.realpath(directory))
        if store == real or real in store.parents:
            raise InvalidArgumentError(f"'{directory}' contains the image store '{self.store.root}' itself")


def _usable(name: str) -> tuple[str, ...]:
    try:
        return (normalised(name),)
    except InvalidArgumentError:
        return ()


def megabytes(size: int) -> str:
    """A size for people: ``12.3 MB``."""
    return f"{size / 1e6:.1f} MB"
