"""Running the real command line against a real cluster, and reading what it left: journal, output, checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 120.0


def clean_env(**extra: str) -> dict[str, str]:
    """The tests' environment without anything that would steer a launch."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRATOR_", "RAY_ADDRESS"))}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, env["PYTHONPATH"]]) if env.get("PYTHONPATH") else root
    return {**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


@dataclass
class Launch:
    """A launch under way or ended."""

    process: subprocess.Popen[str]
    directory: Path
    output_path: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        """Everything the command has printed, both streams."""
        return self.output_path.read_text(errors="replace")

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Journal events so far, all or those named."""
        try:
            lines = (self.directory / "journal.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # being written right now
        return [event for event in found if not names or event["event"] in names]

    def until(self, what: str, ready: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
        """Wait for `ready()` to be true; fails naming `what` if the launch ends or the time is over."""
        end = time.monotonic() + deadline_s
        while True:
            value = ready()
            if value:
                return value
            if self.process.poll() is not None:
                value = ready()
                if value:
                    return value
                ended = f"the launch ended ({self.process.returncode})"
                raise AssertionError(f"{ended} before {what}:\n{self.output[-4000:]}")
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {deadline_s:g} s:\n{self.output[-4000:]}")
            time.sleep(0.01)

    def until_event(self, name: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """The `count`-th journal event of this name with these fields."""

        def ready() -> list[dict[str, Any]]:
            hits = [e for e in self.events(name) if all(e.get(key) == value for key, value in fields.items())]
            return hits[count - 1 :]

        return self.until(f"{name} {fields or ''} (number {count})", ready)[0]

    def until_output(self, text: str) -> str:
        """Wait until the command has printed `text`."""
        self.until(f"output {text!r}", lambda: text in self.output)
        return self.output

    def pids(self, attempt: int | None = None) -> dict[int, int]:
        """rank → pid of the newest group, or of `attempt`."""
        groups = [e for e in self.events("group_started") if attempt is None or e["attempt"] == attempt]
        return {worker["rank"]: worker["pid"] for worker in groups[-1]["workers"]}

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank of the newest group."""
        os.kill(self.pids()[rank], number)

    def signal(self, number: int) -> None:
        """Send a signal to the driver."""
        self.process.send_signal(number)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit code. A launch that does not end is killed, and that is a failure."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.close()
            raise AssertionError(f"the launch did not end within {deadline_s:g} s:\n{self.output[-4000:]}") from None

    def close(self) -> None:
        """End it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)

    def log(self, attempt: int, rank: int) -> str:
        """A rank's own log."""
        return (self.directory / "logs" / f"a{attempt:04d}" / f"rank-{rank:05d}.log").read_text(errors="replace")


class Launcher:
    """Starts launches in one directory and ends them all. `address`: a cluster to share, or "local"."""

    def __init__(self, cwd: Path, address: str) -> None:
        self.cwd, self.address = cwd, address
        self._started: list[Launch] = []

    def script(self, text: str, name: str = "train.py") -> Path:
        """Write a script into the working directory."""
        path = self.cwd / name
        path.write_text(text)
        return path

    def start(
        self, *arguments: str, run: str = "train", command: str = "launch", address: str | None = None,
        own_group: bool = False, **env: str
    ) -> Launch:
        """`orchestrator launch ARGUMENTS` in the background; `run` is the run's name, for finding its directory."""
        where = address if address is not None else self.address
        options = ["--address", where] if command in ("launch", "chaos") else []
        output = self.cwd / f"output-{len(self._started)}.txt"
        words = [sys.executable, "-m", "orchestrator", command, *options, *arguments]
        with output.open("w") as stream:
            process = subprocess.Popen(
                words, cwd=self.cwd, env=clean_env(**env), stdout=stream, stderr=subprocess.STDOUT, text=True,
                stdin=subprocess.DEVNULL, start_new_session=own_group,
            )  # fmt: skip
        launch = Launch(process, self.cwd / "runs" / run, output)
        self._started.append(launch)
        return launch

    def run(self, *arguments: str, run: str = "train", expect: int | None = 0, **env: str) -> Launch:
        """Start and wait; asserts the exit code unless `expect` is None."""
        launch = self.start(*arguments, run=run, **env)
        code = launch.wait()
        assert expect is None or code == expect, f"exit {code}, expected {expect}:\n{launch.output[-6000:]}"
        return launch

    def command(self, *words: str, expect: int | None = 0) -> str:
        """Another command of ours, to its end; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *words], cwd=self.cwd, env=clean_env(), capture_output=True,
            text=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        text = done.stdout + done.stderr
        assert expect is None or done.returncode == expect, f"exit {done.returncode}, expected {expect}:\n{text}"
        return text

    def close(self) -> None:
        """End everything that was started here."""
        for launch in self._started:
            launch.close()


def state(directory: Path, selector: str = "last") -> dict[str, Any]:
    """All tensors of a checkpoint by exported name, as numpy-comparable torch tensors."""
    from safetensors.torch import load_file

    from orchestrator.storage.checkpoints import export, open_run

    target = directory.parent / f".export-{directory.name}-{selector}.safetensors"
    target.unlink(missing_ok=True)
    export(open_run(str(directory)), selector, "safetensors", target)
    return load_file(target)


def assert_equal_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bitwise equality of two exported states."""
    import torch

    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, first {different[:5]}"
