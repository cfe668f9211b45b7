"""What the console says, as text: first contact, progress, events, failures, the end. Pure: facts in, lines out.

Every function takes what is known and leaves out what is not, so the driver may tell things as it learns them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.control.events import ErrorInfo
from orchestrator.text import human_bytes, human_count, human_seconds

Facts = Mapping[str, Any]
_HOW_TO_STOP = "Ctrl-C saves and exits 76; a second one stops at once"
_HEADER_LABELS = ("run", "storage", "path", "ranks", "where", "batch", "seed", "resume", "logs")
_QUIET_REASONS = ("periodic",)


@dataclass(frozen=True)
class Progress:
    """How far a run is. `total` in steps; rates in samples per second; `lost_s` is what restarts cost so far."""

    step: int
    total: int | None = None
    samples_per_s: float | None = None
    metrics: Mapping[str, float] | None = None
    eta_s: float | None = None
    last_checkpoint_step: int | None = None
    restarts: int = 0
    lost_s: float = 0.0


@dataclass(frozen=True)
class Line:
    """One line of ours. `level`: "info", "good", "warning" or "error"."""

    text: str
    level: str = "info"


def header(facts: Facts) -> list[Line]:
    """First contact. Known keys come first and in order; whatever else is handed over follows as it is.

    Facts without `run` are a supplement (the batch, once it is known): how to stop and continue is not said again.

    Keys: run, storage, path, ranks, where, batch, seed, resume, logs; command (words or text); stop; anew.
    """
    rows = [(label, facts[label]) for label in _HEADER_LABELS if facts.get(label) is not None]
    known = {*_HEADER_LABELS, "command", "stop", "continue", "anew"}
    rows += [(str(key), value) for key, value in facts.items() if key not in known and value is not None]
    if facts.get("run") is not None:
        rows.append(("stop", facts.get("stop", _HOW_TO_STOP)))
        rows.append(("continue", facts.get("continue") or _same_command(facts.get("command"))))
        rows.append(("start anew", facts.get("anew", "--run-name with a new name")))
    width = max((len(label) for label, _ in rows), default=0)
    return [Line(f"{label:<{width}}  {_value(value)}") for label, value in rows]


def _same_command(command: object) -> str:
    if not command:
        return "the same command again"
    words = command if isinstance(command, str) else shlex.join(str(word) for word in command)  # type: ignore[attr-defined]
    return f"the same command again: {words}"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(inner) for inner in value)
    return str(value)


def progress(state: Progress) -> str:
    """The status line, parts that are not known left out."""
    parts = [_steps(state)]
    if state.samples_per_s is not None and math.isfinite(state.samples_per_s):
        parts.append(f"{_rate(state.samples_per_s)} samples/s")
    parts += [f"{name} {_metric(value)}" for name, value in (state.metrics or {}).items()]
    if state.eta_s is not None and math.isfinite(state.eta_s):
        parts.append(f"{human_seconds(state.eta_s) if state.eta_s < 9.5 else human_seconds(round(state.eta_s))} left")
    if state.last_checkpoint_step is not None:
        parts.append(f"saved at {state.last_checkpoint_step}")
    if state.restarts:
        parts.append(f"{human_count(state.restarts, 'restart')} ({human_seconds(state.lost_s)})")
    return ", ".join(parts)


def _steps(state: Progress) -> str:
    if not state.total:
        return f"step {state.step}"
    return f"step {state.step}/{state.total} ({min(100, 100 * state.step // state.total)} %)"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _metric(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def event(name: str, fields: Facts) -> Line | None:
    """One line for a journal event, or None where the status line, `failure` or `summary` says it already."""
    teller = _EVENTS.get(name)
    return teller(fields) if teller else None


def _group_started(fields: Facts) -> Line:
    attempt, sources = fields.get("attempt", 1), fields.get("resume_sources") or []
    size = human_count(fields.get("world_size", len(fields.get("workers", []))), "worker")
    if not sources:
        return Line(f"{size} started" + (f" (attempt {attempt})" if attempt != 1 else ""))
    return Line(
        f"{size} go on at step {fields.get('resume_step')}, state from {', '.join(sources)} (attempt {attempt})"
    )


def _recovered(fields: Facts) -> Line:
    lost = fields.get("lost_steps", 0)
    phases = ", ".join(f"{name} {float(value):.3f}" for name, value in (fields.get("phases") or {}).items())
    text = f"recovered in {human_seconds(float(fields.get('recovery_s', 0.0)))}, {human_count(lost, 'step')} lost"
    return Line(text + f", at step {fields.get('resume_step')}" + (f" ({phases})" if phases else ""), "good")


def _committed(fields: Facts) -> Line | None:
    if fields.get("reason") in _QUIET_REASONS:
        return None
    size = f", {human_bytes(fields['bytes'])}" if fields.get("bytes") is not None else ""
    took = f", {human_seconds(float(fields['seconds']))}" if fields.get("seconds") is not None else ""
    name = f" `{fields['name']}`" if fields.get("name") else ""
    return Line(
        f"checkpoint{name} of step {fields.get('step')} saved ({fields.get('reason', 'requested')}{size}{took})"
    )


def _rejected(fields: Facts) -> Line:
    where = f" at {fields['path']}" if fields.get("path") else ""
    return Line(
        f"checkpoint of step {fields.get('step')}{where} is not used: {fields.get('why', 'damaged')}", "warning"
    )


_EVENTS = {
    "group_started": _group_started,
    "recovered": _recovered,
    "checkpoint_committed": _committed,
    "checkpoint_rejected": _rejected,
}


def failure(text: str, error: ErrorInfo | None) -> list[Line]:
    """The root cause, its traceback, where the whole log is."""
    lines = [Line(text, "error")]
    if error is None:
        return lines
    told = f"{error.type}: {error.message}" if error.message else error.type
    if error.type and error.type not in text:
        lines.append(Line(told.splitlines()[0], "error"))
    lines += [Line("  " + line, "error") for line in error.traceback.rstrip().splitlines()]
    if error.frame and not error.traceback:
        lines.append(Line(f"  at {error.frame}", "error"))
    if error.log_path:
        lines.append(Line(f"full log: {error.log_path}", "error"))
    return lines


def summary(facts: Facts) -> list[Line]:
    """The end: what was done, what failures cost, how to load or continue.

    Keys, all optional: outcome, exit_code, step, steps, seconds, metrics, restarts, lost_s, lost_steps,
    checkpoint_step, load (RUN), tracked (names), why, logs, command.
    """
    outcome = str(facts.get("outcome", "completed"))
    lines = [Line(_outcome(outcome, facts), {"completed": "good", "failed": "error"}.get(outcome, "info"))]
    if facts.get("metrics"):
        lines.append(Line("last metrics: " + ", ".join(f"{k} {_metric(v)}" for k, v in facts["metrics"].items())))
    lines.append(Line(_cost(facts)))
    if facts.get("load") and facts.get("checkpoint_step") is not None:
        first = next(iter(facts.get("tracked") or ["model"]))
        lines.append(
            Line(f"load step {facts['checkpoint_step']}: orchestrator.load({_quoted(facts['load'])})[{_quoted(first)}]")
        )
    if outcome != "completed":
        lines.append(Line(f"to continue: {_same_command(facts.get('command'))}"))
    if facts.get("logs"):
        lines.append(Line(f"logs: {facts['logs']}"))
    return lines


def _quoted(value: object) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _outcome(outcome: str, facts: Facts) -> str:
    at = f" at step {facts['step']}" if facts.get("step") is not None else ""
    why = f": {facts['why']}" if facts.get("why") else ""
    done = f"; {human_count(facts['steps'], 'step')} in this launch" if facts.get("steps") is not None else ""
    took = f" in {human_seconds(float(facts['seconds']))}" if facts.get("seconds") is not None else ""
    return f"{outcome}{at}{why}{done}{took}"


def _cost(facts: Facts) -> str:
    restarts = facts.get("restarts", 0)
    if not restarts:
        return "no worker was lost"
    lost = f"{human_seconds(float(facts.get('lost_s', 0.0)))} and {human_count(facts.get('lost_steps', 0), 'step')}"
    return f"{human_count(restarts, 'restart')} cost {lost}"
