"""The door of the driver: sets Ray's environment up, then imports Ray and runs the session."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.driver.console import ConsolePort
from orchestrator.driver.signals import Interrupted, Signals
from orchestrator.spec import RunSpec

if TYPE_CHECKING:
    from orchestrator.driver.cluster import Cluster
    from orchestrator.driver.session import Result


def run(spec: RunSpec, console: ConsolePort) -> int:
    """Launch and wait for the end. Returns the exit code. Raises UsageError before anything is started."""
    early = Signals()
    early.install()  # Ray takes a second to import, and a signal meanwhile has its own exit code already
    try:
        prepare_ray(spec.address)
        from orchestrator.driver.session import run_to_result as serve
    except Interrupted as interrupted:
        console.notice("interrupted before anything was started", "warning")
        return interrupted.exit_code
    finally:
        early.restore()
    return serve(spec, console).exit_code


def run_to_result(spec: RunSpec, console: ConsolePort, cluster: Cluster | None = None) -> Result:
    """As `run`, telling more of the end. An open `cluster` (see `open_cluster`) is used and left open."""
    if cluster is None:
        prepare_ray(spec.address)
    from orchestrator.driver.session import run_to_result as serve

    return serve(spec, console, cluster)


def open_cluster(spec: RunSpec) -> Cluster:
    """One cluster for several launches of this process; the caller closes it. Raises UsageError if there is none."""
    prepare_ray(spec.address)
    from orchestrator.driver.session import open_cluster as serve

    return serve(spec)


def prepare_ray(address: str) -> None:
    """Ray reads these when it is imported. An open Ray port runs anybody's code: a cluster of our own gets a token that
    nobody else knows, and joining another one uses the token that lies in the user's home, as Ray's own tools do.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "local":
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        # Ray would end the agent, and with it every rank; the kernel takes the worker that eats the memory.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    elif "RAY_AUTH_MODE" not in os.environ and (
        "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file()
    ):
        os.environ["RAY_AUTH_MODE"] = "token"
