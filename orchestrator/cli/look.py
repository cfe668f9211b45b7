"""`status`, `events`, `logs`: what a run is and was doing, read from its directory; nothing is changed."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.history import Event, History, add_up, when
from orchestrator.cli.output import print_json
from orchestrator.cli.rundir import JournalReader, RunDir, TextTail, find_run
from orchestrator.errors import UsageError
from orchestrator.storage import layout
from orchestrator.storage.lock import Live, live_driver
from orchestrator.text import human_bytes, human_count, human_seconds
from orchestrator.ui.lines import Progress, progress

_POLL_S = 0.2
_RUN = click.Argument(["run"], metavar="RUN")


def state_of(history: History, live: Live | None) -> str:
    """One word: starting, running, recovering while live; else completed, failed, stopped, or interrupted."""
    if live is not None:
        return history.phase if history.finished is None and history.phase != "new" else "starting"
    if history.finished is not None:
        return history.phase
    return "interrupted" if history.launches else "new"


def read_progress(run: RunDir) -> Progress | None:
    """What a live driver last wrote down about its progress, if it does so."""
    try:
        raw = json.loads((run.path / layout.PROGRESS_FILE).read_bytes())
        known = {name: raw[name] for name in ("total", "samples_per_s", "metrics", "eta_s") if name in raw}
        return Progress(int(raw["step"]), **known)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def status_facts(
    run: RunDir, history: History, live: Live | None, now: float, reached: Progress | None = None
) -> dict[str, Any]:
    """What `status --json` prints. `reached`: a live driver's own word on its progress."""
    checkpoint = history.checkpoint
    step = reached.step if reached else history.step
    return {
        "run": str(run.address),
        "path": str(run.path.absolute()),
        "state": state_of(history, live),
        "live": live is not None,
        "driver": None if live is None else {"host": live.host, "pid": live.pid},
        "script": history.script or None,
        "step": step,
        "progress": None if reached is None else progress(reached),
        "world_size": history.world_size,
        "attempt": history.attempt,
        "launches": history.launches,
        "restarts": history.restarts,
        "recovery_s": round(history.recovery_s, 6),
        "lost_steps": history.lost_steps,
        "started_at": history.started_at,
        "last_event_at": history.last_event_at,
        "since_s": None if history.started_at is None else max(0.0, now - history.started_at),
        "checkpoint": None
        if checkpoint is None
        else {key: checkpoint.get(key) for key in ("step", "epoch", "reason", "bytes", "path", "ts")},
        "failures": [
            {key: event.get(key) for key in ("ts", "attempt", "rank", "cause", "step", "error")}
            for event in history.failures
        ],
        "outcome": None if history.finished is None else history.finished.get("outcome"),
        "exit_code": None if history.finished is None else history.finished.get("exit_code"),
        "why": None if history.finished is None else history.finished.get("why"),
    }


def status_lines(facts: dict[str, Any], now: float) -> list[str]:
    """The same for people."""
    rows = [("run", facts["path"]), ("state", _state_text(facts, now))]
    if facts["script"]:
        rows.append(("script", facts["script"]))
    if facts["progress"] or facts["step"] is not None:
        rows.append(("progress", facts["progress"] or f"step {facts['step']}"))
    if facts["world_size"]:
        rows.append(("ranks", f"{facts['world_size']}, attempt {facts['attempt']}"))
    rows.append(("restarts", _restarts_text(facts)))
    rows.append(("checkpoint", _checkpoint_text(facts["checkpoint"], now)))
    rows += [("failure", _failure_text(event)) for event in facts["failures"]]
    if facts["state"] in ("interrupted", "stopped", "failed"):
        rows.append(("continue", "launch it again with the same command"))
    return [f"{label:<11} {value}" for label, value in rows]


def _state_text(facts: dict[str, Any], now: float) -> str:
    state = facts["state"]
    if facts["live"]:
        since = f" for {human_seconds(facts['since_s'])}" if facts["since_s"] is not None else ""
        driver = facts["driver"]
        return f"{state}{since} (driver: process {driver['pid']} on {driver['host']})"
    last = f", last sign of life {_ago(facts['last_event_at'], now)}" if facts["last_event_at"] is not None else ""
    if state == "interrupted":
        return f"interrupted: its driver is gone without having finished{last}"
    why = f": {facts['why']}" if facts["why"] else ""
    code = f" (exit {facts['exit_code']})" if facts["exit_code"] is not None else ""
    return f"{state}{code}{why}{last}"


def _restarts_text(facts: dict[str, Any]) -> str:
    if not facts["restarts"]:
        return "none"
    lost = human_count(facts["lost_steps"], "step")
    return f"{facts['restarts']}, which cost {human_seconds(facts['recovery_s'])} and {lost}"


def _checkpoint_text(checkpoint: dict[str, Any] | None, now: float) -> str:
    if checkpoint is None:
        return "none yet"
    size = f", {human_bytes(checkpoint['bytes'])}" if checkpoint["bytes"] is not None else ""
    return f"step {checkpoint['step']} ({checkpoint['reason']}{size}), {_ago(when(checkpoint), now)}"


