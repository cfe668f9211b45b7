"""Whether the kernel killed for lack of memory: its SIGKILL looks like any other, but the cgroup counts it."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def events_file(listing: str = "/proc/self/cgroup", root: Path = _ROOT) -> Path | None:
    """The file that counts this process's cgroup's events (version 2), or None where there is none."""
    try:
        lines = Path(listing).read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)
    places = [root / own, root] if own is not None else [root]
    return next((place / "memory.events" for place in places if (place / "memory.events").is_file()), None)


class OomWatch:
    """Attributes each kill that the cgroup has counted to one death."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen = self._count()

    def took_one(self) -> bool:
        """Whether there was a kill for lack of memory that no earlier call has answered for."""
        if self._count() <= self._seen:
            return False
        self._seen += 1
        return True

    def _count(self) -> int:
        if self._path is None:
            return 0
        try:
            words = self._path.read_text().split()
        except OSError:
            return 0
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words[::2] else 0
