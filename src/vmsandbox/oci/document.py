"""The base of models of OCI documents, and how errors in such a document are told.

Members that the specification knows have to be of its types; others are allowed and kept, as it demands.  A member
that is null counts as absent, which is how the Go programs that write these documents mean it.  Names are the
specification's in snake case.

`checked` is the way in; its errors name the member.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from vmsandbox.errors import InvalidBundleError

#: no honest list in a config.json is longer, and no text
MOST_ENTRIES = 65_536
MOST_CHARACTERS = 2**20

T = TypeVar("T")
#: a list; in strict mode only JSON's own arrays would do, which the models' validators do not see
Many = Annotated[tuple[T, ...], Field(max_length=MOST_ENTRIES, strict=False)]
Text = Annotated[str, Field(max_length=MOST_CHARACTERS, pattern=r"^[^\x00]*$")]
AbsolutePath = Annotated[str, Field(max_length=4096, pattern=r"^/[^\x00]*$")]
Texts = Many[Text]
TextMap = Annotated[dict[Text, Text], Field(max_length=MOST_ENTRIES)]
UInt16 = Annotated[int, Field(ge=0, le=2**16 - 1)]
UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
#: of a user or group; the highest number is none
Id = Annotated[int, Field(ge=0, le=2**32 - 2)]
UInt64 = Annotated[int, Field(ge=0, le=2**64 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
#: permission bits
FileMode = Annotated[int, Field(ge=0, le=0o7777)]


class Part(BaseModel):
    """What all parts have in common."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        frozen=True,
        strict=True,
        extra="allow",
        # Only the outermost model is ever asked for a schema: building each part's own would double the time.
        defer_build=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:  # noqa: ANN401
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


P = TypeVar("P", bound=Part)


def unique(names: list[str], member: str, key: str) -> None:
    """Raise ValueError if a name is there twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{member} has more than one entry of {key} '{name}'")


def checked(model: type[P], text: bytes, *, name: str) -> P:
    """The document in `text`; `name` says in errors which document it is.

    Raises InvalidBundleError naming the first members that are wrong.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        shown = "; ".join(_complaint(detail) for detail in details[:3])
        more = f"; and {len(details) - 3} more" if len(details) > 3 else ""
        raise InvalidBundleError(f"{name} is not valid: {shown}{more}") from error


def _complaint(detail: Any) -> str:  # noqa: ANN401
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
    cause = detail.get("ctx", {}).get("error")
    if detail["type"] == "value_error" and cause is not None:
        reason = str(cause)
        return f"'{where}': {reason}" if where else reason
    reason = str(detail["msg"]).replace("a valid tuple", "a valid array")
    if detail["type"] == "missing":
        return f"'{where}' is missing"
    if detail["type"] == "string_pattern_mismatch" and detail["ctx"]["pattern"].startswith("^/"):
        return f"'{where}' has to be an absolute path"
    if detail["type"] == "json_invalid":
        return reason[:1].lower() + reason[1:]
    where = f"'{where}'" if where else "the document"
    return f"{where} {reason[:1].lower()}{reason[1:]}".replace("input should", "should")
