"""One Ray cluster for all end-to-end tests of a session; each test has a directory and a launcher of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Launcher, clean_env

_CLUSTER = """
import json, sys
from orchestrator.driver.launch import prepare_ray
prepare_ray("auto")
import ray
context = ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False)
print(json.dumps(context.address_info["gcs_address"]), flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of 16 nominal CPUs on loopback; it ends with the session."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=clean_env(),
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        line = holder.stdout.readline()
        assert line, "the cluster did not start"
        import json

        yield json.loads(line)
    finally:
        if holder.stdin is not None:
            holder.stdin.close()
        try:
            holder.wait(30)
        except subprocess.TimeoutExpired:
            holder.kill()


@pytest.fixture
def launcher(tmp_path: Path, cluster: str) -> Iterator[Launcher]:
    """Launches on the shared cluster."""
    made = Launcher(tmp_path, cluster)
    yield made
    made.close()


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Launcher]:
    """Launches that each start a cluster of their own, as on a laptop."""
    made = Launcher(tmp_path, "local")
    yield made
    made.close()
