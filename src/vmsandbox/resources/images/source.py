"""Where an image is imported from: what a user may write, and what is found there.

    oci:DIR[:TAG]            an OCI image layout
    oci-archive:FILE[:TAG]   the same as a tar archive
    docker-archive:FILE[:REF]  what 'docker save' writes
    rootfs:DIR               a root file system

Choosing reads documents only; layers are read when they are unpacked.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmsandbox.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from vmsandbox.resources.images.archive import Blobs, document
from vmsandbox.resources.images.description import Configuration, configuration, hex_of, member, optional, parsed
from vmsandbox.resources.images.reference import normalised

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Kind = Literal["oci", "oci-archive", "docker-archive", "rootfs"]
KINDS: tuple[Kind, ...] = ("oci", "oci-archive", "docker-archive", "rootfs")

_REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_CONFIGS = (
    "",
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
#: Indexes within indexes.
_DEPTH_MAX = 4
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Source:
    """A source as the user wrote it; `reference` is what follows the path, '' for nothing."""

    kind: Kind
    path: Path
    reference: str
    text: str


@dataclass(frozen=True)
class LayerBlob:
    """A layer where it lies: `name` in the source, and its digest as stored, where the source tells it."""

    name: str
    digest: str = ""


@dataclass(frozen=True)
class Chosen:
    """The one image of a source that is meant, its documents verified.

    `digest` is that of the manifest ('' for docker archives), `names` what the source calls the image.
    """

    configuration: Configuration
    layers: tuple[LayerBlob, ...]
    digest: str
    names: tuple[str, ...]


def parse(text: str) -> Source:
    """Take apart ``KIND:PATH[:REFERENCE]``; the longest path that exists is the path.

    Raises `InvalidArgumentError` for an unknown kind and `NotFoundError` if nothing is there.
    """
    kind = next((kind for kind in KINDS if text.startswith(f"{kind}:")), None)
    if kind is None:
        forms = "'oci:DIR[:TAG]', 'oci-archive:FILE[:TAG]', 'docker-archive:FILE[:REF]' or 'rootfs:DIR'"
        raise InvalidArgumentError(f"'{text}' is not a source of images: write {forms}")
    rest = text.removeprefix(f"{kind}:")
    if not rest or "\0" in rest:
        raise InvalidArgumentError(f"'{text}' names no path")
    wants_directory = kind in ("oci", "rootfs")
    fits = os.path.isdir if wants_directory else os.path.isfile
    path, reference = rest, ""
    while not fits(path) and ":" in path and kind != "rootfs":
        path, _, last = path.rpartition(":")
        reference = f"{last}:{reference}" if reference else last
    if not fits(path):
        sort = "directory" if wants_directory else "file"
        if os.path.exists(path):
            raise InvalidArgumentError(f"'{path}' is not a {sort}, which '{kind}:' needs")
        raise NotFoundError(f"there is no {sort} '{path}'")
    return Source(kind, Path(os.path.abspath(path)), reference, text)


def choose(source: Source, blobs: Blobs) -> Chosen:
    """Find the image that `source` means; raises `NotFoundError`, `InvalidArgumentError`, `UnsupportedError`."""
    chosen = _from_docker(source, blobs) if source.kind == "docker-archive" else _from_layout(source, blobs)
    found = chosen.configuration
    if len(chosen.layers) != len(found.layers):
        raise InvalidArgumentError(
            f"'{source.text}' has {len(chosen.layers)} layers, its configuration speaks of {len(found.layers)}"
        )
    ours = architecture()
    if found.architecture not in ("", ours) or found.os not in ("", "linux"):
        raise UnsupportedError(
            f"'{source.text}' is an image for '{found.os}/{found.architecture}', this machine runs 'linux/{ours}'"
        )
    return chosen


def architecture() -> str:
    """This machine's architecture, in OCI's words."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


# OCI layouts


