"""A launch from its specification to its exit code: storage, cluster, agents, loop, and the end of each."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.agent.lease import machine_key
from orchestrator.agent.node import AgentSettings
from orchestrator.agent.token import Token
from orchestrator.control.machine import Machine
from orchestrator.control.state import MachineConfig
from orchestrator.driver.cluster import AgentHandle, Cluster, check_agents, connect, start_agent
from orchestrator.driver.committer import Committer
from orchestrator.driver.console import ConsolePort
from orchestrator.driver.journal import Journal, attempts_in
from orchestrator.driver.placing import NodeShare, place, settle_auto
from orchestrator.driver.preload import libraries_of
from orchestrator.driver.shell import Shell
from orchestrator.driver.signals import Interrupted, Signals
from orchestrator.errors import ConfigRefusedError, OrchestratorError, StorageError, UsageError
from orchestrator.spec import RunSpec
from orchestrator.storage import layout
from orchestrator.storage.commitlog import CommitLog, LogEntry
from orchestrator.storage.local import LocalStore
from orchestrator.storage.lock import RunLock
from orchestrator.storage.manifest import CheckpointRecord
from orchestrator.storage.prune import sweep
from orchestrator.storage.runs import NameChoice, RunIdentity, choose_name, open_or_create, script_identity
from orchestrator.storage.store import local_path


@dataclass
class Result:
    """How a launch ended, for callers in this process (chaos)."""

    exit_code: int
    directory: Path
    step: int
    lost_s: float
    lost_steps: int
    restarts: int
    step_s: float = 0.0  # time of a step, as rank 0 last measured it


def run_to_result(spec: RunSpec, console: ConsolePort, cluster: Cluster | None = None) -> Result:
    """As `run`, telling more of the end. An open `cluster` is used and left open."""
    if not sys.platform.startswith("linux"):
        raise UsageError(f"`launch` needs Linux; on {sys.platform} plain `python {spec.script}` works.")
    signals = Signals()
    signals.install()
    try:
        with _opened(spec, console) as place_:
            launch = _Launch(replace(spec, seed=place_.seed), console, place_, signals)
            try:
                return launch.run(cluster)
            except Interrupted as interrupted:
                return launch.interrupted(interrupted.exit_code)
    except Interrupted as interrupted:
        console.notice("interrupted before anything was started", "warning")
        return Result(interrupted.exit_code, Path(), 0, 0.0, 0, 0)
    finally:
        signals.restore()


def open_cluster(spec: RunSpec) -> Cluster:
    """The cluster that `spec` names, for one or more launches. Raises UsageError if there is none."""
    return connect(spec.address, spec.workers, spec.cpus_per_worker, spec.gpus_per_worker)


@dataclass
class Place:
    """A run's place in storage, locked and taken over by this driver."""

    name: str
    directory: Path
    choice: NameChoice
    created: bool
    lock: RunLock
    store: LocalStore
    log: CommitLog
    journal: Journal
    first_attempt: int
    seed: int | None
    takeover: LogEntry


@contextlib.contextmanager
def _opened(spec: RunSpec, console: ConsolePort) -> Iterator[Place]:
    choice = choose_name(spec.storage, spec.script, spec.args, module=spec.module, run_name=spec.run_name)
    directory = Path(local_path(spec.storage)).resolve() / choice.name
    store = LocalStore(directory)
    identity = RunIdentity(choice.name, script_identity(spec.script, spec.module), spec.args, spec.seed, time.time())
    stored, created = open_or_create(store, identity)
    seed = _seed(spec, stored)
    with RunLock(directory) as lock:
        log = CommitLog(store)
        takeover = log.take_over(secrets.token_hex(16))
        journal = Journal(directory)
        first = _first_attempt(directory, spec.log_dir)
        try:
            yield Place(choice.name, directory, choice, created, lock, store, log, journal, first, seed, takeover)
        finally:
            journal.close()


def _seed(spec: RunSpec, stored: RunIdentity) -> int | None:
    """The run keeps the seed that it was begun with. Raises ConfigRefusedError if this launch names another."""
    if spec.seed is not None and stored.seed is not None and spec.seed != stored.seed:
        raise ConfigRefusedError(
            f"Run {stored.name} was begun with `--seed {stored.seed}`, and this launch says `--seed {spec.seed}`: what "
            "it trained so far does not go with that. Leave `--seed` out to go on, or start anew with `--run-name`."
        )
    return spec.seed if spec.seed is not None else stored.seed


def _first_attempt(directory: Path, log_dir: str | None) -> int:
    """Above every attempt that earlier drivers used: paths are unique per attempt."""
    used = [0, *attempts_in(directory)]
    for logs in (directory / layout.LOGS, *([Path(log_dir)] if log_dir else [])):
        used += [int(path.name[1:]) for path in logs.glob("a[0-9]*") if path.name[1:].isdigit()]
    for path in (directory / layout.CHECKPOINTS).glob("step-*"):
        parsed = layout.parse_checkpoint_dir(f"{layout.CHECKPOINTS}/{path.name}")
        used += [parsed[1]] if parsed else []
    return max(used) + 1


