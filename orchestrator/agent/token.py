"""Does a node see what the driver sees? What a driver has just written must be read back by every agent."""

from __future__ import annotations

import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """`entry`: the driver's takeover entry in the run's commit log, which has `nonce` in it. `script`: "" for a module.

    Paths are absolute. `script_crc32`: of the script's bytes where the driver runs.
    """

    entry: str
    nonce: str
    script: str = ""
    script_crc32: int = 0

    @classmethod
    def of(cls, entry: str, nonce: str, script: str) -> Token:
        """For a script as it is here. Raises OSError if it cannot be read."""
        return cls(entry, nonce, script, _crc32(script) if script else 0)

    def difference(self) -> str:
        """What is otherwise here than it is for the driver, to follow "node X: "; empty if nothing is."""
        storage = "storage must be the same place on every node, so choose a `--storage` that all of them share"
        try:
            with open(self.entry, encoding="utf-8") as file:
                found = file.read()
        except (OSError, ValueError) as error:
            return f"cannot read {self.entry} ({error}): {storage}"
        if self.nonce not in found:
            return f"reads something else in {self.entry} than this command wrote there: {storage}"
        return self._other_script()

    def _other_script(self) -> str:
        if not self.script:
            return ""
        try:
            same = _crc32(self.script) == self.script_crc32
        except OSError as error:
            return f"cannot read the script {self.script} ({error}): it must lie there on every node"
        return "" if same else f"has another script in {self.script} than this machine: copy it to every node"


def _crc32(path: str) -> int:
    with open(path, "rb") as file:
        return zlib.crc32(file.read())
