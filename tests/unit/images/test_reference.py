"""Names: one form for everything that means the same, and a message for what is no name."""

from __future__ import annotations

import pytest

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.resources.images.reference import digits_of_id, normalised


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("demo", "demo:latest"),
        ("demo:latest", "demo:latest"),
        ("docker.io/library/demo", "demo:latest"),
        ("docker.io/demo", "demo:latest"),
        ("index.docker.io/library/demo:1", "demo:1"),
        ("docker.io/someone/thing:1.2", "someone/thing:1.2"),
        ("localhost/demo", "localhost/demo:latest"),
        ("Registry.example:5000/a/b__c-d.e:V1_x", "Registry.example:5000/a/b__c-d.e:V1_x"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
    ],
)
def test_a_name_has_one_stored_form(written: str, stored: str) -> None:
    assert normalised(written) == stored
    assert normalised(stored) == stored


@pytest.mark.parametrize(
    "bad",
    ["", "Demo", "a b", "../etc", "/a", "a/", "a//b", "a:", "a:b:c", ".a", "a\n", "a+b", "a@sha256:00", "x" * 201, "é"],
)
def test_what_is_no_name_is_refused_by_name(bad: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        normalised(bad)
    assert f"'{bad}'" in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "digits"),
    [("ab12", "ab12"), ("sha256:ab12", "ab12"), ("demo", None), ("", None), ("AB", None), ("a" * 65, None)],
)
def test_an_id_is_told_by_its_digits(reference: str, digits: str | None) -> None:
    assert digits_of_id(reference) == digits
