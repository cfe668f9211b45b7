"""The undisturbed run's outcome, kept in a directory so that many seeds share one run."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.chaos.faults import Undisturbed
from orchestrator.errors import UsageError
from orchestrator.spec import RunSpec
from orchestrator.storage.runs import script_identity

OUTCOME_FILE = "undisturbed.json"


@dataclass(frozen=True)
class Reference:
    """An undisturbed run that completed: where it is, and what it said last."""

    directory: Path
    calm: Undisturbed
    last_line: str


def question_of(spec: RunSpec) -> dict[str, Any]:
    """What the user asks to be run; another question in the same directory is a mistake."""
    return {
        "script": script_identity(spec.script, spec.module),
        "args": list(spec.args),
        "workers": spec.workers,
        "seed": spec.seed,
        "strategy": spec.strategy,
        "step_rng": spec.step_rng,
    }


def circumstances_of(spec: RunSpec) -> dict[str, Any]:
    """What may change the answer without the user asking: then the undisturbed run is made again."""
    try:
        program = zlib.crc32(Path(spec.script).read_bytes())
    except OSError:
        program = 0  # a module: its file is not looked for
    threads = os.environ.get("OMP_NUM_THREADS") or str(int(spec.cpus_per_worker))
    return {"program": program, "threads": threads, "torch": metadata.version("torch")}


def load(place: Path, spec: RunSpec) -> Reference | None:
    """What `place` holds for this program, or None. Raises UsageError if it holds another program's outcome."""
    path = place / OUTCOME_FILE
    try:
        kept = json.loads(path.read_text())
        question, circumstances = kept["question"], kept["circumstances"]
        found = Reference(place / kept["run"], Undisturbed(**kept["calm"]), str(kept["last_line"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--reference {place}: {OUTCOME_FILE} cannot be read ({error}); delete the directory or name another."
        ) from error
    wanted = question_of(spec)
    different = [key for key, value in wanted.items() if question.get(key) != value]
    if different:
        was = ", ".join(f"{key} {question.get(key)!r} instead of {wanted[key]!r}" for key in different)
        raise UsageError(f"--reference {place} holds the outcome of another run: {was}. Name another directory.")
    return found if circumstances == circumstances_of(spec) and found.directory.is_dir() else None


def keep(place: Path, spec: RunSpec, reference: Reference) -> None:
    """Write it down. `reference` lies in `place`. A reader finds the whole file or none."""
    kept = {
        "question": question_of(spec),
        "circumstances": circumstances_of(spec),
        "run": reference.directory.name,
        "calm": asdict(reference.calm),
        "last_line": reference.last_line,
    }
    temporary = place / f".{OUTCOME_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(kept, indent=1) + "\n")
    temporary.replace(place / OUTCOME_FILE)