def _from_layout(source: Source, blobs: Blobs) -> Chosen:
    try:
        index = parsed(document(blobs, "index.json"), f"the index of '{source.text}'")
    except NotFoundError as error:
        raise InvalidArgumentError(f"'{source.path}' is not an OCI image layout: it has no 'index.json'") from error
    found = member(index, "manifests", list, "the index", [])
    descriptor = _selected(source, found)
    names = tuple(_names(source, descriptor))
    manifest, digest = _manifest(source, blobs, descriptor)
    what = f"manifest '{digest}'"
    config = optional(manifest, "config", dict, what)
    layers = optional(manifest, "layers", list, what)
    if config is None or layers is None:
        raise InvalidArgumentError(f"{what} is not an image's: it has no configuration or no layers")
    media_type = member(config, "mediaType", str, what, "")
    if media_type not in _CONFIGS:
        raise InvalidArgumentError(f"{what} is not a container image's: its configuration is '{media_type}'")
    return Chosen(
        configuration=configuration(_verified(blobs, config, "the image's configuration")),
        layers=tuple(_layer(layer, what) for layer in layers),
        digest=digest,
        names=names,
    )


def _selected(source: Source, manifests: Sequence[Any]) -> dict[str, Any]:
    """The descriptor that the source's tag means, or the only one."""
    tagged = [(_annotation(manifest, _REF_NAME), manifest) for manifest in manifests]
    if source.reference:
        fits = [m for name, m in tagged if source.reference in (name, name.rpartition(":")[2], m.get("digest"))]
        exact = [m for name, m in tagged if source.reference == name]
        fits = exact or fits
    else:
        fits = [manifest for _, manifest in tagged]
    if len({str(manifest.get("digest")) for manifest in fits}) > 1:
        # Some writers put one image for each platform side by side.
        fits = [m for m in fits if _platform(m) == ("linux", architecture())] or fits
    if len({str(manifest.get("digest")) for manifest in fits}) == 1:
        return dict(fits[0])
    tags = _listed(name for name, _ in tagged)
    if source.reference and not fits:
        raise NotFoundError(f"'{source.path}' has no image '{source.reference}': it has {tags}")
    if not fits:
        raise NotFoundError(f"'{source.path}' has no image")
    raise InvalidArgumentError(f"'{source.text}' has several images: say which of {tags}, as '{source.kind}:PATH:TAG'")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(set(names) - {""})) or "none with a name"


def _annotation(descriptor: object, key: str) -> str:
    annotations = member(descriptor, "annotations", dict, "a manifest in the index", {})
    return str(member(annotations, key, str, "an annotation in the index", ""))


def _names(source: Source, descriptor: dict[str, Any]) -> Iterable[str]:
    """What the layout calls the image: a full name if it has one, else its directory and tag."""
    tag = _annotation(descriptor, _REF_NAME)
    stem = source.path.name if source.kind == "oci" else source.path.name.partition(".")[0]
    for name in (
        _annotation(descriptor, _FULL_NAME),
        tag if ":" in tag or "/" in tag else "",
        f"{stem}:{tag or 'latest'}",
    ):
        valid = _valid(name)
        if valid:
            return [valid]
    return []


def _valid(name: str) -> str:
    try:
        return normalised(name) if name else ""
    except InvalidArgumentError:
        return ""


def _manifest(source: Source, blobs: Blobs, descriptor: dict[str, Any]) -> tuple[object, str]:
    """Follow a descriptor through indexes to the manifest for this machine."""
    for _ in range(_DEPTH_MAX):
        data = _verified(blobs, descriptor, "a manifest")
        digest = str(descriptor["digest"])
        found = parsed(data, f"manifest '{digest}'")
        media_type = member(descriptor, "mediaType", str, "a manifest", "") or member(
            found, "mediaType", str, f"manifest '{digest}'", ""
        )
        manifests = optional(found, "manifests", list, f"index '{digest}'")
        if manifests is None and media_type not in _INDEXES:
            return found, digest
        descriptor = _for_this_machine(source, manifests or [])
    raise InvalidArgumentError(f"'{source.text}' has indexes within indexes, more than {_DEPTH_MAX} deep")


