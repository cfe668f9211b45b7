"""The lock of a run: one driver at a time, and looking at it takes nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.storage.lock import RunLock, live_driver


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    assert live_driver(tmp_path) is None
    with RunLock(tmp_path):
        live = live_driver(tmp_path)
        assert live is not None and live.pid == os.getpid()
        with pytest.raises(UsageError, match=f"is live: process {os.getpid()} on "):
            RunLock(tmp_path).acquire()
    assert live_driver(tmp_path) is None
    with RunLock(tmp_path):
        pass


def test_lookers_never_refuse_a_launch(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        pass
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            live_driver(tmp_path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(200):
            lock = RunLock(tmp_path)
            lock.acquire()
            lock.release()
    finally:
        over.set()
        for looker in lookers:
            looker.join()
