"""`orchestrator launch`: options, environment and YAML become one RunSpec; bad input starts nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli import launch as launch_module
from orchestrator.cli.main import cli
from orchestrator.errors import ConfigRefusedError
from orchestrator.spec import Retention, RunSpec, SaveTrigger


class Driver:
    """Stands where the driver is: keeps what it was asked to run."""

    def __init__(self) -> None:
        self.specs: list[RunSpec] = []
        self.faults: list[str] = []
        self.raises: Exception | None = None

    def run(self, spec: RunSpec, console: Any) -> int:
        self.specs.append(spec)
        if self.raises:
            raise self.raises
        return 7

    def chaos(self, spec: RunSpec, faults: list[str], console: Any) -> int:
        self.faults = faults
        return self.run(spec, console)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch_module.machine, "gpus", lambda: 0)
    monkeypatch.setattr(launch_module.machine, "cores", lambda: 8)
    Path("train.py").write_text("print('hello')\n")
    driver = Driver()
    fake, chaos = ModuleType("orchestrator.driver.launch"), ModuleType("orchestrator.chaos.run")
    fake.run, chaos.main = driver.run, driver.chaos  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orchestrator.driver.launch", fake)
    monkeypatch.setitem(sys.modules, "orchestrator.chaos.run", chaos)
    return driver


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def launched(driver: Driver, *words: str) -> RunSpec:
    result = call("launch", *words)
    assert (result.exit_code, result.stderr) == (7, "")
    return driver.specs[-1]


def refused(driver: Driver, *words: str) -> str:
    """The error; asserts that nothing was started or created."""
    before = sorted(Path.cwd().rglob("*"))
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "\n" not in result.stderr.rstrip("\n")
    assert driver.specs == []
    assert sorted(Path.cwd().rglob("*")) == before
    return result.stderr


def test_defaults_are_the_contract(driver: Driver) -> None:
    assert launched(driver, "train.py") == RunSpec(
        script="train.py", workers=1, command=("orchestrator", "launch", "train.py")
    )


def test_every_option_reaches_its_field(driver: Driver) -> None:
    spec = launched(
        driver,
        *("--workers", "4", "--address", "head:6379", "--storage", "out", "--run-name", "mnist-2"),
        *("--strategy", "ddp", "--save-every", "100steps,30s", "--save-at", "1,1000", "--keep-last", "5"),
        *("--keep-every", "1epoch", "--keep-best", "2:val_loss", "--keep-bytes", "10GiB", "--no-exception-save"),
        *("--max-restarts", "0", "--start-timeout", "1m", "--drain-timeout", "5", "--grace", "60"),
        *("--cpus-per-worker", "0.5", "--gpus-per-worker", "2", "--preload", "numpy,json", "--env", "A=1"),
        *("--env", "B=x=y", "--seed", "7", "--no-step-rng", "--log-dir", "logs", "--quiet", "--json"),
        *("--hang-timeout", "off", "--dashboard", "off", "--worker-load", "1,1,1,1", "train.py"),
    )
    expected = RunSpec(
        script="train.py",
        workers=4,
        address="head:6379",
        storage="out",
        run_name="mnist-2",
        strategy="ddp",
        save_every=(SaveTrigger("steps", 100), SaveTrigger("seconds", 30)),
        save_at=(1, 1000),
        retention=Retention(5, SaveTrigger("epochs", 1), (2, "val_loss", "min"), 10 * 2**30),
        exception_save=False,
        max_restarts=0,
        start_timeout_s=60,
        drain_timeout_s=5,
        grace_s=60,
        cpus_per_worker=0.5,
        gpus_per_worker=2,
        preload=("numpy", "json"),
        env=(("A", "1"), ("B", "x=y")),
        seed=7,
        step_rng=False,
        log_dir="logs",
        quiet=True,
        json=True,
        hang_timeout="off",
        command=spec.command,
    )
    assert spec == expected


def test_what_env_sets_is_not_shown(driver: Driver) -> None:
    words = ("--env", "TOKEN=abc", "--env=KEY=a=b", "train.py", "--env", "A=1")
    spec = launched(driver, *words)
    assert spec.env == (("TOKEN", "abc"), ("KEY", "a=b"))
    shown = ("--env", "TOKEN=…", "--env=KEY=…", "train.py", "--env", "A=1")
    assert spec.command == ("orchestrator", "launch", *shown)


def test_underscores_and_equals_signs_are_spellings(driver: Driver) -> None:
    assert launched(driver, "--save_every=5m", "--run-name=a_b", "train.py").save_every == (
        SaveTrigger("seconds", 300),
    )
    assert driver.specs[-1].run_name == "a_b"


def test_what_follows_the_script_is_the_scripts(driver: Driver) -> None:
    words = ("--seed", "9", "--", "-x", "--save_every=1", "--help", "a b", "")
    spec = launched(driver, "--seed", "1", "train.py", *words)
    assert (spec.seed, spec.args) == (1, words)


def test_an_option_of_ours_behind_the_script_is_told(driver: Driver) -> None:
    result = call("launch", "train.py", "--workers", "2")
    assert driver.specs[-1].args == ("--workers", "2")
    assert "--workers stands after train.py, so the script gets it" in result.stdout


def test_modules(driver: Driver) -> None:
    Path("pkg/sub").mkdir(parents=True)
    Path("pkg/__init__.py").write_text("raise RuntimeError('imported')\n")
    Path("pkg/sub/train.py").write_text("")
    Path("pkg/__main__.py").write_text("")
    spec = launched(driver, "-m", "pkg.sub.train", "--lr", "1")
    assert (spec.script, spec.module, spec.args) == ("pkg.sub.train", True, ("--lr", "1"))
    assert launched(driver, "-m", "pkg").module


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        (["--nproc-per-node", "3"], 3),
        (["--nproc_per_node=3", "--nnodes=2"], 6),
        (["--nnodes", "2:2", "--nproc-per-node", "2"], 4),
        (["--nproc-per-node", "cpu"], 8),
        (["--nproc-per-node", "auto"], 8),
        (["--workers", "6", "--nnodes", "2", "--nproc-per-node", "3"], 6),
        (["--workers", "2:2"], 2),
    ],
)
def test_torchruns_spellings_of_workers(driver: Driver, words: list[str], workers: int) -> None:
    assert launched(driver, *words, "train.py").workers == workers


def test_torchruns_rendezvous_is_ignored_aloud(driver: Driver) -> None:
    result = call("launch", "--standalone", "--rdzv-backend=c10d", "--master_port", "1", "--node-rank=0", "train.py")
    assert result.exit_code == 7
    assert "--standalone, --rdzv-backend, --master-port, --node-rank are torchrun's" in result.stdout


def test_auto_workers_follow_the_gpus(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module.machine, "gpus", lambda: 4)
    spec = launched(driver, "train.py")
    assert (spec.workers, spec.gpus_per_worker, spec.auto) == (4, 1.0, ())
    assert launched(driver, "--gpus-per-worker", "2", "train.py").workers == 2
    assert launched(driver, "--workers", "2", "train.py").gpus_per_worker == 1.0
    assert launched(driver, "--workers", "6", "train.py").gpus_per_worker == 0.0


def test_auto_is_left_to_an_attached_cluster(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    spec = launched(driver, "train.py")
    assert (spec.address, spec.workers, spec.auto) == ("head:6379", 0, ("workers", "gpus_per_worker"))


def test_yaml_then_environment_then_flags(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.yaml").write_text("workers: 2\nseed: 1\nkeep_last: 4\nsave-every: [10steps, 1m]\nenv: {A: 1}\nstep_x: 1\n")
    assert "c.yaml:6: unknown key `step_x`" in refused(driver, "launch", "--config", "c.yaml", "train.py")
    Path("c.yaml").write_text("workers: 2\nseed: 1\nkeep_last: 4\nsave-every: [10steps, 1m]\nenv: {A: 1, B: 2}\n")
    monkeypatch.setenv("ORCHESTRATOR_SEED", "2")
    monkeypatch.setenv("ORCHESTRATOR_KEEP_LAST", "5")
    monkeypatch.setenv("ORCHESTRATOR_QUIET", "1")
    spec = launched(driver, "--config", "c.yaml", "--seed", "3", "--env", "B=3", "train.py")
    assert (spec.workers, spec.retention.keep_last, spec.seed, spec.quiet) == (2, 5, 3, True)
    assert spec.save_every == (SaveTrigger("steps", 10), SaveTrigger("seconds", 60))
    assert spec.env == (("A", "1"), ("B", "3"))


def test_unknown_variables_warn(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_WROKERS", "2")
    monkeypatch.setenv("ORCHESTRATOR_INTERNAL_RANK", "0")
    result = call("launch", "train.py")
    assert "unknown variable ORCHESTRATOR_WROKERS is ignored; did you mean `ORCHESTRATOR_WORKERS`?" in result.stdout
    assert "INTERNAL" not in result.stdout


def test_print_config_says_where_values_come_from_and_reads_back(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("c.yaml").write_text("hang-timeout: off\nworkers: 2:2\n")
    monkeypatch.setenv("ORCHESTRATOR_SEED", "2")
    result = call("launch", "--config", "c.yaml", "--env", "A=1", "--print-config")
    assert result.exit_code == 0
    assert driver.specs == []
    origins = {line.split(":")[0]: line.split("  # ")[1] for line in result.stdout.splitlines()}
    assert origins["hang-timeout"] == "c.yaml:1"
    assert origins["seed"] == "environment ORCHESTRATOR_SEED"
    assert origins["env"] == "command line"
    assert origins["grace"] == "default"
    loaded = yaml.safe_load(result.stdout)
    assert (loaded["workers"], loaded["hang-timeout"], loaded["env"], loaded["seed"]) == ("2:2", "off", ["A=1"], 2)
    Path("again.yaml").write_text(result.stdout)
    monkeypatch.delenv("ORCHESTRATOR_SEED")
    assert launched(driver, "--config", "again.yaml", "train.py").seed == 2


BAD_OPTIONS = [
    (["--workers", "0"], "--workers 0: a run needs at least 1 worker"),
    (["--workers", "5:2"], "--workers 5:2: the range is upside down; write 2:5"),
    (["--workers", "abc"], "--workers abc: write how many ranks"),
    (["--workers", "-1"], "--workers -1: a run needs at least 1 worker"),
    (
        ["--workers", "2:4"],
        "--workers 2:4: a number of workers that changes while the run goes on is not available yet",
    ),
    (["--nnodes", "1:4"], "--nnodes 1:4: a number of nodes that changes"),
    (["--nproc-per-node", "gpu"], "this machine has no GPU"),
    (["--nproc-per-node", "x"], "--nproc-per-node x: write a number"),
    (["--workers", "3", "--nproc-per-node", "2"], "--workers 3 contradicts"),
    (["--gpus-per-worker", "1"], "need more than the 0 GPUs"),
    (["--save-every", "100"], "--save-every 100: 100 of what?"),
    (["--save-every", "5parsecs"], "unknown unit `parsecs`"),
    (["--save-at", "x"], "--save-at x: write step numbers"),
    (["--keep-last", "0"], "--keep-last 0: write a whole number from 1 on"),
    (["--keep-best", "x"], "write K:METRIC"),
    (["--run-name", "a/b"], "--run-name a/b: "),
    (["--run-name", ".."], "--run-name ..: "),
    (["--run-name", ""], "--run-name : "),
    (["--storage", "s3://bucket/x"], "storage on S3 is not available yet"),
    (["--storage", "gs://bucket/x"], "storage cannot be `gs://`"),
    (["--storage", "train.py/runs"], "train.py is a file"),
    (["--strategy", "fsdp"], "--strategy fsdp: fsdp is not available yet"),
    (["--strategy", "dpd"], "did you mean `ddp`?"),
    (["--hang-timeout", "30"], "--hang-timeout 30: detection of hangs by a deadline of your own is not available yet"),
    (["--dashboard", "0.0.0.0:80"], "--dashboard 0.0.0.0:80: the dashboard is not available yet"),
    (["--worker-load", "1,1", "--workers", "3"], "--worker-load names 2 workers and the run has 3"),
    (["--cpus-per-worker", "0"], "write a number above 0"),
    (["--worker-load", "1,2"], "unequal shares are not available yet"),
    (["--working-dir", "."], "--working-dir .: shipping code to the nodes is not available yet"),
    (["--from", "runs/a@best"], "--from runs/a@best: starting from another run's checkpoint is not available yet"),
    (["--accept", "seed"], "accepting a changed configuration is not available yet"),
    (["--detach"], "--detach: running in the background is not available yet"),
    (["--allow-partial"], "--allow-partial: starting from a part"),
    (["--address", "ray://x:1"], "a ray:// client cannot host a run"),
    (["--address", "nonsense"], "write auto, local or HOST:PORT"),
    (["--env", "NOVALUE"], "--env NOVALUE: write NAME=VALUE"),
    (["--seed", "x"], "--seed x: write a whole number"),
    (["--no-python"], "only Python scripts and modules"),
    (["--save-evry", "1s"], "there is no option --save-evry; did you mean `--save-every`?"),
    (["--worker", "2"], "there is no option --worker; did you mean `--workers`?"),
    (["--storage", "--quiet"], "--storage needs a value (URI), and `--quiet` is the next option"),
    (["--config", "none.yaml"], "--config none.yaml: cannot be read (No such file or directory)"),
]


@pytest.mark.parametrize(("words", "says"), BAD_OPTIONS, ids=[" ".join(words) for words, _ in BAD_OPTIONS])
def test_bad_options(driver: Driver, words: list[str], says: str) -> None:
    assert says in refused(driver, "launch", *words, "train.py")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("wrokers: 2", "c.yaml:1: unknown key `wrokers`; did you mean `workers`?"),
        ("seed: 1\nworkers: 0", "--workers 0 (from c.yaml:2): a run needs at least 1 worker"),
        ("seed: 1\nseed: 2", "c.yaml:2: `seed` is set twice"),
        ("- workers", "c.yaml: must be a mapping"),
        ("seed: {a: 1}", "c.yaml:1: `seed` must be a single value or a list"),
        ("seed: [1", "c.yaml:"),
        ("nnodes: 2", "unknown key `nnodes`; use `workers`"),
    ],
)
def test_bad_yaml(driver: Driver, content: str, says: str) -> None:
    Path("c.yaml").write_text(content)
    assert says in refused(driver, "launch", "--config", "c.yaml", "train.py")


def test_bad_variable_names_itself(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_SAVE_EVERY", "100")
    said = refused(driver, "launch", "train.py")
    assert "--save-every 100 (from environment ORCHESTRATOR_SAVE_EVERY): 100 of what?" in said


def test_bad_scripts(driver: Driver, tmp_path: Path) -> None:
    Path("broken.py").write_text("import os\ndef f(:\n    pass\n")
    Path("data.bin").write_bytes(b"\0\1\2")
    Path("latin.py").write_bytes(b"x = '\xe9'\n")
    Path("folder").mkdir()
    Path("pkg").mkdir()
    Path("pkg/__init__.py").write_text("")
    table = [
        (["tarin.py"], "there is no script tarin.py in"),
        (["tarin.py"], "did you mean `train.py`?"),
        (["nowhere/train.py"], "there is no script nowhere/train.py"),
        (["folder"], "folder is a directory"),
        (["broken.py"], "broken.py:2: SyntaxError: "),
        (["broken.py"], "`def f(:`"),
        (["data.bin"], "data.bin"),
        (["latin.py"], "latin.py"),
        (["json.tool"], "for the module of that name use `-m json.tool`"),
        (["-m", "no_such_module_here"], "there is no module no_such_module_here"),
        (["-m", "json.nothing"], "there is no module json.nothing"),
        (["-m", "pkg"], "pkg is a package without a __main__ module"),
        (["-m", "broken"], "broken.py:2: SyntaxError"),
        (["-m", "train.py"], "there is no module train.py"),
        (["-m", "a/b"], "is no module's name"),
        (["-m"], "launch needs a module's name after -m"),
        ([], "launch needs a script"),
    ]
    for words, says in table:
        assert says in refused(driver, "launch", *words)


def test_an_unreadable_script(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "train.py cannot be read (Permission denied); check its permissions" in refused(driver, "launch", "train.py")


def test_a_broken_installation_is_told(driver: Driver) -> None:
    driver.raises = ModuleNotFoundError("No module named 'ray'", name="ray")
    result = call("launch", "train.py")
    assert (result.exit_code, "error: ray cannot be imported" in result.stderr) == (1, True)


def test_other_systems_are_refused(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "needs Linux" in refused(driver, "launch", "train.py")
    assert "plain `python train.py` runs the same script here" in refused(driver, "launch", "train.py")


def test_errors_of_the_driver_keep_their_exit_code(driver: Driver) -> None:
    driver.raises = ConfigRefusedError("the model has other shapes")
    result = call("launch", "train.py")
    assert (result.exit_code, result.stderr) == (78, "error: the model has other shapes\n")


def test_chaos_takes_launch_options_and_faults(driver: Driver) -> None:
    words = ("--workers", "2", "--fault", "kill:rank=1,step=5", "--fault", "random:seed=1,count=2", "train.py", "-x")
    result = call("chaos", *words)
    assert result.exit_code == 7, result.output
    assert driver.faults == ["kill:rank=1,step=5", "random:seed=1,count=2"]
    assert (driver.specs[0].workers, driver.specs[0].args, driver.specs[0].faults) == (2, ("-x",), tuple(driver.faults))
    driver.specs.clear()
    assert "chaos needs at least one --fault" in refused(driver, "chaos", "train.py")


@pytest.mark.parametrize("command", ["report", "submit", "attach", "deploy"])
def test_commands_to_come_say_so(driver: Driver, command: str) -> None:
    assert f"`orchestrator {command}` is not available yet" in refused(driver, command, "runs/x", "--any", "thing")


def test_unknown_commands(driver: Driver) -> None:
    assert "there is no command `lunch`; did you mean `launch`?" in refused(driver, "lunch", "train.py")
    assert "to train it: `orchestrator launch train.py`" in refused(driver, "train.py")
