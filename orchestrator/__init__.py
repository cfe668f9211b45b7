"""Train a PyTorch model on every worker of a Ray cluster; a lost process, node or driver costs nothing one can
notice.
"""

from __future__ import annotations

from importlib import metadata as _metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.storage.checkpoints import load
    from orchestrator.worker.run import Run, init

__all__ = ["Run", "init", "load"]

_HOMES = {
    "init": "orchestrator.worker.run",
    "Run": "orchestrator.worker.run",
    "load": "orchestrator.storage.checkpoints",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import orchestrator` costs neither torch nor ray."""
    if name == "__version__":
        return _metadata.version("training-orchestrator")
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