def _for_this_machine(source: Source, manifests: Sequence[Any]) -> dict[str, Any]:
    ours = ("linux", architecture())
    others = []
    for manifest in manifests:
        theirs = _platform(manifest)
        if theirs == ours or (theirs == ("", "") and len(manifests) == 1):
            return dict(manifest)
        others.append("/".join(theirs))
    raise UnsupportedError(
        f"'{source.text}' has no image for '{'/'.join(ours)}', only for {_listed(set(others) - {'unknown/unknown'})}"
    )


def _platform(manifest: object) -> tuple[str, str]:
    platform = member(manifest, "platform", dict, "a manifest in the index", {})
    return member(platform, "os", str, "a platform", ""), member(platform, "architecture", str, "a platform", "")


def _layer(descriptor: object, what: str) -> LayerBlob:
    digest = member(descriptor, "digest", str, f"a layer of {what}", "")
    media_type = member(descriptor, "mediaType", str, f"a layer of {what}", "")
    digits = hex_of(digest, f"a layer of {what}")
    if "encrypted" in media_type:
        raise UnsupportedError(f"layer '{digest}' is encrypted: decrypt the image first")
    return LayerBlob(f"blobs/sha256/{digits}", digest)


def _verified(blobs: Blobs, descriptor: object, what: str) -> bytes:
    """Read a document by its descriptor, and make sure that it is the one meant."""
    digest = member(descriptor, "digest", str, what, "")
    name = f"blobs/sha256/{hex_of(digest, what)}"
    try:
        data = document(blobs, name)
    except NotFoundError as error:
        raise NotFoundError(f"{what} is missing: {error}") from error
    actual = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if actual != digest:
        raise InvalidArgumentError(f"{what} is damaged: '{name}' has the digest '{actual}'")
    return data


# docker archives


def _from_docker(source: Source, blobs: Blobs) -> Chosen:
    try:
        manifest = parsed(document(blobs, "manifest.json"), f"'manifest.json' of '{source.text}'")
    except NotFoundError as error:
        raise InvalidArgumentError(f"'{source.path}' is not a docker archive: it has no 'manifest.json'") from error
    what = "'manifest.json'"
    if not isinstance(manifest, list) or not manifest:
        raise InvalidArgumentError(f"'manifest.json' of '{source.text}' lists no images")
    images = [(member(image, "RepoTags", list, what, []), image) for image in manifest]
    image = _selected_by_tag(source, images)
    path = member(image, "Config", str, what, "")
    data = document(blobs, path)
    config = configuration(data)
    claimed = path.rpartition("/")[2].removesuffix(".json")
    if len(claimed) == 64 and claimed != config.id:
        raise InvalidArgumentError(
            f"the image's configuration is damaged: '{path}' has the digest 'sha256:{config.id}'"
        )
    layers = member(image, "Layers", list, what, [])
    if not all(isinstance(layer, str) for layer in layers):
        raise InvalidArgumentError(f"'Layers' of {what} is not a list of strings")
    tags = member(image, "RepoTags", list, what, [])
    names = [_valid(tag) for tag in tags if isinstance(tag, str)]
    return Chosen(config, tuple(LayerBlob(layer) for layer in layers), "", tuple(name for name in names if name))


def _selected_by_tag(source: Source, images: Sequence[tuple[Sequence[object], object]]) -> object:
    tags = _listed(tag for tags, _ in images for tag in tags if isinstance(tag, str))
    if not source.reference:
        if len(images) == 1:
            return images[0][1]
        raise InvalidArgumentError(
            f"'{source.text}' has several images: say which of {tags}, as 'docker-archive:FILE:REF'"
        )
    if source.reference.startswith("@") and source.reference[1:].isdigit():
        number = int(source.reference[1:])
        if number < len(images):
            return images[number][1]
    wanted = _valid(source.reference)
    for candidates, image in images:
        if wanted and wanted in [_valid(tag) for tag in candidates if isinstance(tag, str)]:
            return image
    raise NotFoundError(f"'{source.path}' has no image '{source.reference}': it has {tags}")
