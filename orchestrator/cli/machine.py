"""What this machine has, read without importing torch or ray."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return max(1, len(affinity(0)) if affinity else os.cpu_count() or 1)


def gpus() -> int:
    """NVIDIA GPUs that this process may use: the driver's list, cut down by CUDA_VISIBLE_DEVICES."""
    try:
        present = sum(1 for _ in Path("/proc/driver/nvidia/gpus").iterdir())
    except OSError:
        present = 0
    if present == 0:
        present = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [device.strip() for device in visible.split(",")]
    if "-1" in named:
        named = named[: named.index("-1")]
    named = [device for device in named if device]
    return min(present, len(named)) if not any(device.startswith("MIG-") for device in named) else len(named)
