"""`run.save` by rank 0: however many are asked for and however slow storage is, each is committed."""

from __future__ import annotations

import json

from tests.e2e.harness import Launcher

SCRIPT = """
import torch
import orchestrator

run = orchestrator.init()
model = run.prepare(torch.nn.Linear(64, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
average = {"w": torch.zeros(64, 64)}


class Average:
    def state_dict(self):
        return dict(average)

    def load_state_dict(self, state):
        average.update(state)


run.track(model=model, optimizer=optimizer, average=Average())
other = torch.optim.SGD([p for p in model.parameters()], lr=0.0)
for index in run.steps(6):
    average["w"] = 0.5 * average["w"] + 1
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    other.step()
    optimizer.zero_grad()
    if run.is_main:
        run.save(f"a{index}")
        run.save(f"b{index}")
print("average", average["w"][0, 0].item())
"""


def test_every_named_save_is_committed_although_they_share_one_slot(launcher: Launcher) -> None:
    launcher.script(SCRIPT)
    run = launcher.run("--workers", "2", "--run-name", "train", "train.py", run="train")
    assert "average 1.96875" in run.output
    names = [json.loads(path.read_text()).get("name") for path in run.directory.rglob("manifest.json")]
    assert sorted(filter(None, names)) == [f"{letter}{index}" for letter in "ab" for index in range(6)]


def test_an_average_updated_before_the_step_that_fails_is_not_updated_twice(launcher: Launcher) -> None:
    launcher.script(SCRIPT)
    words = ("--workers", "2", "--run-name", "struck", "--fault", "kill:rank=1,step=3,moment=backward")
    launch = launcher.start(*words, "train.py", run="struck", command="chaos")
    assert launch.wait() == 0, launch.output
    assert "average 1.96875" in launch.output
