"""What a forked worker is told: environment, program, place in the group, and where its state comes from. Pure."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from orchestrator.agent.held import Part

if TYPE_CHECKING:
    from orchestrator.agent.node import AgentSettings

# What Ray and our own parents put into the environment, and a plain run of the script would not have.
_NOT_FOR_WORKERS = ("PYTHONUNBUFFERED", "PYTORCH_NVML_BASED_CUDA_CHECK", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def worker_spec(
    settings: AgentSettings,
    base_env: dict[str, str],
    start: dict[str, Any],
    local_rank: int,
    rank: int,
    log_path: str,
    parts: list[Part],
    segments: list[int],
) -> dict[str, Any]:
    """The specification message of one rank; its descriptors are the log, the beat page, then `segments`."""
    return {
        "op": "run",
        "env": _environment(settings, base_env, start, local_rank, rank, log_path),
        "cwd": settings.cwd,
        "script": settings.script,
        "args": list(settings.args),
        "module": settings.module,
        "started": time.monotonic(),
        "context": {
            "attempt": start["attempt"],
            "rank": rank,
            "local_rank": local_rank,
            "world_size": start["world_size"],
            "local_world_size": len(start["ranks"]),
            "run_name": settings.run_name,
            "log_path": log_path,
            "store_host": start["store"]["host"],
            "store_port": start["store"]["port"],
            "options": settings.options,
            "resume": _resume(start["resume"], parts, segments),
            "faults": start["faults"],
        },
    }


def _resume(resume: dict[str, Any] | None, parts: list[Part], segments: list[int]) -> dict[str, Any] | None:
    if resume is None or resume["kind"] != "segments":
        return resume
    described = [
        {"fd": segments.index(part.segment.fd), "slot": part.slot, "pieces": list(part.pieces), "rank": part.rank}
        for part in parts
    ]
    return {"kind": "segments", "step": resume["step"], "parts": described}


def _environment(
    settings: AgentSettings,
    base_env: dict[str, str],
    start: dict[str, Any],
    local_rank: int,
    rank: int,
    log_path: str,
) -> dict[str, str]:
    """torchrun's variables over the agent's environment, cleaned of what Ray put there."""
    env = {
        name: value for name, value in base_env.items() if not name.startswith("RAY_") and name not in _NOT_FOR_WORKERS
    }
    env |= dict(settings.env)
    world_size, local_world_size = start["world_size"], len(start["ranks"])
    restarts = start["restarts"]
    env.setdefault("OMP_NUM_THREADS", "1")
    env |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "GROUP_RANK": str(start["node_rank"]),
        "GROUP_WORLD_SIZE": str(start["nodes"]),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world_size),
        "ROLE_NAME": "default",
        "MASTER_ADDR": start["store"]["host"],
        "MASTER_PORT": str(start["store"]["port"]),
        "TORCHELASTIC_RUN_ID": settings.run_name,
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(settings.options.get("max_restarts", 0)),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": os.path.join(os.path.dirname(log_path), f"error-{rank}.json"),
        "CUDA_VISIBLE_DEVICES": ",".join(settings.gpu_ids),  # none: the ranks were given no GPU and must take none
    }
    return env
