"""Whether the driver still lives: on its own machine the kernel says so, from elsewhere its polls do."""

from __future__ import annotations

import os
import time

LEASE_S = 30.0
CHECK_EVERY_S = 2.0


def machine_key() -> str:
    """Names this boot of this machine and this namespace of process ids: where one pid means one process."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def watch(pid: int, key: str) -> int | None:
    """A descriptor that becomes readable when the driver ends, or None if it runs on another machine.

    Raises ProcessLookupError if it has ended already.
    """
    return os.pidfd_open(pid) if pid and key == machine_key() else None


class Lease:
    """Renewed by every poll; a driver that was never heard of has not let it lapse."""

    def __init__(self, length_s: float = LEASE_S) -> None:
        self._length_s = length_s
        self._renewed: float | None = None

    def renew(self) -> None:
        """The driver has asked for events."""
        self._renewed = time.monotonic()

    @property
    def lapsed(self) -> bool:
        """Whether nothing was heard of the driver for too long."""
        return self._renewed is not None and time.monotonic() - self._renewed > self._length_s
