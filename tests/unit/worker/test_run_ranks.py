"""Several ranks in plain processes of one gloo group: the script's API, and as a script the harness that forks them.

One interpreter imports torch and forks every rank of every scenario, so that each rank is a new process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 40
JOBS: dict[str, tuple[int, Callable[[Any], Any]]] = {}


def ranks(world: int) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a scenario of `world` ranks; it is given the run, and what it returns is JSON."""

    def register(job: Callable[[Any], Any]) -> Callable[[Any], Any]:
        JOBS[job.__name__] = (world, job)
        return job

    return register


# -- the scenarios, in the ranks ----------------------------------------------------------------------------------


def dataset(count: int = 12) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(
        torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)
    )


def build(run: Any, norm: bool = False) -> tuple[Any, Any]:
    import torch

    middle = [torch.nn.BatchNorm1d(3)] if norm else []
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), *middle, torch.nn.Linear(3, 2))
    model = run.prepare(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.track(model=model, optimizer=optimizer)
    return model, optimizer


def step(model: Any, optimizer: Any, batch: Any) -> float:
    import torch

    x, y = batch
    loss = torch.nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss)


def values(model: Any) -> list[float]:
    return [float(value) for parameter in model.parameters() for value in parameter.flatten().tolist()]


@ranks(2)
def who(run: Any) -> Any:
    return [run.rank, run.local_rank, run.world_size, run.is_main, run.seed, run.mean(run.rank, weight=run.rank + 1)]


def trained(run: Any, **options: Any) -> list[float]:
    model, optimizer = build(run)
    accumulate = options.get("accumulate", 1)
    for x, y in run.batches(dataset(), epochs=2, drop_last=False, **options):
        (((model(x) - y) ** 2).mean() / accumulate).backward()
        if run.last_microbatch:
            optimizer.step()
            optimizer.zero_grad()
    return values(model)


@ranks(3)
def uneven(run: Any) -> Any:
    return trained(run, batch_size=5)


@ranks(1)
def uneven_alone(run: Any) -> Any:
    return trained(run, batch_size=5)


@ranks(2)
def accumulated(run: Any) -> Any:
    return trained(run, batch_size=4, accumulate=2)


@ranks(1)
def accumulated_alone(run: Any) -> Any:
    return trained(run, batch_size=4)


