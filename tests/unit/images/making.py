"""Makes layers, layouts and archives: honest ones and those no honest program would write."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FILE, DIRECTORY, HARD_LINK, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
CHARACTER, BLOCK, FIFO = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True)
class Member:
    """One member of a layer."""

    name: str
    kind: bytes = FILE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = 1_000_000_000
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


def directory(name: str, mode: int = 0o755, **rest: Any) -> Member:
    return Member(name, DIRECTORY, mode=mode, **rest)


def link(name: str, target: str, **rest: Any) -> Member:
    return Member(name, LINK, link=target, mode=0o777, **rest)


def hard_link(name: str, target: str) -> Member:
    return Member(name, HARD_LINK, link=target)


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive, written by the standard library."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.mode, info.uid, info.gid = member.kind, member.mode, member.uid, member.gid
            info.mtime, info.linkname, info.size = member.mtime, member.link, len(member.data)
            info.devmajor, info.devminor = member.device
            for name, value in member.xattrs.items():
                info.pax_headers[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
            archive.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


def header(name: bytes, kind: bytes, size: int = 0, *, link: bytes = b"") -> bytes:
    """One header block, with whatever it is told."""
    number = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + (size % (1 << 88)).to_bytes(11, "big")
    if size < 0:
        number = b"\xff" + (size % (1 << 88)).to_bytes(11, "big")
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = number
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """One pax record."""
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """A pax header with its records."""
    data = b"".join(record(*pair) for pair in records)
    return header(b"pax", kind, len(data)) + padded(data)


def compressed(data: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if how == "zstd":
        return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout
    return data


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def configuration(layers: Iterable[bytes], config: dict[str, Any] | None = None, **rest: Any) -> bytes:
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sh"]} if config is None else config,
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        **rest,
    }
    return json.dumps(document).encode()


class Layout:
    """An OCI image layout in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifests: list[dict[str, Any]] = []
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.write_index()

    def blob(self, digest: str) -> Path:
        return self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def put(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Store a blob; its descriptor."""
        digest = sha256(data)
        self.blob(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def put_json(self, value: Any, media_type: str) -> dict[str, Any]:
        return self.put(json.dumps(value).encode(), media_type)

    def manifest(
        self,
        layers: Sequence[bytes],
        *,
        compression: str = "gzip",
        config: dict[str, Any] | None = None,
        config_bytes: bytes | None = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """Store an image of these (uncompressed) layers; the descriptor of its manifest."""
        data = configuration(layers, config, **rest) if config_bytes is None else config_bytes
        suffix = f"+{compression}" if compression else ""
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.put(data, CONFIG),
            "layers": [self.put(compressed(layer, compression), LAYER + suffix) for layer in layers],
        }
        return self.put_json(manifest, MANIFEST)

    def tag(self, descriptor: dict[str, Any], name: str = "", **rest: Any) -> None:
        """List a manifest in the index."""
        annotations = {"org.opencontainers.image.ref.name": name} if name else {}
        self.manifests.append({**descriptor, "annotations": annotations, **rest})
        self.write_index()

    def write_index(self) -> None:
        document = {"schemaVersion": 2, "manifests": self.manifests}
        (self.path / "index.json").write_text(json.dumps(document))


def layout(path: Path, *layers: bytes, name: str = "latest", **rest: Any) -> Layout:
    """A layout with one image."""
    made = Layout(path)
    made.tag(made.manifest(layers, **rest), name)
    return made


def archived(source: Path, target: Path) -> Path:
    """Pack a directory's files as an archive of blobs."""
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for entry in sorted(os.listdir(source)):
            archive.add(source / entry, entry)
    return target


def docker_archive(path: Path, *layers: bytes, tags: Sequence[str] = ("demo:latest",), **rest: Any) -> Path:
    """What ``docker save`` wrote for most of its life."""
    data = configuration(layers, **rest)
    name = f"{sha256(data).removeprefix('sha256:')}.json"
    names = [f"{sha256(layer).removeprefix('sha256:')}/layer.tar" for layer in layers]
    manifest = json.dumps([{"Config": name, "RepoTags": list(tags), "Layers": names}]).encode()
    members = [Member(name, data=data), Member("manifest.json", data=manifest)]
    members += [Member(layer_name, data=layer) for layer_name, layer in zip(names, layers, strict=True)]
    path.write_bytes(tar(*members))
    return path
