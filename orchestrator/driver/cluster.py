"""The Ray cluster, seen from the driver: one that is started for this run, or one that is there; and agents on it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.agent.actor import AgentActor
from orchestrator.agent.node import AgentSettings
from orchestrator.agent.token import Token
from orchestrator.driver.placing import NodeShare, ranks_that_fit
from orchestrator.errors import OrchestratorError, UsageError

POLL_S = 2.0
SLICE_S = 1.0
Post = Callable[[str, dict[str, Any]], None]


class AgentHandle:
    """One agent: commands go out in order, its events come in by a thread of their own."""

    def __init__(self, name: str, node: NodeShare, slots: int, actor: Any, group: Any, local: bool) -> None:
        self.name, self.node, self.slots, self.actor, self.local = name, node, slots, actor, local
        self._group = group
        self._closed = False
        self.joined = False  # it was ready once

    def send(self, commands: list[dict[str, Any]]) -> None:
        """Hand over commands; a dead agent is noticed by its poll."""
        self.actor.commands.remote(commands)

    def follow(self, post: Post) -> None:
        """Deliver this agent's events to `post(name, event)` from now on, its loss included."""
        threading.Thread(target=self._poll, args=(post,), name=f"poll-{self.name}", daemon=True).start()

    def _poll(self, post: Post) -> None:
        after = 0
        while not self._closed:
            try:
                after, events = ray.get(self.actor.poll.remote(after, POLL_S), timeout=POLL_S + 30)
            except (RayError, OSError, ValueError) as error:
                if not self._closed:
                    why = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
                    post(self.name, {"event": "AgentLost", "why": why, "at": time.monotonic()})
                return
            for event in events:
                post(self.name, event)

    def close(self) -> None:
        """End the agent and give its resources back."""
        self._closed = True
        with contextlib.suppress(Exception):
            self.send([{"op": "shutdown"}])
        with contextlib.suppress(Exception):
            ray.kill(self.actor, no_restart=True)
        with contextlib.suppress(Exception):
            remove_placement_group(self._group)


@dataclass
class Cluster:
    """A connection to Ray. `embedded`: it was started for this run and ends with it."""

    embedded: bool

    def nodes(self, cpus_per_worker: float, gpus_per_worker: float) -> list[NodeShare]:
        """Live nodes with room for workers of this size."""
        available = ray._private.state.available_resources_per_node()
        found = []
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            free = available.get(node["NodeID"], {})
            whole = node["Resources"]
            size = (cpus_per_worker, gpus_per_worker)
            capacity = ranks_that_fit(free.get("CPU", 0), free.get("GPU", 0), *size)
            total = ranks_that_fit(whole.get("CPU", 0), whole.get("GPU", 0), *size)
            if total:
                found.append(NodeShare(node["NodeID"], node["NodeManagerAddress"], capacity, total))
        return found

    def gpus(self) -> int:
        """GPUs of the whole cluster."""
        return int(ray.cluster_resources().get("GPU", 0))

    def close(self) -> None:
        """Leave the cluster; an embedded one ends."""
        with contextlib.suppress(Exception):
            ray.shutdown()


def connect(address: str, workers: int, cpus_per_worker: float, gpus_per_worker: float) -> Cluster:
    """Start a cluster for this run (`local`) or join the one at `address`. Raises UsageError if there is none."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    with _signals_left_alone():
        return _connect(address, workers, cpus_per_worker, quiet)


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Ray's own handler would end this process with exit code 15 in the middle of its start."""
    original = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = original


def _connect(address: str, workers: int, cpus_per_worker: float, quiet: dict[str, Any]) -> Cluster:
    if address == "local":
        cores = os.cpu_count() or 1
        cpus = max(cores, int(workers * cpus_per_worker + 0.999) + 1)
        with _on_loopback():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        return Cluster(embedded=True)
    if address.startswith("ray://"):
        raise UsageError(
            f"`--address {address}`: a Ray client cannot host a driver; run this command on a machine of the cluster "
            "with `--address auto`, or submit it as a Ray job."
        )
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"No Ray cluster answers at {address!r} ({str(error).splitlines()[0]}). Start one with `ray start --head`, "
            "or leave `--address` out to start one for this run."
        ) from error
    return Cluster(embedded=False)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster for this driver alone.

    Ray turns 127.0.0.1 into an address that others can reach and listens on all interfaces; here nobody should. Its
    processes get a session of their own: Ctrl-C and a closed terminal are the driver's business.
    """
    services = ray._private.services
    resolve, popen = services.resolve_ip_for_localhost, services.ConsolePopen
    services.resolve_ip_for_localhost = lambda host: host
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.resolve_ip_for_localhost, services.ConsolePopen = resolve, popen


def start_agent(
    settings: AgentSettings,
    node: NodeShare,
    cpus_per_worker: float,
    gpus_per_worker: float,
    timeout_s: float,
    token: Token | None = None,
) -> AgentHandle:
    """Create placement group and actor on `node`. Raises OrchestratorError naming the node if they do not come."""
    bundle = {"CPU": settings.slots * cpus_per_worker}
    if gpus_per_worker:
        bundle["GPU"] = settings.slots * gpus_per_worker
    group = placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=[{"ray.io/node-id": node.node_id}])
    try:
        given = _wait(group, timeout_s)
    except BaseException:  # a signal
        remove_placement_group(group)
        raise
    if not given:
        remove_placement_group(group)
        raise OrchestratorError(
            f"Node {node.address} did not give {bundle} within {timeout_s:g} s: other jobs hold it. Wait for them, or "
            "lower `--workers`; `ray status` shows who uses what."
        )
    values = asdict(settings)
    values.pop("gpu_ids")
    actor = AgentActor.options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        max_restarts=0,
    ).remote(values, token)
    local = node.address in ("127.0.0.1", ray.util.get_node_ip_address())
    return AgentHandle(settings.name, node, settings.slots, actor, group, local)


def check_agents(agents: list[AgentHandle], timeout_s: float) -> None:
    """Every agent's node sees storage and script as this one does. Raises UsageError naming the nodes that do not.

    An agent that cannot answer is left to its poll, which tells why. Raises OrchestratorError naming those that have
    not answered within `timeout_s`.
    """
    asked = {agent.actor.check_token.remote().future(): agent.node.address for agent in agents}
    done, missing = wait(asked, timeout_s)
    refused = [
        f"node {asked[answer]} {answer.result()}"
        for answer in sorted(done, key=lambda answer: asked[answer])
        if answer.exception() is None and answer.result()
    ]
    if refused:
        raise UsageError("Nothing was started: " + "; ".join(refused) + ".")
    if missing:
        nodes = ", ".join(sorted(asked[answer] for answer in missing))
        raise OrchestratorError(
            f"The agents on {nodes} have not said within {timeout_s:g} s whether they reach the run's storage; look "
            "whether its mount hangs there, and at `ray status`."
        )


def _wait(group: Any, timeout_s: float) -> bool:
    """Ray's wait lets no signal through, so it comes in slices."""
    deadline = time.monotonic() + timeout_s
    while not group.wait(max(0.0, min(SLICE_S, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
    return True
