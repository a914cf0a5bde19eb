"""Command lines: argparse whose complaints are errors of ours, in one line."""

from __future__ import annotations

import argparse

from vmsandbox.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises InvalidArgumentError for a wrong command line instead of printing the usage and ending."""

    def error(self, message: str) -> NoReturn:
        name, _, unknown = message.partition("unrecognized arguments: ")
        if unknown and not name:
            message = f"unknown option or argument '{unknown}'{self._nearest(unknown.split()[0])}"
        raise InvalidArgumentError(f"{self.prog.removeprefix('vmsandbox ')}: {message}: see '{self.prog} --help'")

    def _nearest(self, word: str) -> str:
        import difflib

        # Without the dashes, which all have in common.
        known = {option.lstrip("-"): option for option in self._option_string_actions}
        fits = difflib.get_close_matches(word.partition("=")[0].lstrip("-"), known, n=1)
        return f" (did you mean '{known[fits[0]]}'?)" if fits else ""
