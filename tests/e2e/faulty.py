"""A training script that fails as a table says, each fault once, and helpers to read what came of it.

A fault is a dict: `rank`, `step` (`run.step` at which it strikes; 0 for those of the start-up), `where`, `what`, and
`start`, the number of the start at which a start-up fault strikes (1 is the first group); `always` for one that strikes
every time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.harness import Launch, Launcher

SCRIPT = """
import ctypes, json, os, pathlib, signal, sys, time
import torch
import torch.nn.functional as F
import orchestrator

MARKS = pathlib.Path(os.environ["MARKS"])
FAULTS = json.loads((MARKS / "faults.json").read_text())
RANK = int(os.environ["RANK"])
START = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
(MARKS / f"pid-{RANK}").write_text(str(os.getpid()))
step = 0


def strike(what):
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
        time.sleep(60)
    elif what == "all":
        for path in sorted(MARKS.glob("pid-*"), key=lambda path: path.name == f"pid-{RANK}"):
            os.kill(int(path.read_text()), signal.SIGKILL)
        time.sleep(60)
    elif what == "pair":
        os.kill(int((MARKS / f"pid-{1 - RANK}").read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "segv":
        ctypes.string_at(0)
    elif what == "loader":
        children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
    elif what.startswith("sys.exit"):
        sys.exit(int(what.split()[1]))
    elif what.startswith("os._exit"):
        os._exit(int(what.split()[1]))
    elif what == "wait":
        time.sleep(600)
    elif what == "memory":
        raise MemoryError("no room")
    else:
        raise ValueError(what)


def at(where):
    for number, fault in enumerate(FAULTS):
        early = "start" in fault
        now = fault["start"] == START if early else fault["step"] <= step
        if fault["where"] == where and fault["rank"] == RANK and now:
            try:
                os.close(os.open(MARKS / f"fault-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                if not fault.get("always"):
                    continue
            strike(fault["what"])


class Data(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(640, 16, generator=generator)
        self.y = torch.randint(0, 4, (640,), generator=generator)

    def __len__(self):
        return 640

    def __getitem__(self, index):
        at("dataset")
        return self.x[index] + 0.01 * torch.randn(16), self.y[index]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.1),
            torch.nn.Linear(32, 4),
        )

    def forward(self, x):
        at("forward")
        y = self.layers(x)
        y.register_hook(self.passed)
        return y

    def passed(self, gradient):
        at("backward")
        return gradient


class Optimizer(torch.optim.SGD):
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for number, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=group["lr"])
                    if number == 1:
                        at("optimizer")


at("before init")
run = orchestrator.init()
step = run.step
at("after init")
model = run.prepare(Net())
at("after prepare")
optimizer = Optimizer(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
at("after track")
if hasattr(run.saver, "stage"):
    stage = run.saver.stage

    def staging(*arguments):
        done = stage(*arguments)
        at("save")
        return done

    run.saver.stage = staging
steps, loaders = int(os.environ.get("STEPS", 60)), int(os.environ.get("LOADERS", 0))
for x, y in run.batches(Data(), batch_size=24, max_steps=steps, num_workers=loaders):
    step = run.step
    at("body")
    while os.environ.get("HOLD") and step >= int(os.environ["HOLD"]) and not (MARKS / "go").exists():
        time.sleep(0.01)
    if os.environ.get("SWALLOW"):
        try:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        except RuntimeError:
            continue
    else:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    at("after step")
    run.log(loss=loss)
    time.sleep(float(os.environ.get("PAUSE", 0)))
at("after loop")
print("finished at", run.step, flush=True)
"""


def start(
    launcher: Launcher,
    name: str,
    faults: list[dict[str, Any]],
    *options: str,
    workers: int = 2,
    own_group: bool = False,
    **env: str,
) -> Launch:
    """Launch run `name` with these faults. `own_group`: as a shell starts it, in a process group of its own."""
    launcher.script(SCRIPT)
    marks = launcher.cwd / f"marks-{name}"
    marks.mkdir(exist_ok=True)
    (marks / "faults.json").write_text(json.dumps(faults))
    told = [word for key, value in {"MARKS": str(marks), **env}.items() for word in ("--env", f"{key}={value}")]
    words = ["--workers", str(workers), "--run-name", name, *told, *options, "train.py"]
    return launcher.start(*words, run=name, own_group=own_group)


def change(launch: Launch, faults: list[dict[str, Any]]) -> None:
    """Faults of the next launch of the same run."""
    (launch.directory.parents[1] / f"marks-{launch.directory.name}" / "faults.json").write_text(json.dumps(faults))


def fired(launch: Launch, faults: list[dict[str, Any]]) -> None:
    """Assert that every fault struck."""
    marks = launch.directory.parents[1] / f"marks-{launch.directory.name}"
    missing = [fault for number, fault in enumerate(faults) if not (marks / f"fault-{number}").exists()]
    assert not missing, f"never struck: {missing}"


def go(launch: Launch) -> None:
    """Let the ranks on that wait at step HOLD."""
    (launch.directory.parents[1] / f"marks-{launch.directory.name}" / "go").touch()


def roots(launch: Launch) -> list[tuple[int, str]]:
    """(rank, cause) of every root cause, in order."""
    return [(event["rank"], event["cause"]) for event in launch.events("worker_failed") if event["root"]]


def processes_of(directory: Path) -> list[str]:
    """Live processes that belong to the run in `directory`, by what they hold open, run in, or were told."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            links = [str(link.readlink()) for link in [*(entry / "fd").iterdir(), entry / "cwd"]]
        except OSError:
            continue
        if state != "Z" and any(link.startswith(str(directory)) for link in links):
            found.append(f"{entry.name} {command}")
    return found
