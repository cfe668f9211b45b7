"""What a launch is asked to do, checked and complete. Pure data; every field has CONTRACT.md's meaning and default."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SaveTrigger:
    """One part of `--save-every`. `unit`: "steps", "seconds", "epochs" or "auto" (then `every` is 0)."""

    unit: str
    every: float


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the union of what any rule keeps. `final` and named ones always stay."""

    keep_last: int = 3
    keep_every: SaveTrigger | None = None
    keep_best: tuple[int, str, str] | None = None  # (count, metric, "min" | "max")
    keep_bytes: int | None = None


@dataclass(frozen=True)
class RunSpec:
    """One launch. Built by the command line; crosses to the driver and, in part, to the workers."""

    script: str  # path as given, or the module's name if `module`
    args: tuple[str, ...] = ()
    module: bool = False
    workers: int = 1  # 0 only where `auto` names it
    address: str = "local"
    working_dir: str | None = None
    storage: str = "./runs"
    run_name: str | None = None
    strategy: str = "auto"
    save_every: tuple[SaveTrigger, ...] = (SaveTrigger("auto", 0),)
    save_at: tuple[int, ...] = ()
    retention: Retention = field(default_factory=Retention)
    exception_save: bool = True
    max_restarts: int = 10
    hang_timeout_s: float | None = None  # None: off or auto (auto comes with hang detection)
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 10.0
    grace_s: float = 25.0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    preload: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    seed: int | None = None
    step_rng: bool = True
    log_dir: str | None = None
    quiet: bool = False
    json: bool = False
    faults: tuple[str, ...] = ()  # `--fault` specs, for chaos
    from_run: str | None = None  # `--from RUN[@…]`: the checkpoint that a new run starts from
    allow_partial: bool = False
    hang_timeout: str = "auto"  # as asked for: "auto", "off" or seconds
    auto: tuple[str, ...] = ()  # fields that the driver settles once it sees the cluster: "workers", "gpus_per_worker"
    reference: str | None = None  # chaos: a directory that keeps the undisturbed run's outcome between calls
    command: tuple[str, ...] = ()  # the command line that started this launch and continues the run
