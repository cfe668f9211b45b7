"""`stop` and `save`: leave an order for a live run's driver, and wait until the journal says that it was followed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.history import Event, add_up
from orchestrator.cli.look import state_of
from orchestrator.cli.output import print_json
from orchestrator.cli.rundir import JournalReader, RunDir, find_run, put_request
from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.storage.layout import check_save_name
from orchestrator.storage.lock import Live, live_driver
from orchestrator.text import human_bytes, human_seconds, parse_duration

_POLL_S = 0.1
_FINISHED = "run_finished"
_COMMITTED = "checkpoint_committed"
_DROPPED = "save_dropped"


@dataclass
class Wait:
    """An order that was left, and the journal since then."""

    run: RunDir
    request: Path
    reader: JournalReader
    timeout_s: float
    waits_for: str

    def until(self, wanted: Callable[[Event], bool]) -> list[Event]:
        """The events up to and with the first wanted one. Raises OrchestratorError at the deadline or a dead driver."""
        seen: list[Event] = []
        deadline = time.monotonic() + self.timeout_s
        while True:
            live = live_driver(self.run.path)
            for event in self.reader.read():
                seen.append(event)
                if wanted(event):
                    return seen
            if live is None:
                self._withdraw()
                raise OrchestratorError(
                    f"run {self.run.address.name} lost its driver while this command waited for {self.waits_for}; "
                    f"`orchestrator status {self.run.address}` shows what was saved"
                )
            if time.monotonic() > deadline:
                raise OrchestratorError(self._overdue(live))
            time.sleep(_POLL_S)

    def _overdue(self, live: Live) -> str:
        driver = f"driver ({live})"
        waited = f"waited {human_seconds(self.timeout_s)} for {self.waits_for}"
        if self._withdraw():
            return f"{waited}, and the {driver} has not even read the request, which is withdrawn; is it stopped?"
        return (
            f"{waited}; the {driver} has the request and goes on; see `orchestrator events {self.run.address} --follow`"
        )

    def _withdraw(self) -> bool:
        """Take an order back that nobody has read, so that it does not meet the next launch. True if it was there."""
        try:
            self.request.unlink()
        except FileNotFoundError:
            return False
        return True


def _timeout(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    try:
        return parse_duration(value)
    except UsageError as error:
        raise UsageError(f"--timeout {value}: {error}") from None


def _not_live(run: RunDir, as_json: bool) -> int:
    history = add_up(JournalReader(run.journal).read())
    state, step = state_of(history, None), history.step
    if as_json:
        print_json({"run": str(run.address), "live": False, "state": state, "step": step})
        return 0
    at = f" at step {step}" if step is not None else ""
    click.echo(f"run {run.address.name} is not live ({state}{at}); nothing to do")
    return 0


def _ask(run: RunDir, kind: str, save: bool, name: str, timeout_s: float, waits_for: str) -> Wait:
    reader = JournalReader(run.journal, at_end=True)
    return Wait(run, put_request(run, kind, save, name), reader, timeout_s, waits_for)


def _stop(run: str, no_save: bool, timeout: float, as_json: bool) -> int:
    found = find_run(run)
    if live_driver(found.path) is None:
        return _not_live(found, as_json)
    waits_for = "the run to stop" if no_save else "the run to save and stop"
    wait = _ask(found, "stop", not no_save, "", timeout, waits_for)
    events = wait.until(lambda event: event.get("event") == _FINISHED)
    saved = [event for event in events if event.get("event") == _COMMITTED]
    _tell(found, events[-1], saved[-1] if saved else None, as_json)
    return 1 if events[-1].get("outcome") == "failed" else 0


def _tell(run: RunDir, finished: Event, saved: Event | None, as_json: bool) -> None:
    if as_json:
        print_json({"run": str(run.address), "finished": finished, "checkpoint": saved})
        return
    why = f": {finished.get('why')}" if finished.get("outcome") == "failed" and finished.get("why") else ""
    click.echo(f"run {run.address.name} {finished.get('outcome', 'ended')} at step {finished.get('step')}{why}")
    click.echo(_saved(saved) if saved else "no checkpoint was written on the way")


def _saved(event: Event) -> str:
    size = f", {human_bytes(event['bytes'])}" if event.get("bytes") is not None else ""
    return f"saved step {event.get('step')} ({event.get('reason')}{size}): {event.get('path')}"


def _save(run: str, name: str, timeout: float, as_json: bool) -> int:
    found = find_run(run)
    if name:
        check_save_name(name)
    if live_driver(found.path) is None:
        return _not_live(found, as_json)
    wait = _ask(found, "save", True, name, timeout, "a checkpoint at the next resume point")
    events = wait.until(lambda event: _answers(event, name))
    last = events[-1]
    if last.get("event") == _DROPPED:
        raise OrchestratorError(f"run {found.address.name}: the checkpoint was not saved: {last.get('why')}")
    saved = next((event for event in reversed(events) if _holds_as_much(event, name)), None)
    if saved is None:
        raise OrchestratorError(
            f"run {found.address.name} {last.get('outcome', 'ended')} at step {last.get('step')} before it saved "
            f"{f'as {name}' if name else 'again'}; `orchestrator status {found.address}` shows its last checkpoint"
        )
    if as_json:
        print_json(saved)
    else:
        click.echo(_saved(saved))
    return 0


def _answers(event: Event, name: str) -> bool:
    """The checkpoint that was asked for, or one that holds as much; the word that it was dropped; the run's end."""
    kind = event.get("event")
    if kind == _DROPPED:
        return event.get("reason") == "requested" and (event.get("name") or "") == name
    if kind == _COMMITTED:
        return _holds_as_much(event, name) and event.get("reason") in ("requested", "stop", "final", "preemption")
    return kind == _FINISHED


def _holds_as_much(event: Event, name: str) -> bool:
    """Without a name any checkpoint since does; RUN@NAME is answered by that name alone."""
    return event.get("event") == _COMMITTED and (not name or event.get("name") == name)


_RUN = click.Argument(["run"], metavar="RUN")
_JSON = click.Option(["--json", "as_json"], is_flag=True, help="For machines.")


def _timeout_option(default: str) -> click.Option:
    return click.Option(
        ["--timeout"], default=default, callback=_timeout, metavar="TIME", help=f"How long to wait.  [{default}]"
    )


def _command(name: str, callback: Callable[..., Any], options: list[click.Parameter], text: str) -> click.Command:
    return click.Command(name, callback=callback, params=[_RUN, *options, _JSON], help=text)


stop_command = _command(
    "stop",
    _stop,
    [click.Option(["--no-save"], is_flag=True, help="Without a checkpoint."), _timeout_option("5m")],
    "Ask a live run to save and stop; waits until it has. A run that is not live is left as it is.",
)
save_command = _command(
    "save",
    _save,
    [click.Option(["--name"], default="", metavar="NAME", help="Keep it, as RUN@NAME."), _timeout_option("5m")],
    "Ask a live run for a checkpoint at its next resume point; waits until it is committed.",
)
