"""Scripts written for torchrun, unchanged: a lost rank restarts the group, whose own checkpoints count."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.harness import Launch, Launcher

SCRIPTS = Path(__file__).with_name("scripts")
TOLD = "its own checkpoints count"


def _recovers_by_itself(launch: Launch) -> None:
    assert launch.wait() == 0, launch.output[-6000:]
    assert [(e["rank"], e["cause"]) for e in launch.events("worker_failed") if e["root"]] == [(1, "signal:9")]
    assert len(launch.events("group_started")) == 2
    assert launch.events("run_finished")[-1]["outcome"] == "completed"
    assert launch.output.count(TOLD) == 1, launch.output


def test_elastic_ddp_tutorial(launcher: Launcher) -> None:
    launch = launcher.start("--workers", "2", "--run-name", "train", str(SCRIPTS / "multigpu_torchrun.py"), "60", "2")
    launch.until_output("Epoch 6 | Training snapshot saved")
    launch.kill(1)
    _recovers_by_itself(launch)
    resumed = int(re.search(r"Resuming training from snapshot at Epoch (\d+)", launch.output).group(1))
    assert resumed >= 7
    for rank in (0, 1):
        second = launch.log(2, rank)
        assert f"[rank {rank}] Epoch {resumed} " in second and f"[rank {rank}] Epoch {resumed - 1} " not in second
        assert f"[rank {rank}] Epoch 59 " in second


def test_module_form_with_torchruns_arguments_and_variables(launcher: Launcher) -> None:
    shutil.copytree(SCRIPTS / "package", launcher.cwd / "package")
    words = ["--nnodes", "1", "--nproc_per_node=2", "--standalone", "--max-restarts", "4", "-m", "package.train"]
    launch = launcher.run("--run-name", "train", *words, "--width", "3")
    assert "--standalone" in launch.output  # ignored, and said to be
    for attempt in (1, 2, 3):
        for rank in (0, 1):
            assert (
                f"rank {rank} of 2 sum [3.0, 3.0, 3.0, 3.0] numbers [{rank}, 2, 0, 1, {rank}, 2] "
                f"restarts {attempt - 1} of 4 "
                "run train elastic True name __main__ package package arguments ['--width', '3']"
            ) in launch.log(attempt, rank)
    roots = [(e["rank"], e["cause"]) for e in launch.events("worker_failed") if e["root"]]
    assert roots == [(1, "exit:3"), (0, "exception")]
    for rank in (0, 1):
        assert f"rank {rank} done" in launch.log(3, rank) and f"rank {rank} done" not in launch.log(2, rank)
    assert launch.output.count(TOLD) == 1, launch.output


@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None,
    reason="Lightning is not installed: pip install -c constraints.txt lightning",
)
def test_lightning_trainer(launcher: Launcher) -> None:
    launch = launcher.start("--workers", "2", "--run-name", "train", str(SCRIPTS / "lit.py"))
    launch.until_output("epoch 3 rank 0/2 TorchElasticEnvironment")
    launch.kill(1)
    _recovers_by_itself(launch)
    for rank in (0, 1):
        epochs = [int(n) for n in re.findall(rf"epoch (\d+) rank {rank}/2", launch.log(2, rank))]
        assert epochs == list(range(epochs[0], 10)) and epochs[0] >= 3
        assert f"rank {rank} ends at step 80" in launch.log(2, rank)
