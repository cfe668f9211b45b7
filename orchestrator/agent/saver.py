"""The saver: a process of its own that writes slots of shared memory to storage while training goes on.

Jobs over one socket: ``{"op": "write", "id", "directory", "uri", "step", "parts": [{"fd", "slot", "pieces", "index"}],
…}`` with the segments' descriptors (a part without an index lends its head only); answers are ``{"op": "written", "id",
"shards": […]}`` or ``{"op": "failed", "id", "why"}``. It imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

from orchestrator.agent.held import label_at
from orchestrator.storage.heads import checkpoint_head
from orchestrator.storage.layout import shard_path
from orchestrator.storage.segment import TensorEntry
from orchestrator.storage.shards import write_shard
from orchestrator.storage.store import open_store
from orchestrator.worker import wire
from orchestrator.worker.shm import Segment, SlotLabel


def main() -> None:
    """`python -m orchestrator.agent.saver FD`: serve until the agent closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    while True:
        received = wire.receive(sock)
        if received is None:
            return
        job, descriptors = received
        try:
            answer = {"op": "written", "id": job["id"], "shards": write(job, descriptors)}
        except Exception as error:  # whatever storage does, training goes on; the driver is told
            answer = {"op": "failed", "id": job["id"], "why": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(OSError):
            wire.send(sock, answer)


def write(job: dict[str, Any], descriptors: list[int]) -> list[dict[str, Any]]:
    """Write every part as one shard of the checkpoint; slots are unpinned whatever happens.

    Raises StorageError, and RuntimeError if a slot is not (or did not stay) that of the job's step.
    """
    segments = [Segment(fd) for fd in descriptors]
    try:
        labels = _labels(job, segments)
        store = open_store(job["uri"])
        metas = [json.loads(segments[part["fd"]].meta(part["slot"])) for part in job["parts"]]
        head = checkpoint_head(_by_authority(job["parts"], metas))
        reports = []
        for part, meta in zip(job["parts"], metas, strict=True):
            if part["index"] is not None:
                reports.append(_write_part(store, job, part, meta, head, segments[part["fd"]]))
        if _labels(job, segments) != labels:
            raise RuntimeError(f"the state of step {job['step']} was overwritten while it was being written to storage")
        return reports
    finally:
        for part in job["parts"]:
            if label_at(segments[part["fd"]], part["slot"], job["step"]) is not None:  # else another job's
                segments[part["fd"]].unpin(part["slot"])
        for segment in segments:
            os.close(segment.fd)


def _labels(job: dict[str, Any], segments: list[Segment]) -> list[SlotLabel]:
    """Those of all parts' slots. One that a saver unpinned before it was killed may hold another step by now."""
    found = [label_at(segments[part["fd"]], part["slot"], job["step"]) for part in job["parts"]]
    labels = [label for label in found if label is not None]
    if len(labels) < len(found):
        raise RuntimeError(f"the state of step {job['step']} is not in its slot any more")
    return labels


def _by_authority(parts: list[dict[str, Any]], metas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = sorted(range(len(parts)), key=lambda i: ("head" not in parts[i]["pieces"], parts[i]["index"] or 0))
    return [metas[i] for i in order]


def _write_part(
    store: Any, job: dict[str, Any], part: dict[str, Any], meta: dict[str, Any], head: dict[str, Any], segment: Segment
) -> dict[str, Any]:
    path = shard_path(job["directory"], part["index"])
    if job.get("again"):
        store.delete([path])  # a saver that was killed may have written it, and told nobody
    table = [TensorEntry.from_json(entry) for entry in meta["tensors"]]
    labels = {**meta, "rank": part["index"], "attempt": job["attempt"], "head": head, "tensors": []}
    data = segment.data(part["slot"])[: segment.data_bytes(part["slot"])]
    return write_shard(store, path, labels, table, data)


if __name__ == "__main__":
    main()
