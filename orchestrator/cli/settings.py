"""The options of a launch as one table: names, defaults, how their text is read, and what comes later.

The command line, the environment and YAML all speak through this table, so a value means the same wherever it is set.
Pure: no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator import text
from orchestrator.errors import UsageError
from orchestrator.storage.layout import check_run_name


@dataclass(frozen=True)
class Setting:
    """One option. `default` is its text (None: unset); `parse` turns text into the value or raises UsageError."""

    name: str
    parse: Callable[[str], Any]
    default: str | None
    metavar: str
    help: str
    flag: bool = False
    multiple: bool = False
    in_config: bool = True

    @property
    def option(self) -> str:
        return f"--{self.name}"

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "ORCHESTRATOR_" + self.name.replace("-", "_").upper()


def _anything(value: str) -> str:
    if "\0" in value:
        raise UsageError("a NUL character cannot be part of it")
    return value


def _something(value: str) -> str:
    if not value.strip():
        raise UsageError("the value is empty")
    return _anything(value)


def _storage(value: str) -> str:
    if value.startswith("s3://"):
        raise UsageError(
            "storage on S3 is not available yet; give a path that every node reaches, such as /mnt/shared/runs"
        )
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", value)
    if scheme and scheme.group(1) != "file":
        raise UsageError(f"storage cannot be `{scheme.group(1)}://`; give a path or file:///path")
    return _something(value)


def _address(value: str) -> str:
    if value.startswith("ray://"):
        raise UsageError(
            "a ray:// client cannot host a run; start the launch on a machine of the cluster with its HOST:PORT or auto"
        )
    if value not in ("auto", "local") and not re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):\d{1,5}", value):
        raise UsageError("write auto, local or HOST:PORT of the cluster's head")
    return value


def _workers(value: str) -> int | None:
    bounds = text.parse_workers(value)
    if bounds is None:
        return None
    if bounds[0] != bounds[1]:
        raise UsageError(
            "a number of workers that changes while the run goes on is not available yet; "
            f"give one number, such as {bounds[1]}"
        )
    return bounds[0]


def _strategy(value: str) -> str:
    if value in ("fsdp", "hsdp"):
        raise UsageError(f"{value} is not available yet; use ddp (a full replica on every rank) or none")
    if value not in ("auto", "ddp", "none"):
        raise UsageError(f"no such strategy{text.did_you_mean(value, ('auto', 'ddp', 'none'))}; use auto, ddp or none")
    return value


def _hang_timeout(value: str) -> str:
    if value in ("auto", "off"):
        return value
    text.parse_duration(value)
    raise UsageError(
        "detection of hangs by a deadline of your own is not available yet; leave it at auto, or off, "
        "and pass a timeout to your collectives"
    )


def _dashboard(value: str) -> str:
    if value != "off":
        raise UsageError("the dashboard is not available yet; use off, and `orchestrator status RUN` to look")
    return value


def _worker_load(value: str) -> int:
    """How many workers it names."""
    loads = [text.parse_amount(part) for part in value.split(",")]
    if len(set(loads)) > 1:
        raise UsageError("unequal shares are not available yet; leave it out, and every worker gets an equal share")
    return len(loads)


def _cores(value: str) -> float:
    cores = text.parse_amount(value)
    if cores == 0:
        raise UsageError("a worker takes a part of a core at least; write a number above 0, such as 1 or 0.5")
    return cores


def _later(what: str, instead: str) -> Callable[[str], Any]:
    def refuse(value: str) -> Any:
        raise UsageError(f"{what} is not available yet; {instead}")

    return refuse


def _later_flag(what: str, instead: str) -> Callable[[str], Any]:
    def refuse(value: str) -> bool:
        if text.parse_flag(value):
            raise UsageError(f"{what} is not available yet; {instead}")
        return False

    return refuse


def _at_least(least: int) -> Callable[[str], int]:
    return lambda value: text.parse_count(value, least)


def _seed(value: str) -> int:
    seed = text.parse_count(value)
    if seed >= 2**63:
        raise UsageError("a seed is below 2**63")
    return seed


_SETTINGS = (
    Setting("workers", _workers, "auto", "N|auto", "Ranks in all; auto is one per GPU, else 1."),
    Setting("address", _address, "local", "auto|local|HOST:PORT", "The Ray cluster; local starts one for this run."),
    Setting(
        "working-dir",
        _later("shipping code to the nodes", "put the code under the same path on every node"),
        None,
        "DIR",
        "Code to ship to the nodes (not available yet).",
    ),
    Setting("storage", _storage, "./runs", "URI", "Where runs live."),
    Setting("run-name", check_run_name, None, "NAME", "The run is URI/NAME; given, it is continued."),
    Setting(
        "from",
        _later("starting from another run's checkpoint", "load it in the script with orchestrator.load(RUN)"),
        None,
        "RUN[@STEP]",
        "Start from another run's checkpoint (not available yet).",
    ),
    Setting(
        "allow-partial",
        _later_flag("starting from a part of another run's checkpoint", "load it in the script with orchestrator.load"),
        "false",
        "",
        "With --from: accept missing or unexpected names (not available yet).",
        flag=True,
    ),
    Setting(
        "accept",
        _later("accepting a changed configuration", "give the changed program a run of its own with --run-name"),
        None,
        "FIELD,…",
        "Continue although this part of the configuration changed (not available yet).",
    ),
    Setting("strategy", _strategy, "auto", "auto|ddp|none", "How run.prepare wraps models."),
    Setting(
        "save-every",
        text.parse_triggers,
        "auto",
        "SPEC[,SPEC…]",
        "100steps, 30s, 5m, 1epoch, auto; any of them triggers.",
    ),
    Setting("save-at", text.parse_steps, None, "STEPS", "Save at these steps, such as 1,1000."),
    Setting("keep-last", _at_least(1), "3", "N", "Keep the newest N checkpoints."),
    Setting(
        "keep-every", text.parse_keep_every, None, "SPEC", "Keep one checkpoint every so many steps, epochs, seconds."
    ),
    Setting("keep-best", text.parse_keep_best, None, "K:METRIC[:min|max]", "Keep the K best by a logged metric."),
    Setting("keep-bytes", text.parse_size, None, "SIZE", "Keep the newest checkpoints up to this size in all."),
    Setting("no-exception-save", text.parse_flag, "false", "", "Do not save survivors' state at a failure.", flag=True),
    Setting("max-restarts", _at_least(0), "10", "N", "Failures without progress in between before giving up."),
    Setting("hang-timeout", _hang_timeout, "auto", "auto|off", "When a silent rank counts as hung (does nothing yet)."),
    Setting("start-timeout", text.parse_duration, "600", "SECONDS", "Until every rank must have started."),
    Setting("drain-timeout", text.parse_duration, "10", "SECONDS", "For survivors to hand over their state."),
    Setting("grace", text.parse_duration, "25", "SECONDS", "For saving after a request to stop."),
    Setting("cpus-per-worker", _cores, "1", "N", "CPU cores a worker."),
    Setting("gpus-per-worker", text.parse_amount, None, "N", "GPUs a worker; by default 1 where there are enough."),
    Setting("worker-load", _worker_load, None, "W,W,…", "Shares of the batch (equal ones only so far)."),
    Setting("preload", text.parse_names, None, "MODULE,…", "Modules to import once, before workers are forked."),
    Setting(
        "env", text.parse_assignment, None, "K=V", "A worker's environment variable; may be repeated.", multiple=True
    ),
    Setting("seed", _seed, None, "N", "The seed of the run."),
    Setting("no-step-rng", text.parse_flag, "false", "", "Do not reseed the generators at every step.", flag=True),
    Setting("dashboard", _dashboard, "off", "off", "A page to watch the run (not available yet)."),
    Setting("log-dir", _something, None, "DIR", "Where the ranks' logs go; by default into the run's directory."),
    Setting("quiet", text.parse_flag, "false", "", "Show only rank 0's output and failures.", flag=True),
    Setting("json", text.parse_flag, "false", "", "One JSON object a line on stdout.", flag=True),
    Setting(
        "detach",
        _later_flag("running in the background", "use nohup, tmux or your scheduler"),
        "false",
        "",
        "Leave the run to the cluster (not available yet).",
        flag=True,
    ),
    Setting("nproc-per-node", _anything, None, "N|auto|gpu|cpu", "torchrun's: ranks per node.", in_config=False),
    Setting(
        "nnodes", _anything, None, "N", "torchrun's: nodes; times --nproc-per-node gives the workers.", in_config=False
    ),
)

SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _SETTINGS}

# torchrun's options that have nothing to say here; True: a flag, False: takes a value.
IGNORED_TORCHRUN: dict[str, bool] = {
    "standalone": True,
    "rdzv-backend": False,
    "rdzv-endpoint": False,
    "rdzv-id": False,
    "rdzv-conf": False,
    "master-addr": False,
    "master-port": False,
    "node-rank": False,
    "monitor-interval": False,
    "local-addr": False,
    "start-method": False,
    "role": False,
}

# Set for workers by the launch, or read by the Python API alone: no option of a launch, and no mistake either.
KNOWN_VARIABLES_PREFIX = "ORCHESTRATOR_INTERNAL_"
