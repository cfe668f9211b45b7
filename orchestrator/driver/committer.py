"""Commits checkpoints in a thread of its own: manifest, commit log, retention. Storage may be slow, the driver not."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.control.actions import Commit
from orchestrator.control.events import Committed
from orchestrator.errors import StorageError, SupersededError
from orchestrator.spec import Retention
from orchestrator.storage.assemble import assemble
from orchestrator.storage.commitlog import CommitLog, checkpoint_entry
from orchestrator.storage.digest import crc32c
from orchestrator.storage.layout import manifest_path
from orchestrator.storage.manifest import CheckpointRecord, Manifest
from orchestrator.storage.prune import prune

ANSWER_WITHIN_S = 60.0


@dataclass(frozen=True)
class CommitReport:
    """What the journal says of a commit."""

    step: int
    epoch: int
    reason: str
    name: str
    bytes: int
    seconds: float
    path: str
    attempt: int


class Committer:
    """`post(event, report)` is called from the committer's thread."""

    def __init__(
        self,
        log: CommitLog,
        run: str,
        retention: Retention,
        versions: dict[str, str],
        post: Callable[[Committed, CommitReport | None], None],
    ) -> None:
        self._log, self._run, self._retention, self._versions, self._post = log, run, retention, versions, post
        self._jobs: queue.SimpleQueue[Commit | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="committer", daemon=True)
        self._thread.start()
        self.notice: Callable[[str], None] = lambda text: None

    def commit(self, action: Commit) -> None:
        """Queue a commit."""
        self._jobs.put(action)

    def close(self, timeout_s: float) -> None:
        """Finish what is queued."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def locked(self, use: Callable[[CommitLog], Any], timeout_s: float = ANSWER_WITHIN_S) -> Any:
        """Use the commit log from another thread. Raises StorageError if a commit holds it longer than `timeout_s`."""
        if not self._lock.acquire(timeout=timeout_s):
            raise StorageError(
                f"Storage has not answered for {timeout_s:g} s: run {self._run} is still busy with a commit. Look "
                "whether its disk or mount hangs; the same command goes on from the last checkpoint that is there."
            )
        try:
            return use(self._log)
        finally:
            self._lock.release()

    def _serve(self) -> None:
        while True:
            action = self._jobs.get()
            if action is None:
                return
            with self._lock:
                event, report = self._answer(action)
            self._post(event, report)
            if event.ok:
                with self._lock:
                    self._retire()

    def _answer(self, action: Commit) -> tuple[Committed, CommitReport | None]:
        labels: dict[str, Any] = {"reason": action.reason, "name": action.name}
        try:
            report = self._commit(action)
        except SupersededError as error:
            return Committed(action.attempt, action.step, False, str(error), superseded=True, **labels), None
        except Exception as error:  # whatever it is, this thread must live on and the machine must hear of it
            return Committed(action.attempt, action.step, False, f"{type(error).__name__}: {error}", **labels), None
        return Committed(action.attempt, action.step, True, **labels), report

    def _commit(self, action: Commit) -> CommitReport:
        started = time.monotonic()
        manifest = self._assemble(action)
        data = manifest.to_bytes()
        path = manifest_path(manifest.directory)
        self._log.store.write_new(path, [data], len(data))
        self._log.append(checkpoint_entry(CheckpointRecord.of(manifest, crc32c(data))))
        seconds = time.monotonic() - started
        return CommitReport(
            action.step, manifest.epoch, action.reason, action.name, manifest.size_bytes, seconds, manifest.directory,
            action.attempt,
        )  # fmt: skip

    def _assemble(self, action: Commit) -> Manifest:
        shards = [shard.shard for shard in action.shards]
        heads = [shard["head"].get("metrics") or {} for shard in shards if shard["head"]]
        names = {name for head in heads for name in head}
        metrics = {name: _mean([head[name] for head in heads if name in head]) for name in sorted(names)}
        strategy = next((str(shard["head"]["strategy"]) for shard in shards if shard["head"].get("strategy")), "")
        config = next((dict(shard["head"].get("config") or {}) for shard in shards if shard["head"]), {})
        if self._retention.keep_best is not None:
            config["keep_best"] = list(self._retention.keep_best)
        return assemble(
            shards, run=self._run, reason=action.reason, created=time.time(), name=action.name, strategy=strategy,
            config=config, versions=self._versions, metrics=metrics,
        )  # fmt: skip

    def _retire(self) -> None:
        try:
            prune(self._log, self._retention)
        except SupersededError:
            return  # the next commit says so, with what to do
        except Exception as error:  # as above: without this thread nothing is ever committed again
            self.notice(f"old checkpoints could not be removed: {error}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
