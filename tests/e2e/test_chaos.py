"""`orchestrator chaos` from end to end: what it runs, what it compares, what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.harness import Launcher

SCRIPT = """
import time
import torch
import torch.nn.functional as F
import orchestrator

run = orchestrator.init()
net = torch.nn.Sequential(
    torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 4)
)
model = run.prepare(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run.track(model=model, optimizer=optimizer)
generator = torch.Generator().manual_seed(1)
data = torch.utils.data.TensorDataset(
    torch.randn(640, 16, generator=generator), torch.randint(0, 4, (640,), generator=generator)
)
for x, y in run.batches(data, batch_size=32, epochs=3):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.state["seen"] = run.state.get("seen", 0) + 1
if run.is_main:
    print("seen", run.state["seen"])
"""

OWN_CLOCK = """
import time
import torch
import orchestrator

run = orchestrator.init()
model = run.prepare(torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)
for _ in run.steps(20):
    loss = model(torch.ones(1, 2)).sum() * (time.time() % 1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

EQUAL = "final state bitwise equal to the undisturbed run: yes ("


def faults_of(directory: Path, name: str = "fault_fired") -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == name]


def test_faults_at_the_worst_moments_change_nothing_and_one_reference_serves_many(launcher: Launcher) -> None:
    launcher.script(SCRIPT)
    options = ("--workers", "2", "--run-name", "struck", "--reference", "reference")
    specs = [
        "kill:rank=1,moment=start,at=0",
        "exit:rank=0,moment=start,at=0.2",
        "kill:rank=0,step=10,moment=backward",
        "raise:rank=0,step=20,moment=optimizer",  # with half of the parameters spoiled, in a process that lives on
        "kill:rank=0,step=30,moment=save,at=0.1",
        "kill:rank=0,step=40,moment=boundary",
        "kill:rank=1,step=40,moment=boundary,signal=2",  # Ray blocks this one, and we must not pass that on
        "exit:rank=1,step=60,moment=save,at=0.1",  # in the save of the final state
    ]
    words = [word for spec in specs for word in ("--fault", spec)]
    first = launcher.start(*options, *words, "train.py", run="struck", command="chaos")
    assert first.wait() == 0, first.output
    assert [entry["id"] for entry in faults_of(first.directory)][-1] == "fault-8"
    assert {entry["id"] for entry in faults_of(first.directory)} == {f"fault-{number}" for number in range(1, 9)}
    assert len(faults_of(first.directory)) == 8, "each strikes once"
    last = faults_of(first.directory, "recovered")[-1]
    assert (last["cause"], last["lost_steps"], last["resume_step"]) == ("exit:3", 0, 60)
    assert EQUAL in first.output
    assert "chaos: the script's last words: seen 60" in first.output
    assert "8 faults struck" in first.output

    second = launcher.start(*options, "--fault", "random:seed=1,count=3", "train.py", run="struck-2", command="chaos")
    assert second.wait() == 0, second.output
    assert "chaos: the undisturbed run is " in second.output
    assert len(faults_of(second.directory)) == 3
    assert [path.name for path in (launcher.cwd / "reference").iterdir() if path.is_dir()] == ["undisturbed"]

    other = launcher.start(*options, "--fault", "kill:rank=0,step=5", "train.py", "--more", command="chaos")
    assert other.wait() == 2
    assert "holds the outcome of another run: args [] instead of ['--more']" in other.output


def test_a_program_that_is_not_deterministic_by_itself_is_told_so(launcher: Launcher) -> None:
    launcher.script(OWN_CLOCK)
    chaos = launcher.start("--workers", "1", "--fault", "kill:rank=0,step=10", "train.py", command="chaos")
    assert chaos.wait() == 1, chaos.output
    assert "final state bitwise equal to the undisturbed run: NO (" in chaos.output
    assert "the program is not deterministic by itself" in chaos.output
    assert "model.weight" in chaos.output
