"""`orchestrator chaos`: run undisturbed, run with faults, compare the final states bit by bit."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.chaos import reference
from orchestrator.chaos.compare import Comparison, compare
from orchestrator.chaos.faults import Fault, RandomFaults, Undisturbed, check_ranks, parse, schedule
from orchestrator.chaos.reference import Reference
from orchestrator.driver.console import ConsolePort
from orchestrator.driver.launch import open_cluster, run_to_result
from orchestrator.errors import EXIT_COMPLETED, EXIT_FAILED, OrchestratorError
from orchestrator.spec import RunSpec
from orchestrator.storage.layout import JOURNAL, check_run_name, name_from_script
from orchestrator.storage.store import local_path
from orchestrator.text import human_bytes, human_count, human_seconds

if TYPE_CHECKING:
    from orchestrator.driver.cluster import Cluster
    from orchestrator.driver.session import Result

CALM = "-calm"
_SHOWN = 5
_SLOWER = 10  # as slow as this may a run with faults be before it counts as hung: others may keep the cores busy


def main(spec: RunSpec, fault_specs: list[str], console: ConsolePort) -> int:
    """Exit code 0 only if the run with faults completed, every fault struck and the final states are the same bits.

    Raises UsageError for faults that cannot be; those that only the undisturbed run can tell come after it.
    """
    parsed = parse(fault_specs)
    if spec.workers:
        check_ranks(parsed, spec.workers)
    cluster = open_cluster(spec)
    try:
        return _Chaos(spec, parsed, console, cluster).run()
    finally:
        cluster.close()


@dataclass
class Cost:
    """What the journal says of one fault. `recovery_s` is None where nothing had to recover."""

    fired: bool = False
    recovery_s: float | None = None
    lost_steps: int = 0


@dataclass
class _Listener:
    """A console that remembers the last thing the script said."""

    console: Any
    last_line: str = ""

    def rank0(self, line: str) -> None:
        self.last_line = line.strip() or self.last_line
        self.console.rank0(line)

    def header(self, facts: Mapping[str, Any]) -> None:
        if facts.get("run") is not None:
            known = {key: value for key, value in facts.items() if key != "command"}
            again = {"continue": "a run of chaos is never continued", "anew": "the same command: it makes new runs"}
            facts = {**known, **again}
        self.console.header(facts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


@dataclass
class _Chaos:
    spec: RunSpec
    parsed: list[Fault | RandomFaults]
    console: ConsolePort
    cluster: Cluster
    _last_line: str = field(default="", init=False)
    _hung: bool = field(default=False, init=False)

    def run(self) -> int:
        storage = Path(local_path(self.spec.storage))
        name = fresh_name(storage, self.spec)
        found = self._undisturbed(storage, name)
        if isinstance(found, int):
            return found
        faults = schedule(self.parsed, found.calm)
        self.console.notice(f"chaos: now `{name}`, the same with {human_count(len(faults), 'fault')}")
        with self._deadline(limit_s(found.calm, len(faults))):
            result = self._launch(disturbed_spec(self.spec, name, faults, found.calm))
        costs = read_costs(result.directory, faults) if result.directory != Path() else {}
        self._report(faults, costs)
        if result.exit_code != EXIT_COMPLETED:
            self.console.notice(f"chaos: the run with faults did not complete (exit {result.exit_code})", "error")
            return EXIT_FAILED if self._hung else result.exit_code
        return self._verdict(found, result, faults, costs)

    # -- runs -----------------------------------------------------------------------------------------------------

    def _launch(self, spec: RunSpec) -> Result:
        listener = _Listener(self.console)
        result = run_to_result(spec, listener, self.cluster)
        self._last_line = listener.last_line
        return result

    @contextmanager
    def _deadline(self, limit: float) -> Iterator[None]:
        """A run that never ends is what chaos looks for: it is stopped as a platform would, and counts as failed."""

        def stop() -> None:
            self._hung = True
            text = f"chaos: no end within {human_seconds(limit)}, so something hangs; stopping it"
            self.console.notice(text, "error")
            os.kill(os.getpid(), signal.SIGTERM)

        timer = threading.Timer(limit, stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _undisturbed(self, storage: Path, name: str) -> Reference | int:
        """The reference, or the exit code of an undisturbed run that did not complete."""
        place = Path(self.spec.reference).resolve() if self.spec.reference else None
        if place is not None:
            kept = reference.load(place, self.spec)
            if kept is not None:
                self.console.notice(f"chaos: the undisturbed run is {kept.directory} ({kept.calm.steps} steps)")
                return kept
            storage, name = place, fresh_name(place, replace(self.spec, run_name="undisturbed"))
        else:
            name += CALM
        self.console.notice(f"chaos: first `{name}`, undisturbed")
        result = self._launch(calm_spec(self.spec, storage, name))
        if result.exit_code != EXIT_COMPLETED:
            self.console.notice(f"chaos: the undisturbed run did not complete (exit {result.exit_code})", "error")
            return result.exit_code
        workers = self.spec.workers or _workers_of(result.directory)
        made = Reference(result.directory, Undisturbed(workers, result.step, result.step_s), self._last_line)
        if place is not None:
            reference.keep(place, self.spec, made)
        return made

    # -- the verdict ------------------------------------------------------------------------------------------------

    def _report(self, faults: tuple[Fault, ...], costs: Mapping[str, Cost]) -> None:
        for fault in faults:
            self.console.notice(f"chaos: {fault_line(fault, costs.get(fault.id, Cost()))}")

    def _verdict(
        self, found: Reference, result: Result, faults: tuple[Fault, ...], costs: Mapping[str, Cost]
    ) -> int:
        missed = [fault for fault in faults if not costs[fault.id].fired]
        if missed:
            names = ", ".join(f"{fault.kind} of rank {fault.rank} {fault.where}" for fault in missed)
            self.console.notice(f"chaos: {human_count(len(missed), 'fault')} never struck: {names}", "error")
        comparison = compare(found.directory, result.directory)
        fields = {
            "faults": len(faults),
            "fired": len(faults) - len(missed),
            "recovery_s": round(result.lost_s, 3),
            "lost_steps": result.lost_steps,
            "equal": comparison.equal,
            "tensors": comparison.tensors,
            "bytes": comparison.bytes,
            "differences": list(comparison.differences[:_SHOWN]),
        }
        self.console.event("chaos_verdict", fields)
        if self._last_line:
            self.console.notice(f"chaos: the script's last words: {self._last_line}")
            if self._last_line != found.last_line:
                self.console.notice(f"chaos: undisturbed they were: {found.last_line}", "warning")
        cost = f"{human_seconds(result.lost_s)} and {human_count(result.lost_steps, 'step')}"
        struck = human_count(len(faults) - len(missed), "fault")
        self.console.notice(f"chaos: {struck} struck, {human_count(result.restarts, 'restart')}, which cost {cost}")
        self.console.notice(f"chaos: {equality_line(comparison)}", "good" if comparison.equal else "error")
        if not comparison.equal:
            self._ask_whether_deterministic(found)
        return EXIT_COMPLETED if comparison.equal and not missed else EXIT_FAILED

    def _ask_whether_deterministic(self, found: Reference) -> None:
        storage = found.directory.parent
        name = fresh_name(storage, replace(self.spec, run_name=f"{found.directory.name}-again"))
        self.console.notice(f"chaos: is the program deterministic by itself? Running `{name}`, undisturbed once more")
        result = self._launch(calm_spec(self.spec, storage, name))
        if result.exit_code != EXIT_COMPLETED:
            raise OrchestratorError(f"The second undisturbed run did not complete (exit {result.exit_code}).")
        again = compare(found.directory, result.directory)
        if again.equal:
            self.console.notice("chaos: two undisturbed runs are equal, so the difference is the recovery's", "error")
        else:
            text = f"chaos: two undisturbed runs differ too ({_names(again)}): the program is not deterministic by "
            self.console.notice(f"{text}itself, so nothing can be said about the recovery", "error")


def fresh_name(storage: Path, spec: RunSpec) -> str:
    """A name under which neither the run with faults nor the undisturbed one exists: chaos never continues a run."""
    stem = check_run_name(spec.run_name) if spec.run_name else name_from_script(spec.script, spec.module)
    number = 1
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        if not (storage / name).exists() and not (storage / (name + CALM)).exists():
            return name
        number += 1


def calm_spec(spec: RunSpec, storage: Path, name: str) -> RunSpec:
    """The launch without faults."""
    return replace(spec, storage=str(storage), run_name=name, faults=())


def disturbed_spec(spec: RunSpec, name: str, faults: tuple[Fault, ...], calm: Undisturbed) -> RunSpec:
    """The launch with faults. One that is to strike in a save has a save to strike in; the last step has its own."""
    saves = {fault.step for fault in faults if fault.moment == "save" and 0 < fault.step < calm.steps}
    encoded = tuple(fault.to_json() for fault in faults)
    return replace(spec, run_name=name, faults=encoded, save_at=tuple(sorted({*spec.save_at, *saves})))


def limit_s(calm: Undisturbed, faults: int) -> float:
    """Seconds that a run with this many faults may take."""
    return 60.0 + _SLOWER * (calm.steps * calm.step_s + 2.0 * faults)


def read_costs(directory: Path, faults: tuple[Fault, ...]) -> dict[str, Cost]:
    """By fault: whether it struck, and what the recovery that followed it cost. Faults of one outage share it."""
    costs = {fault.id: Cost() for fault in faults}
    waiting: list[str] = []
    for entry in _journal(directory):
        if entry["event"] == "fault_fired":
            costs[entry["id"]].fired = True
            waiting.append(entry["id"])
        elif entry["event"] == "recovered":
            for name in waiting:
                costs[name].recovery_s, costs[name].lost_steps = entry["recovery_s"], entry["lost_steps"]
            waiting = []
    return costs


def _journal(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / JOURNAL).read_text().splitlines() if line.strip()]


def _workers_of(directory: Path) -> int:
    groups = [entry for entry in _journal(directory) if entry["event"] == "group_started"]
    return int(groups[-1]["world_size"])


def fault_line(fault: Fault, cost: Cost) -> str:
    """One fault and its cost, for people."""
    what = f"{fault.kind} of rank {fault.rank} {fault.where}"
    if not cost.fired:
        return f"{what}: did not strike"
    if cost.recovery_s is None:
        return f"{what}: nothing had to recover"
    return f"{what}: recovered in {human_seconds(cost.recovery_s)}, {human_count(cost.lost_steps, 'step')} lost"


def equality_line(comparison: Comparison) -> str:
    """The statement that all this is about."""
    checked = f"{human_count(comparison.tensors, 'tensor')}, {human_bytes(comparison.bytes)} compared"
    if comparison.equal:
        return f"final state bitwise equal to the undisturbed run: yes ({checked})"
    return f"final state bitwise equal to the undisturbed run: NO ({checked}; differing: {_names(comparison)})"


def _names(comparison: Comparison) -> str:
    shown = ", ".join(comparison.differences[:_SHOWN])
    more = len(comparison.differences) - _SHOWN
    return shown + (f", … ({more} more)" if more > 0 else "")
