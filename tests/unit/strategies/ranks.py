"""Scenarios with several gloo ranks. Run as a script: `ranks.py FOLDER` prints one JSON object, scenario → result.

One interpreter imports torch and forks every rank of every scenario, so that each rank is a new process.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (DDP and optimizers import it lazily: a second in each rank)
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

from orchestrator.errors import UsageError  # noqa: E402
from orchestrator.strategies.ddp import DataParallel, DdpStrategy  # noqa: E402
from orchestrator.worker.state import TrackedState  # noqa: E402

CPU = torch.device("cpu")
DEADLINE_S = 60


def run_ranks(folder: Path, name: str, world: int, job: Callable[[int, int], Any]) -> list[Any]:
    """Run `job(rank, world)` in `world` new processes of one gloo group and return what each returned."""
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=world
                )
                torch.save(job(rank, world), folder / f"{name}-{rank}.pt")
                dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    until = time.monotonic() + DEADLINE_S
    codes: dict[int, int] = {}
    while len(codes) < world:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = status
        late = time.monotonic() > until
        if late or any(codes.values()):
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise RuntimeError(f"{name}: {'deadline' if late else 'a rank failed'}: {codes}")
        time.sleep(0.002)
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]


class Net(nn.Module):
    """BatchNorm, dropout, a frozen layer, a weight used twice, a bf16 part."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 2.0
        self.first = nn.Linear(24, 24)
        self.norm = nn.BatchNorm1d(24)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.brief = nn.Linear(24, 24, dtype=torch.bfloat16)
        self.unused = nn.Linear(3, 3)
        self.last = nn.Linear(24, 24)
        self.tied = self.first

    def forward(self, x: torch.Tensor, use_all: bool = True) -> torch.Tensor:
        x = F.dropout(self.norm(torch.tanh(self.first(x))), 0.1, self.training)
        x = self.brief(self.frozen(x).bfloat16()).float() + x
        out = self.tied(self.last(x)).sum(1)
        return out + self.unused(x[:, :3]).sum(1) if use_all else out

    def shout(self, word: str) -> str:
        return f"{word}! x{self.temperature}"


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(step: int, rank: int, size: int = 8) -> torch.Tensor:
    return torch.randn(size, 24, generator=torch.Generator().manual_seed(1000 * step + rank))


def train(wrap: Callable[[nn.Module], nn.Module], steps: range, state: Any, use_all: bool = True) -> Any:
    module = net()
    if state is not None:
        module.load_state_dict(state["model"])
    model = wrap(module)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    rank = dist.get_rank()
    for step in steps:
        torch.manual_seed(step * 10 + rank)
        optimizer.zero_grad()
        (model(data(step, rank), use_all) ** 2).mean().backward()
        optimizer.step()
    late = getattr(model, "_has_rebuilt_buckets", None)
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "rebuilt_late": late}


