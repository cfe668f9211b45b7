"""Outside the launcher: options from the environment; with ORCHESTRATOR_STORAGE set, checkpoints from this very process."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.worker.restore import Source


def options(environ: Mapping[str, str]) -> dict[str, Any]:
    """The options of a run without a launcher, by the launcher's own variables."""
    from orchestrator.storage.layout import check_run_name, name_from_script
    from orchestrator.text import parse_steps, parse_triggers

    storage = environ.get("ORCHESTRATOR_STORAGE", "")
    every = environ.get("ORCHESTRATOR_SAVE_EVERY", "")
    at = environ.get("ORCHESTRATOR_SAVE_AT", "")
    seed = environ.get("ORCHESTRATOR_SEED", "")
    return {
        "storage": storage,
        "run_name": check_run_name(environ.get("ORCHESTRATOR_RUN_NAME") or name_from_script(sys.argv[0] or "run")),
        "seed": int(seed) if seed else None,
        "strategy": environ.get("ORCHESTRATOR_STRATEGY", "auto"),
        "save_every": [[trigger.unit, trigger.every] for trigger in parse_triggers(every or "auto")],
        "save_at": list(parse_steps(at)) if at else [],
        "step_rng": environ.get("ORCHESTRATOR_STEP_RNG", "1") not in ("0", "false"),
    }


def open_source(settings: Mapping[str, Any]) -> Source | None:
    """The newest sound checkpoint of the run, None if it has none or nothing is stored."""
    if not settings["storage"]:
        return None
    from orchestrator.storage.commitlog import CommitLog
    from orchestrator.storage.store import open_store
    from orchestrator.worker.stored import StoredSource

    uri = f"{settings['storage'].rstrip('/')}/{settings['run_name']}"
    rejected: list[str] = []
    found = CommitLog(open_store(uri)).latest_sound("full", lambda path, why, step: rejected.append(f"{path}: {why}"))
    for line in rejected:
        print(f"orchestrator: checkpoint not used: {line}", file=sys.stderr, flush=True)
    if found is None:
        return None
    return StoredSource({"uri": uri, "directory": found[0].directory})


def now() -> float:
    """Seconds since 1970, for manifests."""
    return time.time()