class _Launch:
    """The parts of one launch that need each other."""

    def __init__(self, spec: RunSpec, console: ConsolePort, place_: Place, signals: Signals) -> None:
        self.spec, self.console, self.place, self.signals = spec, console, place_, signals
        self.started = time.monotonic()
        self.shell: Shell | None = None
        self.log_dir = Path(spec.log_dir).resolve() if spec.log_dir else place_.directory / layout.LOGS

    def run(self, shared: Cluster | None) -> Result:
        self._say_hello()
        try:
            with contextlib.ExitStack() as stack:
                cluster = shared if shared is not None else open_cluster(self.spec)
                if shared is None:
                    stack.callback(cluster.close)
                self.signals.install()
                self._settle_auto(cluster)
                shares = place(self._nodes(cluster), self.spec.workers)
                return self._with_agents(cluster, shares)
        except UsageError:
            self._leave_nothing()
            raise
        except OrchestratorError as error:
            self._record_failure(error)
            raise

    def _record_failure(self, error: OrchestratorError) -> None:
        """It ended before there was a loop: whoever follows the journal hears of it."""
        fields = {"outcome": "failed", "exit_code": error.exit_code, "step": 0, "why": str(error)}
        self.place.journal.record("run_finished", fields)

    def interrupted(self, exit_code: int) -> Result:
        """A signal ended the launch where it stood: nothing was trained yet, or a second Ctrl-C would not wait."""
        view = self.shell.view() if self.shell is not None else None
        step = view.step if view is not None else 0
        if view is None:
            why = "interrupted before training began, so there is nothing to save"
        else:
            why = "a second Ctrl-C ended it without waiting; the next launch goes on from the newest checkpoint"
        self.console.notice(why, "warning")
        attempt = view.attempt if view is not None else 0
        fields = {"attempt": attempt, "outcome": "stopped", "exit_code": exit_code, "step": step, "why": why}
        self.place.journal.record("run_finished", fields)
        return Result(exit_code, self.place.directory, step, 0.0, 0, 0)

    def _say_hello(self) -> None:
        spec = self.spec
        ranks = "as many as the cluster has GPUs" if spec.workers == 0 else str(spec.workers)
        local = spec.address == "local"
        where = "a Ray cluster started for this run" if local else f"the Ray cluster at {spec.address}"
        facts = {
            "run": f"{self.place.name} ({self.place.choice.why})",
            "storage": str(self.place.directory),
            "ranks": ranks,
            "where": where,
            "logs": str(self.log_dir),
            "command": spec.command or None,
        }
        self.console.header({key: value for key, value in facts.items() if value is not None})

    def _settle_auto(self, cluster: Cluster) -> None:
        spec = self.spec
        if not spec.auto:
            return
        workers, each = settle_auto(spec.auto, spec.workers, spec.gpus_per_worker, cluster.gpus())
        self.spec = replace(spec, workers=workers, gpus_per_worker=each)
        if "workers" in spec.auto:
            self.console.notice(f"{workers} workers with {each:g} GPU each, by the GPUs of the cluster")

    def _nodes(self, cluster: Cluster) -> list[NodeShare]:
        return cluster.nodes(self.spec.cpus_per_worker, self.spec.gpus_per_worker)

    def _leave_nothing(self) -> None:
        """Refused before anything started: a run's directory that was made for this launch goes again."""
        if self.place.created:
            import shutil

            shutil.rmtree(self.place.directory, ignore_errors=True)

    def _with_agents(self, cluster: Cluster, shares: list[tuple[NodeShare, int]]) -> Result:
        agents: list[AgentHandle] = []
        numbers = itertools.count()
        try:
            token = None if cluster.embedded else self._token()
            for node, slots in shares:
                agents.append(self._agent(next(numbers), node, slots, token))
            if token is not None:
                check_agents(agents, self.spec.start_timeout_s)

            def replace_agent(lost: AgentHandle) -> AgentHandle:
                agents.append(self._replacement(cluster, lost, next(numbers), token))
                return agents[-1]

            return self._serve(agents, replace_agent)
        finally:
            for agent in agents:
                agent.close()

    def _token(self) -> Token:
        entry = self.place.directory / layout.commit_path(self.place.takeover.sequence)
        script = "" if self.spec.module else os.path.abspath(self.spec.script)
        return Token.of(str(entry), self.place.takeover.nonce, script)

    def _replacement(self, cluster: Cluster, lost: AgentHandle, number: int, token: Token | None) -> AgentHandle:
        """An agent for as many ranks as the lost one had: on its node if that is alive, else where there is room."""
        nodes = self._nodes(cluster)
        able = [node for node in nodes if node.node_id == lost.node.node_id]
        able += sorted((node for node in nodes if node.capacity >= lost.slots), key=lambda node: -node.capacity)
        if not able:
            raise OrchestratorError(f"no node has room for the {lost.slots} ranks of {lost.name}")
        return self._agent(number, able[0], lost.slots, token)

    def _agent(self, number: int, node: NodeShare, slots: int, token: Token | None) -> AgentHandle:
        spec = self.spec
        local = spec.address == "local"
        script = spec.script if spec.module else os.path.abspath(spec.script)
        preload = [*libraries_of(spec.script, spec.module, os.getcwd()), *spec.preload]
        settings = AgentSettings(
            name=f"agent-{number}",
            host="127.0.0.1" if local else node.address,
            slots=slots,
            run_name=self.place.name,
            run_uri=str(self.place.directory),
            log_dir=str(self.log_dir),
            script=script,
            args=spec.args,
            module=spec.module,
            cwd=os.getcwd(),
            options=self._worker_options(),
            env=self._environment(),
            preload=tuple(dict.fromkeys(preload)),
            driver_pid=os.getpid(),
            driver_machine=machine_key(),
            drain_timeout_s=max(0.5, spec.drain_timeout_s - 0.5),
        )
        return start_agent(settings, node, spec.cpus_per_worker, spec.gpus_per_worker, spec.start_timeout_s, token)

    def _worker_options(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "save_every": [[trigger.unit, trigger.every] for trigger in spec.save_every],
            "save_at": list(spec.save_at),
            "seed": spec.seed,
            "strategy": spec.strategy,
            "step_rng": spec.step_rng,
            "max_restarts": spec.max_restarts,
            "exception_save": spec.exception_save,
        }

    def _environment(self) -> tuple[tuple[str, str], ...]:
        """The launching shell's Python path, then `--env`."""
        env = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        if "OMP_NUM_THREADS" in os.environ:
            env["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        else:
            env["OMP_NUM_THREADS"] = str(max(1, int(self.spec.cpus_per_worker)))
        return tuple((env | dict(self.spec.env)).items())

    def _serve(self, agents: list[AgentHandle], replace_agent: Callable[[AgentHandle], AgentHandle]) -> Result:
        spec, place_ = self.spec, self.place
        log = place_.log
        checkpoints = log.checkpoints()
        config = MachineConfig(
            world_size=spec.workers,
            max_restarts=spec.max_restarts,
            drain_timeout_s=spec.drain_timeout_s,
            start_timeout_s=spec.start_timeout_s,
            grace_s=spec.grace_s,
            exception_save=spec.exception_save,
            seed=spec.seed or 0,
            committed_step=checkpoints[-1].step if checkpoints else None,
            first_attempt=place_.first_attempt,
        )
        with contextlib.suppress(OrchestratorError):
            sweep(log)
        committer = Committer(
            log, place_.name, spec.retention, _versions(), lambda event, report: shell.committed(event, report)
        )
        token = secrets.token_hex(4)
        shell = Shell(
            Machine(config), agents, committer, place_.journal, self.console, place_.directory, token, spec.faults,
            replace_agent,
        )  # fmt: skip
        self.shell = shell
        committer.notice = lambda text: self.console.notice(text, "warning")
        place_.journal.record("run_started", {"run": place_.name, "driver_pid": os.getpid(), "spec": _plain(spec)})
        self.signals.serve(shell)
        finish = shell.run()
        self.signals.finished()
        for agent in list(agents):
            agent.close()
        committer.close(60.0)
        shell.record_outcome()
        self._say_goodbye(shell, finish.step)
        view = shell.view()
        board = shell.board
        return Result(
            finish.exit_code, place_.directory, finish.step, board.lost_s, board.lost_steps, view.restarts, board.step_s
        )

    def _say_goodbye(self, shell: Shell, step: int) -> None:
        finish, view = shell.finish, shell.view()
        if finish is None:
            return
        last: list[CheckpointRecord] = []
        with contextlib.suppress(StorageError):  # told with the outcome
            last = shell.locked(CommitLog.checkpoints)
        facts = {
            "outcome": finish.outcome,
            "exit_code": finish.exit_code,
            "step": step,
            "seconds": time.monotonic() - self.started,
            "metrics": shell.board.latest(),
            "restarts": view.restarts,
            "lost_s": shell.board.lost_s,
            "lost_steps": shell.board.lost_steps,
            "checkpoint_step": last[-1].step if last else None,
            "load": _shown(self.place.directory),
            "tracked": shell.board.tracked,
            "why": finish.why,
            "logs": str(self.log_dir),
            "command": self.spec.command or None,
        }
        self.console.summary({key: value for key, value in facts.items() if value is not None})


def _shown(directory: Path) -> str:
    """The run's address as one would type it here."""
    relative = os.path.relpath(directory)
    return str(directory) if relative.startswith("..") else relative


def _plain(spec: RunSpec) -> dict[str, Any]:
    values = asdict(spec)
    values["env"] = [name for name, _ in spec.env]  # values may be secrets
    values["log_dir"] = str(Path(spec.log_dir).resolve()) if spec.log_dir else None
    return values


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "ray", "numpy", "training-orchestrator"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