def ours(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda module: DdpStrategy().wrap(module, CPU, **options)


def plain(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda module: DistributedDataParallel(module, **options)


def same(a: Any, b: Any, statistics: bool = True) -> bool:
    keys = [key for key in a["model"] if statistics or not key.startswith("norm.")]
    return all(torch.equal(a["model"][key], b["model"][key]) for key in keys)


def restart(folder: Path, name: str, world: int, wrap: Callable[..., Any], use_all: bool = True) -> dict[str, Any]:
    """40 steps in one go against 20 steps, new processes, 20 more steps."""
    through = run_ranks(folder, name + "-40", world, lambda r, w: train(wrap, range(40), None, use_all))
    half = run_ranks(folder, name + "-20", world, lambda r, w: train(wrap, range(20), None, use_all))
    rest = run_ranks(folder, name + "-20-40", world, lambda r, w: train(wrap, range(20, 40), half[0], use_all))
    return {
        "finite": all(value.isfinite().all().item() for value in through[0]["model"].values()),
        "equal": same(through[0], rest[0]),
        "ranks_agree": all(same(through[0], other, statistics=False) for other in through[1:]),
        "rebuilt_late": [one["rebuilt_late"] for one in (*through, *rest)],
    }


def untouched(rank: int, world: int) -> dict[str, Any]:
    """What building the wrapper must leave alone, and what it costs."""
    module = net()
    before = copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    wrapped = ours(gradient_as_bucket_view=True)(module)
    began = time.perf_counter()
    wrapped._settle()
    settle_ms = (time.perf_counter() - began) * 1e3
    return {
        "grads_none": all(p.grad is None for p in module.parameters()),
        "state": all(torch.equal(before[key], value) for key, value in module.state_dict().items()),
        "random": torch.equal(random, torch.get_rng_state()),
        "versions": [p._version for p in module.parameters()],
        "settle_ms": settle_ms,
    }


def shares(rank: int, world: int) -> dict[str, Any]:
    """A global batch of 10 over 3 ranks as 4 + 4 + 2, then as 10 + 0 + 0, against one process with all 10."""
    result: dict[str, Any] = {}
    everything = torch.cat([data(7, 0, 10)])
    cases = (("even", None), ("4+4+2", (4, 4, 2)), ("4+4+2 views", (4, 4, 2)), ("10+0+0", (10, 0, 0)))
    for name, sizes in cases:
        module = nn.Linear(24, 1)
        with torch.no_grad():
            module.weight.fill_(0.25)
            module.bias.fill_(0.5)
        reference = copy.deepcopy(module)
        strategy = DdpStrategy()
        model = strategy.wrap(module, CPU, gradient_as_bucket_view=name.endswith("views"))
        model(data(1, rank)).mean().backward()  # a hook must be registrable after a backward pass
        model.zero_grad()
        strategy.set_share(0.5 if sizes else None)
        strategy.set_share(sizes[rank] / 10 if sizes else None)
        if sizes:
            begin = sum(sizes[:rank])
            mine, whole = everything[begin : begin + sizes[rank]], everything
        else:
            mine, whole = everything[3 * rank : 3 * rank + 3], everything[:9]
        (model(mine) ** 2).mean().backward()
        (reference(whole) ** 2).mean().backward()
        result[name] = torch.allclose(module.weight.grad, reference.weight.grad, rtol=1e-5)
        result[name + " hook"] = model._exchange.registered
    return result


def even_hook_is_exact(rank: int, world: int) -> bool:
    """After a weighted step, equal shares are summed bit for bit as DDP without a hook does."""
    grads = []
    for weighted_before in (False, True):
        module = net()
        strategy = DdpStrategy()
        model = strategy.wrap(module, CPU)
        if weighted_before:
            strategy.set_share(0.25)
            strategy.set_share(None)
        torch.manual_seed(rank)
        (model(data(3, rank)) ** 2).mean().backward()
        grads.append([p.grad for p in module.parameters() if p.grad is not None])
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def user_hook(rank: int, world: int) -> dict[str, bool]:
    """A comm hook of the user sees weighted gradients."""

    def mean(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        state.append(1)
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    mean.__annotations__ = {}
    module, calls = nn.Linear(1, 1, bias=False), []
    strategy = DdpStrategy()
    model = strategy.wrap(module, CPU)
    strategy.set_share((0.5, 0.25, 0.25)[rank])
    model.register_comm_hook(calls, mean)
    (model(torch.full((1, 1), float(4 * (rank + 1))))).sum().backward()
    return {"gradient": module.weight.grad.item(), "calls": len(calls)}


def accumulation(rank: int, world: int) -> dict[str, Any]:
    """`exchanged` through two microbatches, a bypassed wrapper, and a user's own no_sync."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    strategy = DdpStrategy()
    model = strategy.wrap(module, CPU)
    other = strategy.wrap(nn.Linear(2, 1), CPU)
    x = torch.full((1, 2), float(rank + 1))
    seen = [strategy.exchanged()]
    strategy.set_sync(False)
    model(x).sum().backward()
    seen.append(strategy.exchanged())
    seen.append(strategy.exchanged(other.parameters()))
    seen.append(strategy.exchanged(model.parameters()))
    strategy.set_sync(True)
    model(x).sum().backward()
    seen.append(strategy.exchanged())
    gradient = module[1].bias.grad.item(), module[0].weight.grad.sum().item()
    model.zero_grad()
    module(x).sum().backward()  # past the wrapper: these gradients stay here
    seen.append(strategy.exchanged())
    model.zero_grad()
    seen.append(strategy.exchanged())
    with model.no_sync():
        model(x).sum().backward()
    seen.append(strategy.exchanged())
    gathered = [None] * world
    dist.all_gather_object(gathered, gradient)
    return {"seen": seen, "alike": len(set(gathered)) == 1, "bias": gradient[0]}


def counted_passes(rank: int, world: int) -> list[bool]:
    """Three passes, and a callback that turns the exchange on for the third: was it exchanged after each?"""
    strategy, passes, seen = DdpStrategy(), [0], []
    model = strategy.wrap(nn.Linear(2, 1), CPU)

    def after_forward(module: nn.Module) -> None:
        passes[0] += 1
        strategy.set_sync(passes[0] == 2)

    strategy.on_forward(after_forward)
    strategy.set_sync(False)
    for _ in range(3):
        model(torch.full((1, 2), float(rank + 1))).sum().backward()
        gathered = [None] * world
        dist.all_gather_object(gathered, model.module.weight.grad.tolist())
        seen.append(all(one == gathered[0] for one in gathered))
    return [*seen, strategy.exchanged()]


def tracked_names(module: nn.Module) -> list[str]:
    state = TrackedState()
    state.add({"model": module})
    return [name for name, _ in state.tensors()]


def transparent(rank: int, world: int) -> dict[str, Any]:
    """Names, attributes, copies, forward callbacks."""
    strategy = DdpStrategy()
    heard: list[str] = []
    strategy.on_forward(lambda module: heard.append(type(module).__name__))
    module = net()
    model = strategy.wrap(module, CPU)
    model.temperature = 3.0
    model.note = "mine"
    try:
        model.nonsense  # noqa: B018
        missing = ""
    except AttributeError as error:
        missing = str(error)
    state = model.state_dict()
    fresh = net()
    fresh.load_state_dict(state)
    model.load_state_dict(fresh.state_dict())
    model.load_state_dict({"module." + key: value for key, value in state.items()})
    ema = AveragedModel(model)
    ema.update_parameters(model)
    AveragedModel(ours()(net())).load_state_dict(ema.state_dict())
    model(data(0, rank)).sum().backward()
    ema(data(0, rank))
    model.eval()
    model(data(0, rank))
    frozen = strategy.wrap(nn.Linear(2, 2).requires_grad_(False), CPU)
    try:
        strategy.wrap(nn.Linear(2, 2), CPU, find_unused=True)
        refused = ""
    except UsageError as error:
        refused = str(error)
    return {
        "shout": model.shout("hey"),
        "written": module.temperature,
        "own": hasattr(module, "note"),
        "missing": missing,
        "state": list(state) == list(net().state_dict()),
        "metadata": state._metadata["norm"],
        "parameters": [n for n, _ in model.named_parameters()] == [n for n, _ in module.named_parameters()],
        "buffers": [n for n, _ in model.named_buffers()] == [n for n, _ in module.named_buffers()],
        "ema": sorted(ema.state_dict())[0:2],
        "tracked": tracked_names(model) == tracked_names(net()),
        "tracked ema": tracked_names(ema) == tracked_names(AveragedModel(net())),
        "heard": heard,
        "frozen": type(frozen).__name__,
        "refused": refused,
    }


def fallback(rank: int, world: int) -> dict[str, Any]:
    """One rank's torch cannot rebuild early: all fall back alike, and say so once."""
    if rank == 1:
        works = DataParallel._rebuild_once
        DataParallel._rebuild_once = lambda self: not works(self)
    strategy = DdpStrategy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = strategy.wrap(net(), CPU)
        strategy.wrap(net(), CPU)
    for step in range(3):
        model(data(step, rank)).sum().backward()
    return {
        "finds": model.find_unused_parameters,
        "warnings": sum("find_unused_parameters" in str(one.message) for one in caught),
        "exchanged": strategy.exchanged(),
    }


def main(folder: Path) -> None:
    result: dict[str, Any] = {}
    for world in (3, 4):
        result[f"ours-{world}"] = restart(folder, f"ours-{world}", world, ours())
    result["plain"] = restart(folder, "plain", 3, plain())
    result["view"] = restart(folder, "view", 3, ours(gradient_as_bucket_view=True))
    result["static"] = restart(folder, "static", 3, ours(static_graph=True), use_all=False)
    result["unused"] = restart(folder, "unused", 3, ours(find_unused_parameters=True), use_all=False)
    for job in (untouched, shares, even_hook_is_exact, user_hook, accumulation, counted_passes, transparent, fallback):
        result[job.__name__] = run_ranks(folder, job.__name__, 3, job)
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
