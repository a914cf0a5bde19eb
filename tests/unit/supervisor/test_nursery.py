"""How long the process that forks supervisors stays."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from typing import TYPE_CHECKING, cast

from tests.harness.cli import awaited
from vmsandbox import surroundings
from vmsandbox.supervisor import nursery

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_clients_that_it_refuses_do_not_make_it_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "LINGER", 1.0)
    places = itertools.count()
    monkeypatch.setattr(surroundings, "of", lambda _pid, grouped: [next(places), grouped])
    path = str(tmp_path / "nursery.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        standins = cast("nursery.Standins", None)
        serving = threading.Thread(target=nursery._serve, args=(listener, str(tmp_path), standins, None), daemon=True)
        serving.start()
        until, refused = time.monotonic() + 20.0, 0
        while serving.is_alive() and time.monotonic() < until:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1.0)
                try:
                    client.connect(path)
                    refused += client.recv(1) == b""
                except OSError:
                    break
            time.sleep(0.05)
        assert time.monotonic() < until
        awaited(lambda: not serving.is_alive(), timeout=5.0)
    assert refused > 3
