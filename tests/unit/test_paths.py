"""Where things are: apart by what survives a reboot, and short enough for sockets."""

from __future__ import annotations

import pytest

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.paths import SOCKET_PATH_MAX, Roots


def test_b1_what_survives_a_reboot_is_apart_from_what_does_not_and_both_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("VMSANDBOX_ROOT", "VMSANDBOX_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    usual = Roots.chosen()
    assert (usual.run_dir, usual.data_dir) == ("/run/vmsandbox", "/var/lib/vmsandbox")
    monkeypatch.setenv("VMSANDBOX_ROOT", "/e/run")
    monkeypatch.setenv("VMSANDBOX_DATA_ROOT", "/e/data")
    assert (Roots.chosen().run_dir, Roots.chosen().data_dir) == ("/e/run", "/e/data")
    roots = Roots.chosen("/o/run", "/o/data")
    sandbox = roots.sandbox("ab" * 32)
    for place in (sandbox.document_file, sandbox.control_file, sandbox.lock_file, str(sandbox.vm), roots.names_dir):
        assert place.startswith("/o/run/")
    for place in (roots.container_data_dir, str(roots.images), str(roots.guests), str(roots.templates)):
        assert place.startswith("/o/data/")


def test_b1_every_socket_of_a_pod_fits_or_the_root_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="choose a shorter --root"):
        Roots.chosen("/" + "r" * 80)
    length = next(count for count in range(80, 0, -1) if _fits("/" + "r" * count))
    longest = Roots.chosen("/" + "r" * length).sandbox("ab" * 32)
    assert len(f"{longest.vm}/virtiofs-0123456789abcdef.sock") == SOCKET_PATH_MAX
    assert len(longest.control_file) <= SOCKET_PATH_MAX


def _fits(root: str) -> bool:
    try:
        Roots.chosen(root)
    except InvalidArgumentError:
        return False
    return True
