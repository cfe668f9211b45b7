"""The Ray actor around an agent: one per node, holding the node's share of the cluster."""

from __future__ import annotations

import os
from typing import Any

import ray

from orchestrator.agent.node import AgentSettings, NodeAgent
from orchestrator.agent.token import Token
from orchestrator.worker.shm import Segment


@ray.remote(concurrency_groups={"poll": 1, "bulk": 2})
class AgentActor:
    """Commands run one after the other; `poll` waits in a thread of its own."""

    def __init__(self, settings: dict[str, Any], token: Token | None = None) -> None:
        """`token`: what this node must see as the driver does, or no agent is built here and nothing is written."""
        _lower_oom_score()
        self._refusal = token.difference() if token is not None else ""
        if not self._refusal:
            gpu_ids = tuple(str(gpu) for gpu in ray.get_gpu_ids())
            self._agent = NodeAgent(AgentSettings(**settings, gpu_ids=gpu_ids), _own_environment())
            self._agent.start()

    def commands(self, commands: list[dict[str, Any]]) -> None:
        """Carry out commands in order; effects arrive as events."""
        for command in commands if not self._refusal else ():
            self._agent.command(command)

    @ray.method(concurrency_group="poll")
    def poll(self, after: int, timeout_s: float) -> tuple[int, list[dict[str, Any]]]:
        """Events from number `after` on, waiting up to `timeout_s`. Raises ValueError if this node was refused."""
        if self._refusal:
            raise ValueError(self._refusal)
        return self._agent.poll(after, timeout_s)

    @ray.method(concurrency_group="bulk")
    def fetch(self, holder: str, step: int, pieces: list[str]) -> list[dict[str, Any]]:
        """The slots behind an offer, as bytes, for an agent on another node. Raises KeyError if they are gone."""
        parts = self._agent.holdings.parts(holder, step, pieces)
        slots = [
            {
                "meta": part.segment.meta(part.slot),
                "data": bytes(part.segment.data(part.slot)[: part.segment.data_bytes(part.slot)]),
                "pieces": list(part.pieces),
                "rank": part.rank,
            }
            for part in parts
        ]
        if [part.slot for part in self._agent.holdings.parts(holder, step, pieces)] != [part.slot for part in parts]:
            raise KeyError(f"{holder} was written to while step {step} was read from it")
        return slots

    @ray.method(concurrency_group="bulk")
    def receive(self, holder: str, step: int, slots: list[dict[str, Any]]) -> None:
        """Keep what another node's agent supplied, under that holder's name."""
        from orchestrator.agent.held import Part

        attempt = int(holder.split("/")[1][1:])
        parts = []
        for item in slots:
            segment = Segment.create("fetched", 1, len(item["meta"]), len(item["data"]))
            segment.begin(0)
            segment.data(0)[: len(item["data"])] = item["data"]
            segment.complete(0, attempt, step, item["meta"], len(item["data"]))
            parts.append(Part(segment, 0, tuple(item["pieces"]), item["rank"]))
        self._agent.holdings.keep_fetched(holder, parts)

    def check_token(self) -> str:
        """What this node sees otherwise than the driver does, as a sentence's end; empty if nothing."""
        return self._refusal


def _lower_oom_score() -> None:
    """Agents inherit Ray's 1000: the kernel would take the agent before the worker that eats the memory."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("300")
    except OSError:
        return  # not privileged: the inherited score stays


def _own_environment() -> dict[str, str]:
    """This process's environment, without what Ray put in for itself."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env.pop("PYTHONUNBUFFERED", None)
    return env
