"""Forgetting containers of pods that have ended, where there is no supervisor to do it.  Stdlib only."""

from __future__ import annotations

import os

from vmsandbox import records, remains
from vmsandbox.cli import launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.paths import Roots


def remove_from_disk(roots: Roots, container: records.Container) -> None:
    """Forget a container whose pod has ended."""
    from vmsandbox import lent

    document = container.document
    if os.path.isdir(container.sandbox.dir):
        with launch.locked(container.sandbox):
            lent.give_back(lent.record_of(container.sandbox, container.id))
            image = str((document.get("image") or {}).get("id") or "")
            remains.forget_container(roots, container.id, name=container.name, image_id=image)
            remains.forget_sandbox_if_empty(container.sandbox)
    else:
        remains.forget_container(roots, container.id, name=container.name, image_id="")
