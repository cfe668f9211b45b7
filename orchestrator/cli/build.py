"""From merged settings to a RunSpec: torchrun's spellings, what `auto` means here, what to say about it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.cli.config import Layer, parse
from orchestrator.errors import UsageError
from orchestrator.spec import Retention, RunSpec
from orchestrator.text import mask_assignments, parse_workers


@dataclass(frozen=True)
class Note:
    """Something to tell before the run starts. `level`: "info" or "warning"."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class Machine:
    """What this machine offers to an embedded cluster."""

    cores: int
    gpus: int


@dataclass(frozen=True)
class Program:
    """What is to run: a script's path, or a module's name, with its own arguments."""

    script: str
    args: tuple[str, ...] = ()
    module: bool = False


@dataclass(frozen=True)
class Resources:
    """Ranks and what each of them takes; `auto` names what only the cluster can tell."""

    workers: int
    gpus_per_worker: float
    auto: tuple[str, ...]
    notes: tuple[Note, ...]


def build_spec(
    layer: Layer,
    program: Program,
    machine: Machine,
    command: tuple[str, ...] = (),
    faults: tuple[str, ...] = (),
    reference: str | None = None,
) -> tuple[RunSpec, tuple[Note, ...]]:
    """The launch and what to tell about how it was understood. Raises UsageError."""
    values = parse(layer)
    resources = resolve_resources(_asked_workers(layer, values, machine), values, machine)
    loads = values["worker-load"]
    if loads is not None and resources.workers and loads != resources.workers:
        raise UsageError(f"--worker-load names {loads} workers and the run has {resources.workers}; leave it out")
    spec = RunSpec(
        script=program.script,
        args=program.args,
        module=program.module,
        workers=resources.workers,
        address=values["address"],
        storage=values["storage"],
        run_name=values["run-name"],
        strategy=values["strategy"],
        save_every=values["save-every"],
        save_at=values["save-at"] or (),
        retention=_retention(values),
        exception_save=not values["no-exception-save"],
        max_restarts=values["max-restarts"],
        hang_timeout=values["hang-timeout"],
        start_timeout_s=values["start-timeout"],
        drain_timeout_s=values["drain-timeout"],
        grace_s=values["grace"],
        cpus_per_worker=values["cpus-per-worker"],
        gpus_per_worker=resources.gpus_per_worker,
        preload=values["preload"] or (),
        env=tuple(dict(values["env"]).items()),
        seed=values["seed"],
        step_rng=not values["no-step-rng"],
        log_dir=values["log-dir"],
        quiet=values["quiet"],
        json=values["json"],
        faults=faults,
        reference=reference,
        auto=resources.auto,
        command=_shown(command, program),
    )
    return spec, resources.notes


def _shown(command: tuple[str, ...], program: Program) -> tuple[str, ...]:
    """The command as it is journalled and shown: what `--env` sets may be a secret. The script's words are its own."""
    begin = len(command) - len(program.args)
    return (*mask_assignments(command[:begin], "--env"), *command[begin:])


def _retention(values: dict[str, Any]) -> Retention:
    return Retention(values["keep-last"], values["keep-every"], values["keep-best"], values["keep-bytes"])


def _asked_workers(layer: Layer, values: dict[str, Any], machine: Machine) -> int | None:
    """`--workers`, or torchrun's product of nodes and ranks per node; None is auto. Raises UsageError."""
    nproc, nnodes = values.get("nproc-per-node"), values.get("nnodes")
    if nproc is None and nnodes is None:
        asked: int | None = values["workers"]
        return asked
    product = _nnodes(nnodes or "1") * _nproc(nproc or "1", machine)
    if not layer["workers"].is_default and values["workers"] != product and layer["workers"].origin == "command line":
        raise UsageError(
            f"--workers {layer['workers'].text} contradicts --nnodes times --nproc-per-node, which is {product}; "
            "give one or the other"
        )
    return product


def _nnodes(asked: str) -> int:
    try:
        bounds = parse_workers(asked)
    except UsageError as error:
        raise UsageError(f"--nnodes {asked}: {str(error).replace('ranks', 'nodes')}") from None
    if bounds is None:
        raise UsageError("--nnodes auto: write how many nodes, such as 2, or use --workers auto")
    if bounds[0] != bounds[1]:
        raise UsageError(
            f"--nnodes {asked}: a number of nodes that changes while the run goes on is not available yet; "
            f"give one number, such as {bounds[1]}"
        )
    return bounds[0]


def _nproc(asked: str, machine: Machine) -> int:
    if asked == "gpu":
        if machine.gpus == 0:
            raise UsageError("--nproc-per-node gpu: this machine has no GPU; write a number, such as 2, or cpu")
        return machine.gpus
    if asked in ("auto", "cpu"):
        return machine.gpus if asked == "auto" and machine.gpus else machine.cores
    try:
        bounds = parse_workers(asked)
    except UsageError:
        bounds = None
    if bounds is None or bounds[0] != bounds[1]:
        raise UsageError(f"--nproc-per-node {asked}: write a number from 1 on, such as 2, or auto, gpu or cpu")
    return bounds[0]


def resolve_resources(workers: int | None, values: dict[str, Any], machine: Machine) -> Resources:
    """Settle `auto` for an embedded cluster; leave it to the driver on an attached one."""
    gpus: float | None = values["gpus-per-worker"]
    if values["address"] != "local":
        auto = tuple(name for name, value in (("workers", workers), ("gpus_per_worker", gpus)) if value is None)
        return Resources(workers or 0, gpus or 0.0, auto, ())
    notes: list[Note] = []
    if workers is None:
        per_rank = max(1.0, gpus) if gpus is not None else 1.0
        fit = int(machine.gpus / per_rank) if gpus != 0 else 0
        workers = max(1, fit)
        why = "one per GPU" if fit else "as this machine has no GPU to count by"
        notes.append(Note(f"--workers auto: {workers}, {why}"))
    if gpus is None:
        gpus = 1.0 if 0 < workers <= machine.gpus else 0.0
        if workers > machine.gpus > 0:
            notes.append(
                Note(
                    f"{workers} workers outnumber this machine's {machine.gpus} GPUs, so they train on CPU; "
                    f"use --workers {machine.gpus}, or --gpus-per-worker with a fraction to share",
                    "warning",
                )
            )
    elif workers * gpus > machine.gpus:
        raise UsageError(
            f"{workers} workers with {gpus:g} GPUs each need more than the {machine.gpus} GPUs of this machine; "
            "lower --workers or --gpus-per-worker"
        )
    if workers > machine.cores:
        notes.append(Note(f"{workers} workers share {machine.cores} CPU cores, so steps take longer", "warning"))
    return Resources(workers, gpus, (), tuple(notes))