@ranks(2)
def steps_accumulated(run: Any) -> Any:
    model, optimizer = build(run)
    x, y = dataset().tensors
    for index in run.steps(3, accumulate=2):
        for half in (0, 1):
            mine = slice(4 * (index % 2) + 2 * run.rank + half, None, 8)
            (((model(x[mine]) - y[mine]) ** 2).mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [run.step, values(model)]


class Numbers:
    """An iterable that knows its place; rank r has `length + r` batches."""

    def __init__(self, length: int) -> None:
        self.length, self.at = length, 0

    def __iter__(self) -> Iterator[Any]:
        import torch

        while self.at < self.length:
            self.at += 1
            yield torch.full((2, 4), float(self.at)), torch.zeros(2, 2)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@ranks(2)
def dry(run: Any) -> Any:
    model, optimizer = build(run)
    for batch in run.batches(Numbers(3 + run.rank)):
        step(model, optimizer, batch)
    first = run.step
    for batch in run.batches(Numbers(50), name="finished"):
        step(model, optimizer, batch)
        if run.rank == 1 and run.step == first + 2:
            run.finish("enough")
    return [first, run.step]


@ranks(2)
def uneven_validation(run: Any) -> Any:
    import torch

    model, optimizer = build(run, norm=True)
    counts, seen = [], []
    for batch in run.batches(dataset(), batch_size=4):
        step(model, optimizer, batch)
        model.eval()
        with torch.no_grad():
            outputs = [(len(x), float(model(x).sum())) for x, _ in run.batches(dataset(5), batch_size=4, train=False)]
            seen.append(float(model(dataset().tensors[0]).double().sum()))
        model.train()
        counts.append(len(outputs))
        seen.append(run.mean(sum(output for _, output in outputs), weight=1))
    buffers = [value.double().sum().item() for value in model.buffers()]
    run.share_buffers()
    return [counts, seen, run.step, buffers if run.rank == 0 else [b.double().sum().item() for b in model.buffers()]]


@ranks(3)
def broken_off_together(run: Any) -> Any:
    model, optimizer = build(run)
    for batch in run.batches(dataset(), batch_size=3, epochs=50):
        step(model, optimizer, batch)
        if run.step == 5:
            break
    counted = run.step
    for batch in run.batches(dataset(), batch_size=3, epochs=50, name="next"):
        if run.step == 8:
            break
        step(model, optimizer, batch)
    return [counted, run.step, run.samples]


@ranks(2)
def broken_off_alone(run: Any) -> Any:
    from orchestrator.worker import leaving

    leaving.LEAVE_TIMEOUT_S = leaving._LEAVE_STEPS = 0.5
    model, optimizer = build(run)
    for batch in run.batches(dataset(), batch_size=4, epochs=500):
        if run.rank == 1 and run.step == 3:
            break
        step(model, optimizer, batch)
    return run.step


@ranks(2)
def ended_alone(run: Any) -> Any:
    import torch

    weight = torch.zeros(1)
    run.track(weight=weight)
    for _ in run.steps(20 if run.rank == 0 else 10):
        weight += 1
    run.complete()
    return [run.step]


@ranks(2)
def finished_by_one(run: Any) -> Any:
    model, optimizer = build(run)
    for batch in run.batches(dataset(), batch_size=4, epochs=5000):
        step(model, optimizer, batch)
        if run.rank == 1 and run.step == 7:
            run.finish("converged")
    after = [0 for _ in run.batches(dataset(), batch_size=4, name="later")]
    return [run.step, len(after), run.finishing]


@ranks(2)
def stored(run: Any) -> Any:
    """Called twice: the second start goes on where the first one was left."""
    import torch

    model, optimizer = build(run, norm=True)
    noise = torch.Generator().manual_seed(run.rank)
    run.track(noise=noise, per_rank=["noise"])
    start, drawn = run.step, []
    for batch in run.batches(dataset(), batch_size=4, epochs=4):
        drawn.append(torch.rand(1, generator=noise).item())
        run.state["rank"] = run.rank
        step(model, optimizer, batch)
        if run.rank == 0 and run.step == 1:
            run.save("early")
        if start == 0 and run.step == 8:
            return [start, run.state, drawn, values(model)]
    end(run)
    return [start, run.state, drawn, values(model)]


@ranks(2)
def named_by_another(run: Any) -> Any:
    model, optimizer = build(run)
    for batch in run.batches(dataset(), batch_size=4, epochs=100):
        step(model, optimizer, batch)
        if run.rank == 1 and run.step == 2:
            run.save("from-1")
        if run.step == 40:
            run.save("from-all")
    end(run)
    return run.step


@ranks(2)
def failed(run: Any) -> Any:
    model, optimizer = build(run)
    sys.excepthook = lambda *_: None
    for batch in run.batches(dataset(), batch_size=4, epochs=2):
        if run.step == 3:
            end_by(run, RuntimeError("both ranks"))
            return run.step
        step(model, optimizer, batch)
    return None


@ranks(2)
def different(run: Any) -> Any:
    import torch

    from orchestrator.errors import UsageError

    try:
        run.track(weight=torch.full((2,), float(run.rank)))
    except UsageError as error:
        return str(error)
    return None


def end(run: Any) -> None:
    from orchestrator.worker.plain_end import ScriptEnd

    if hasattr(run.saver, "abandon"):
        ScriptEnd(run, run.saver).ended()
    else:
        run.complete()


def end_by(run: Any, error: Exception) -> None:
    from orchestrator.worker.plain_end import ScriptEnd

    ScriptEnd(run, run.saver).uncaught(type(error), error, None)


# -- the harness --------------------------------------------------------------------------------------------------


def serve() -> None:
    """Each line names a scenario, a folder and variables; answers are exit codes and results of its ranks."""
    import torch
    import torch._dynamo  # noqa: F401  (optimizers import it lazily: a second in each rank)

    import orchestrator.worker.run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        world = JOBS[request["job"]][0]
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                os._exit(_rank_main(request, rank, world))
            pids.append(pid)
        print(json.dumps(_outcome(pids)), flush=True)


def _rank_main(request: dict[str, Any], rank: int, world: int) -> int:
    import torch
    import torch.distributed as dist

    from orchestrator.worker.run import Run

    folder = Path(request["folder"])
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environ"])
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(DEADLINE_S - 5)
    sys.argv = ["train.py"]
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{request['id']}", rank=rank, world_size=world)
        torch.manual_seed(42 - rank)
        result = JOBS[request["job"]][1](Run())
        (folder / f"result-{rank}").write_text(json.dumps(result))
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def _outcome(pids: list[int]) -> list[int]:
    """Exit codes. A rank that outlives another's failure for long hangs, and is killed."""
    until = time.monotonic() + DEADLINE_S
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                until = min(until, time.monotonic() + DEADLINE_S / 3) if status else until
        if time.monotonic() > until:
            for pid in [pid for pid in pids if pid not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


class Harness:
    """The interpreter that forks ranks; one for all scenarios."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATOR_")}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip
        self.count = 0

    def __call__(self, job: str, folder: Path, codes: list[int] | None = None, **environ: str) -> list[Any]:
        """Results by rank; what a failed rank printed instead. Asserts the exit codes, 0 each unless given."""
        self.count += 1
        request = {"job": job, "folder": str(folder), "id": f"store-{self.count}", "environ": environ}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        outputs = [(folder / f"output-{rank}").read_text() for rank in range(len(found))]
        assert found == (codes or [0] * len(found)), "\n".join(outputs)
        return [
            output if code else json.loads((folder / f"result-{rank}").read_text())
            for rank, (code, output) in enumerate(zip(found, outputs, strict=True))
        ]

    def close(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.close()


# -- the tests ----------------------------------------------------------------------------------------------------


def test_init_adopts_a_group_and_ranks_share_rank_0s_seed(harness: Harness, tmp_path: Path) -> None:
    assert harness("who", tmp_path) == [[0, 0, 2, True, 42, 2 / 3], [1, 1, 2, False, 42, 2 / 3]]


@pytest.mark.parametrize("job", ["uneven", "accumulated"])
def test_the_gradient_is_the_mean_over_the_global_batch(harness: Harness, tmp_path: Path, job: str) -> None:
    (alone,) = harness(f"{job}_alone", tmp_path)
    together = harness(job, tmp_path)
    assert all(found == together[0] for found in together)
    assert together[0] == pytest.approx(alone, abs=1e-6)


def test_steps_exchange_gradients_on_the_last_pass(harness: Harness, tmp_path: Path) -> None:
    one, other = harness("steps_accumulated", tmp_path)
    assert one == other
    assert one[0] == 3


def test_the_first_rank_to_run_dry_ends_the_loop_and_iterables_hear_wishes(harness: Harness, tmp_path: Path) -> None:
    (first, last), other = harness("dry", tmp_path)
    assert other == [first, last]
    assert first == 3
    assert first + 3 <= last < 50


def test_uneven_validation_waits_for_nobody_and_measures_one_model(harness: Harness, tmp_path: Path) -> None:
    one, other = harness("uneven_validation", tmp_path)
    assert (one[0], other[0]) == ([2, 2, 2], [1, 1, 1])  # batches of ranks: 5 samples as 2 + 2 and 1
    assert one[1:] == other[1:]
    assert one[2] == 3


def test_break_on_all_ranks_counts_what_stepped(harness: Harness, tmp_path: Path) -> None:
    assert harness("broken_off_together", tmp_path) == [[6, 8, 24]] * 3


def test_break_on_one_rank_is_an_error_not_a_hang(harness: Harness, tmp_path: Path) -> None:
    _, message = harness("broken_off_alone", tmp_path, codes=[1, 2])
    assert "Rank 1 left the loop by `break` at test_run_ranks.py:" in message
    assert "in step 3 while another rank went on; one rank's wish to end is `run.finish(reason)`." in message


def test_a_script_that_ends_on_one_rank_is_an_error(harness: Harness, tmp_path: Path) -> None:
    for rank, message in enumerate(harness("ended_alone", tmp_path, codes=[1, 1])):
        assert f"The script ended on rank {rank} after step {20 - 10 * rank} while another rank took more or" in message


def test_one_ranks_wish_to_finish_ends_the_run_for_all_at_one_step(harness: Harness, tmp_path: Path) -> None:
    one, other = harness("finished_by_one", tmp_path)
    assert one == other
    assert 8 <= one[0] < 15000
    assert one[1:] == [0, True]


def test_plain_ranks_store_together_and_go_on_exactly(harness: Harness, tmp_path: Path) -> None:
    from orchestrator.storage.checkpoints import list_checkpoints, open_run

    where = {"ORCHESTRATOR_STORAGE": str(tmp_path / "runs"), "ORCHESTRATOR_SAVE_AT": "7"}
    calm = harness("stored", tmp_path, ORCHESTRATOR_RUN_NAME="calm", ORCHESTRATOR_SAVE_AT="7")
    first = harness("stored", tmp_path, **where)
    again = harness("stored", tmp_path, **where)
    assert [start for start, *_ in again] == [7, 7]
    assert [state for _, state, *_ in again] == [{"rank": 0}, {"rank": 1}]
    for rank in (0, 1):
        assert first[rank][2] == calm[rank][2]
        assert again[rank][2][0] == first[rank][2][7]  # each rank's own generator
    assert again[0][3] == again[1][3]
    records = [(r.step, r.reason, r.name) for r in list_checkpoints(open_run(str(tmp_path / "runs" / "train")))]
    # Ranks hold generators of their own, so the save takes all of them, at the first boundary where all have heard.
    assert records == [(7, "requested", "early"), (12, "final", "")]


def test_a_save_that_another_rank_asks_for_is_made_once(harness: Harness, tmp_path: Path) -> None:
    from orchestrator.storage.checkpoints import list_checkpoints, open_run

    harness("named_by_another", tmp_path, ORCHESTRATOR_STORAGE=str(tmp_path / "runs"))
    records = [(r.step, r.reason, r.name) for r in list_checkpoints(open_run(str(tmp_path / "runs" / "train")))]
    assert [record[1:] for record in records if record[2] == "from-1"] == [("requested", "from-1")]
    assert [record for record in records if record[2] == "from-all"] == [(41, "requested", "from-all")]


def test_an_exception_keeps_the_state_before_it(harness: Harness, tmp_path: Path) -> None:
    from orchestrator.storage.checkpoints import list_checkpoints, open_run

    harness("failed", tmp_path, ORCHESTRATOR_STORAGE=str(tmp_path / "runs"))
    records = list_checkpoints(open_run(str(tmp_path / "runs" / "train")))
    assert [(record.step, record.reason) for record in records] == [(3, "exception")]


def test_replicated_means_replicated(harness: Harness, tmp_path: Path) -> None:
    for message in harness("different", tmp_path):
        assert "What rank" in message and "name what is meant to differ in `track(…, per_rank=[…])`" in message


if __name__ == "__main__":
    serve()