def _failure_text(event: dict[str, Any]) -> str:
    error = event.get("error")
    told = f": {_error_text(error)}" if error else ""
    where = f"rank {event.get('rank')} at step {event.get('step')}, attempt {event.get('attempt')}"
    return f"{where}: {event.get('cause')}{told}"


def _error_text(error: object) -> str:
    if isinstance(error, dict):
        return f"{error.get('type')}: {error.get('message')}".splitlines()[0]
    return (str(error).splitlines() or [""])[0]


def _ago(moment: float | None, now: float) -> str:
    return "at an unknown time" if moment is None else f"{human_seconds(max(0.0, now - moment))} ago"


def _status(run: str, as_json: bool) -> int:
    found = find_run(run)
    history = add_up(JournalReader(found.journal).read())
    now, live = time.time(), live_driver(found.path)
    facts = status_facts(found, history, live, now, read_progress(found) if live else None)
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(status_lines(facts, now)))
    return 0


def event_line(event: Event) -> str:
    """An event as one line for people: time, attempt, name, fields."""
    moment = when(event)
    clock = datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] if moment is not None else "-"
    fields = [f"{key}={_field(value)}" for key, value in event.items() if key not in ("ts", "event", "attempt", "spec")]
    attempt = event.get("attempt")
    mark = f"a{attempt}" if attempt is not None else "-"
    return f"{clock}  {mark:<4} {event.get('event')}  {' '.join(fields)}".rstrip()


def _field(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return shlex.quote(value) if value else "''"
    return json.dumps(value, separators=(",", ":"))


def _events(run: str, follow: bool, as_json: bool) -> int:
    found = find_run(run)
    reader = JournalReader(found.journal)
    while True:
        # Asked before reading: a driver that ends in between has written its last event by then.
        live = follow and live_driver(found.path) is not None
        for event in reader.read():
            if as_json:
                print_json(event)
            else:
                click.echo(event_line(event))
        if not live:
            return 0
        time.sleep(_POLL_S)


def _attempts(logs: Path) -> dict[int, Path]:
    found = {}
    for entry in logs.iterdir() if logs.is_dir() else ():
        match = re.fullmatch(r"a(\d+)", entry.name)
        if match and entry.is_dir():
            found[int(match.group(1))] = entry
    return found


def find_log(logs: Path, run: RunDir, rank: int, attempt: int | None) -> Path:
    """The log of a rank in an attempt (None: the newest that has one). Raises UsageError naming what there is."""
    attempts = _attempts(logs)
    name = Path(layout.log_path(0, rank)).name
    wanted = [attempt] if attempt is not None else sorted(attempts, reverse=True)
    for number in wanted:
        if number in attempts and (attempts[number] / name).is_file():
            return attempts[number] / name
    if not attempts:
        raise UsageError(f"run {run.address.name} has no logs yet in {logs.absolute()}; was it ever started?")
    if attempt is not None and attempt not in attempts:
        raise UsageError(
            f"run {run.address.name} has no logs of attempt {attempt}; it has attempts {_span(list(attempts))}"
        )
    ranks = _ranks(attempts[attempt if attempt is not None else max(attempts)])
    raise UsageError(f"run {run.address.name} has no log of rank {rank}; it has ranks {_span(ranks)}")


def _ranks(folder: Path) -> list[int]:
    matches = [re.fullmatch(r"rank-(\d+)\.log", entry.name) for entry in folder.iterdir()]
    return [int(match.group(1)) for match in matches if match]


def _span(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def logs_place(run: RunDir, history: History) -> Path:
    """Where the ranks' logs of a run lie: in its directory, or where its last launch put them."""
    return Path(history.log_dir) if history.log_dir else run.path / layout.LOGS


def _logs(run: str, rank: int, attempt: int | None, follow: bool) -> int:
    found = find_run(run)
    logs = logs_place(found, add_up(JournalReader(found.journal).read()))
    path = find_log(logs, found, rank, attempt)
    tail = TextTail(path)
    while True:
        live = follow and live_driver(found.path) is not None
        for piece in tail.read():
            sys.stdout.buffer.write(piece)
        sys.stdout.flush()
        if not live:
            return 0
        if attempt is None and (newer := find_log(logs, found, rank, None)) != path:
            sys.stdout.buffer.writelines(tail.read())
            path, tail = newer, TextTail(newer)
            click.echo(f"== {os.path.relpath(path, logs)}", err=True)
            continue
        time.sleep(_POLL_S)


_JSON = click.Option(["--json", "as_json"], is_flag=True, help="For machines.")

status_command = click.Command("status", callback=_status, params=[_RUN, _JSON], help="Where a run stands.")
events_command = click.Command(
    "events",
    callback=_events,
    params=[_RUN, click.Option(["--follow", "-f"], is_flag=True, help="Go on while the run is live."), _JSON],
    help="What happened to a run: its journal.",
)
logs_command = click.Command(
    "logs",
    callback=_logs,
    params=[
        _RUN,
        click.Option(["--rank"], type=click.IntRange(0), default=0, metavar="N", help="Which rank.  [0]"),
        click.Option(["--attempt"], type=click.IntRange(0), metavar="N", help="Which attempt; by default the newest."),
        click.Option(["--follow", "-f"], is_flag=True, help="Go on while the run is live, restarts included."),
    ],
    help="What a rank printed.",
)
