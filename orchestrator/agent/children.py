"""Processes that an agent has forked: spares in waiting, the store of an attempt, workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from orchestrator.agent import zygote
from orchestrator.worker import wire
from orchestrator.worker.shm import BeatPage


@dataclass
class Spare:
    """A fork that waits for its specification. `pid` is 0 until the zygote has answered."""

    number: int
    sock: socket.socket
    pid: int = 0


@dataclass
class StoreHost:
    """The process that hosts the TCPStore of one attempt, listening already."""

    spare: Spare
    port: int


@dataclass
class Worker:
    """One rank of the attempt at hand, and what is known of it."""

    attempt: int
    rank: int
    spare: Spare
    beat: BeatPage
    log_path: str
    stepped: bool = False  # in this attempt
    exited: bool = False
    failed: bool = False  # it reported an exception and waits
    left: str = ""  # "finished" or "stopped"
    answer: dict[str, Any] | None = None  # to drain
    closed: bool = False

    @property
    def pid(self) -> int:
        return self.spare.pid


def kill_group(pid: int) -> None:
    """SIGKILL a worker's whole process group, and the process itself should it not lead one yet."""
    if pid <= 0:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def start_zygote(preload: list[str], env: dict[str, str], log: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start it in a session of its own, out of reach of the terminal's Ctrl-C."""
    return _start("orchestrator.agent.zygote", preload, zygote.environment(env), log)


def start_saver(env: dict[str, str], log: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the saver process."""
    return _start("orchestrator.agent.saver", [], env, log)


def _start(
    module: str, arguments: list[str], env: dict[str, str], log: int
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = wire.pair()
    command = [sys.executable, "-m", module, str(theirs.fileno()), *arguments]
    process = subprocess.Popen(
        command, env=env, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    theirs.close()
    return process, ours


def describe_exit(status: int) -> str:
    """CONTRACT's cause of a wait status: "signal:9" or "exit:3"."""
    return describe_code(os.waitstatus_to_exitcode(status))


def describe_code(code: int) -> str:
    """The same for an exit code as `subprocess` has it: negative for a signal."""
    return f"signal:{-code}" if code < 0 else f"exit:{code}"
