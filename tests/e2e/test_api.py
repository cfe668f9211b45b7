"""A script's end, scripts that never call us, saves that are asked for, and torchrun: the API where processes count."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import DEADLINE_S, Launcher, clean_env

TRAIN = """
import os
import torch
import orchestrator

run = orchestrator.init()
model = run.prepare(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)
data = torch.utils.data.TensorDataset(torch.arange(64.0).reshape(16, 4) / 64)
for (x,) in run.batches(data, batch_size=4, epochs=3 if os.path.exists("more") else 2):
    print("training step", run.step, flush=True)
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
if not os.path.exists("fine"):
    raise ValueError("after the loop")
print("the end at", run.step, flush=True)
"""


def reasons(launcher: Launcher, run: str = "train") -> list[tuple[int, str]]:
    from orchestrator.storage.checkpoints import list_checkpoints, open_run

    return [(record.step, record.reason) for record in list_checkpoints(open_run(str(launcher.cwd / "runs" / run)))]


def test_an_error_after_the_loop_and_a_completed_run_launched_again(launcher: Launcher) -> None:
    launcher.script(TRAIN)
    options = ("--workers", "2", "--run-name", "train", "train.py")
    failed = launcher.run(*options, expect=1)
    assert "ValueError: after the loop" in failed.output
    assert reasons(launcher)[-1][0] == 8  # what was trained is kept
    (launcher.cwd / "fine").touch()
    again = launcher.run(*options)
    assert "training step" not in again.output
    assert "the end at 8" in again.output
    assert reasons(launcher)[-1] == (8, "final")
    once_more = launcher.run(*options)
    assert "complete at step 8; raise epochs or name a new run" in once_more.output
    (launcher.cwd / "more").touch()
    assert "the end at 12" in launcher.run(*options).output
    assert reasons(launcher)[-1] == (12, "final")


ALIEN = """
import os, sys, time
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
         "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
         "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE",
         "TORCHELASTIC_ERROR_FILE"]
missing = [name for name in names if name not in os.environ]
assert not missing, missing
import torch.distributed as dist
dist.init_process_group("gloo")
import torch
total = torch.ones(1)
dist.all_reduce(total)
count = os.environ["TORCHELASTIC_RESTART_COUNT"]
with open(f"seen-{dist.get_rank()}", "a") as file:
    file.write(f"{count} {int(total)}\\n")
dist.barrier()
if dist.get_rank() == 1 and count == "0":
    os._exit(7)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_script_that_never_calls_init_runs_as_under_torchrun(launcher: Launcher) -> None:
    launcher.script(ALIEN)
    launch = launcher.run("--workers", "2", "--run-name", "alien", "train.py", run="alien")
    for rank in (0, 1):
        assert (launcher.cwd / f"seen-{rank}").read_text() == "0 2\n1 2\n"  # restarted as a group
    assert launch.output.count("never call") == 1
    assert "own checkpoints" in launch.output


FINISHING = """
import os, time
import torch
import orchestrator

run = orchestrator.init()
weight = torch.zeros(1)
run.track(weight=weight)
for _ in run.steps(1_000_000):
    weight += 1
    time.sleep(0.01)
    if run.rank == 1 and os.path.exists("enough"):
        run.finish("seen enough")
print("rank", run.rank, "ends at", run.step, int(weight), flush=True)
"""


def test_finish_by_one_rank_and_a_named_save(launcher: Launcher) -> None:
    launcher.script(FINISHING)
    launch = launcher.start("--workers", "2", "--run-name", "train", "train.py")
    launch.until_event("group_started")
    launcher.command("save", "runs/train", "--name", "asked")
    (launcher.cwd / "enough").touch()
    assert launch.wait() == 0, launch.output
    ends = {launch.log(1, rank).split("ends at ")[1].strip() for rank in (0, 1)}
    assert len(ends) == 1  # all ranks leave at the same step
    found = [event["reason"] for event in launch.events("checkpoint_committed")]
    assert found == ["requested", "final"]
    assert launch.events("run_finished")[0]["why"] == "seen enough"
    step = launch.events("run_finished")[0]["step"]
    assert ends == {f"{step} {step}"}


ELASTIC = """
import os
import torch
import orchestrator

run = orchestrator.init()
model = run.prepare(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)
print(f"rank {run.rank} starts at {run.step}", flush=True)
data = torch.utils.data.TensorDataset(torch.arange(64.0).reshape(16, 4) / 64)
for (x,) in run.batches(data, batch_size=4, epochs=2):
    if run.rank == 1 and run.step == 5 and not os.path.exists("struck"):
        open("struck", "w").close()
        os._exit(3)
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"rank {run.rank} ends at {run.step}", flush=True)
"""


def test_torchrun_restarts_go_on_from_what_the_processes_stored(tmp_path: Path) -> None:
    from orchestrator.storage.checkpoints import list_checkpoints, open_run

    (tmp_path / "train.py").write_text(ELASTIC)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "train.py"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S,
        env=clean_env(ORCHESTRATOR_STORAGE="runs", ORCHESTRATOR_SAVE_EVERY="2steps"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        told = re.findall(rf"rank {rank} (\w+ at \d+)", done.stdout)  # two ranks may write into one line
        assert told[0::2] == ["starts at 0", "ends at 8"]
        assert told[1] in ("starts at 4", "starts at 5")  # 5 if rank 0 kept the step before the lost connection in time
    records = list_checkpoints(open_run(str(tmp_path / "runs" / "train")))
    assert [(record.step, record.reason) for record in records][-1] == (8, "final")
