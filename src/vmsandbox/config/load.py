"""Finds, merges and validates the configuration.

From the weakest to the strongest source: the shipped `default.toml`, `/etc/vmsandbox/config.toml`, the files in
`/etc/vmsandbox/conf.d` by name, overrides from the command line.  `--config FILE` takes the place of everything below
/etc.  Later sources replace single settings, not sections.

Every complaint names the source, and the line where a TOML file has one.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vmsandbox
from vmsandbox.config import cache
from vmsandbox.config.model import SECTIONS, Settings
from vmsandbox.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmsandbox.paths import Roots

ETC = Path("/etc/vmsandbox")
#: what settings that take a word or a path accept, in words
_PATTERN_MEANINGS = {
    "guest.kernel": "has to be 'packaged', 'tuned' or an absolute path",
    "container.seccomp": "has to be 'default', 'unconfined' or an absolute path",
}
#: no honest configuration file is larger
MOST_BYTES = 1024 * 1024


@dataclass(frozen=True)
class _Source:
    """A file's bytes, or the overrides."""

    name: str
    data: bytes

    def where(self, section: str, key: str) -> str:
        """The source's name, with the line of a setting if it can be found."""
        line = line_of(self.data.decode(errors="replace"), section, key)
        return f"'{self.name}' line {line}" if line else f"'{self.name}'"


def shipped_file() -> Path:
    """The `default.toml` that belongs to this installation or checkout."""
    package = Path(vmsandbox.__file__).resolve().parent
    candidates = (package / "configs" / "default.toml", package.parents[1] / "configs" / "default.toml")
    for path in candidates:
        if path.is_file():
            return path
    raise NotFoundError(f"the installation is incomplete: '{candidates[0]}' is missing: reinstall vmsandbox")


def files(config_file: str | None = None, *, etc: Path = ETC) -> list[Path]:
    """The files `load` reads, from the weakest to the strongest."""
    if config_file is not None:
        return [shipped_file(), Path(config_file)]
    found = [shipped_file()]
    if (etc / "config.toml").exists():
        found.append(etc / "config.toml")
    found += sorted(path for path in (etc / "conf.d").glob("*.toml") if not path.name.startswith("."))
    return found


def load(
    roots: Roots,
    *,
    config_file: str | None = None,
    overrides: Mapping[str, str] | None = None,
    etc: Path = ETC,
) -> Settings:
    """The configuration in force.

    `overrides` maps dotted names to text, as in ``{"hypervisor.accel": "tcg"}``.  A set of sources that was validated
    before is taken from the cache in `roots.run`.

    Raises InvalidArgumentError that names every unknown or unacceptable setting, and NotFoundError if `config_file`
    does not exist.
    """
    overrides = overrides or {}
    sources = [_Source(str(path), _content(path)) for path in files(config_file, etc=etc)]
    key = _key(sources, overrides)
    directory = roots.run / "cache"
    cached = cache.read(directory, key)
    if cached is not None:
        return cached
    settings = _validated(sources, overrides)
    cache.write(directory, key, settings)
    return settings


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"configuration file '{path}' does not exist") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidArgumentError(f"cannot read configuration file '{path}': {reason.lower()}") from error
    if len(data) > MOST_BYTES:
        raise InvalidArgumentError(f"configuration file '{path}' is larger than {MOST_BYTES} bytes")
    return data


def _key(sources: Sequence[_Source], overrides: Mapping[str, str]) -> str:
    """A hash that changes whenever the outcome could: content and names of the sources, overrides, version, model."""
    model = {name: {field.name: str(field.type) for field in fields(cls)} for name, cls in SECTIONS.items()}
    text = [[source.name, hashlib.sha256(source.data).hexdigest()] for source in sources]
    whole = json.dumps([vmsandbox.__version__, model, text, sorted(overrides.items())])
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


def _validated(sources: Sequence[_Source], overrides: Mapping[str, str]) -> Settings:
    merged: dict[str, dict[str, Any]] = {}
    origin: dict[tuple[str, str], str] = {}
    complaints: list[str] = []
    for source in sources:
        for section, values in _parsed(source).items():
            unknown = _unknown_section(section, values)
            if unknown:
                complaints.append(f"{source.where(section, '')}: {unknown}")
                continue
            for key, value in values.items():
                if unknown := _unknown_key(section, key):
                    complaints.append(f"{source.where(section, key)}: {unknown}")
                    continue
                merged.setdefault(section, {})[key] = value
                origin[section, key] = source.where(section, key)
    for name, text in overrides.items():
        section, dot, key = name.partition(".")
        unknown = _unknown_section(section, {} if dot else text) or _unknown_key(section, key)
        if unknown:
            complaints.append(f"override '{name}={text}': {unknown}")
            continue
        merged.setdefault(section, {})[key] = _override(section, key, text)
        origin[section, key] = f"override '{name}={text}'"
    if complaints:
        raise _refusal(complaints)
    return _checked(merged, origin)


def _parsed(source: _Source) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(source.data.decode())
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"configuration file '{source.name}' is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error)
        raise InvalidArgumentError(
            f"configuration file '{source.name}' is not TOML: {reason[:1].lower()}{reason[1:]}"
        ) from error


def _unknown_section(section: str, values: object) -> str | None:
    if section not in SECTIONS:
        if isinstance(values, dict):
            return f"unknown section '{section}'{_nearest(section, list(SECTIONS))}"
        homes = [f"{name}.{section}" for name, cls in SECTIONS.items() if section in _keys(cls)]
        hint = f": did you mean '{homes[0]}'?" if homes else _nearest(section, list(SECTIONS))
        return f"unknown setting '{section}' outside of any section{hint}"
    if not isinstance(values, dict):
        return f"'{section}' is a section, not a setting"
    return None


def _unknown_key(section: str, key: str) -> str | None:
    known = _keys(SECTIONS[section])
    if key in known:
        return None
    elsewhere = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in _keys(cls)]
    hint = f": did you mean '{elsewhere[0]}'?" if elsewhere else _nearest(key, known, prefix=f"{section}.")
    return f"unknown setting '{section}.{key}'{hint}"


def _keys(section: type) -> list[str]:
    return [field.name for field in fields(section)]


def _nearest(word: str, known: Sequence[str], *, prefix: str = "") -> str:
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f": did you mean '{prefix}{near[0]}'?"
    return ": known are " + ", ".join(f"'{prefix}{name}'" for name in known)


def _override(section: str, key: str, text: str) -> object:
    """An override's value in the type of its setting; text that does not fit stays text, and is refused later."""
    declared = str(next(field.type for field in fields(SECTIONS[section]) if field.name == key))
    if "int" not in declared and "float" not in declared and declared != "bool":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _checked(merged: dict[str, dict[str, Any]], origin: Mapping[tuple[str, str], str]) -> Settings:
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(Settings)
    try:
        # Only from JSON does strict validation build dataclasses out of mappings.
        return adapter.validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        complaints = [_complaint(detail, origin) for detail in error.errors(include_url=False)]
        raise _refusal(complaints) from error


def _refusal(complaints: Sequence[str]) -> InvalidArgumentError:
    return InvalidArgumentError("; ".join(complaints).replace("\n", "\\n"))


def _complaint(detail: Mapping[str, Any], origin: Mapping[tuple[str, str], str]) -> str:
    location = [str(part) for part in detail["loc"]]
    name = ".".join(location)
    cause = detail.get("ctx", {}).get("error")
    if cause is not None:
        return f"section '{name}': {cause}"
    where = origin.get((location[0], location[1])) if len(location) > 1 else None
    reason = str(detail["msg"]).replace("Input should be", "has to be")
    if detail["type"] == "string_pattern_mismatch":
        reason = _PATTERN_MEANINGS.get(name, "has to be an absolute path")
    return f"{where or 'configuration'}: '{name}' is '{_shown(detail['input'])}' but {reason}"


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def line_of(text: str, section: str, key: str) -> int | None:
    """The line of a TOML file that sets `key` in `section` (or opens the section, if `key` is empty).

    tomllib does not tell positions.  This finds headers, plain and dotted keys; text in exotic spellings yields
    None.
    """
    current = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[\[?\s*([^\]]*?)\s*\]", line)
        if header:
            current = header[1].strip("\"'")
            if not key and current.partition(".")[0] == section:
                return number
            continue
        assignment = re.match(r"\s*([^=#]+?)\s*=", line)
        if not assignment:
            continue
        name = ".".join(part.strip(" \t\"'") for part in assignment[1].split("."))
        full = f"{current}.{name}" if current else name
        wanted = f"{section}.{key}" if key else section
        if full == wanted or full.startswith(wanted + "."):
            return number
    return None
