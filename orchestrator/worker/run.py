"""`run`: the user's handle on the group. Five lines: init → prepare → optimizer → track → batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from orchestrator import strategies
from orchestrator.errors import ConfigRefusedError, UsageError
from orchestrator.worker import context as context_module
from orchestrator.worker import rng
from orchestrator.worker.context import WorkerContext
from orchestrator.worker.crossing import Crossing
from orchestrator.worker.data import make_loop
from orchestrator.worker.group import Group, join
from orchestrator.worker.loops import LoopRecord, StepsSource, TrainingLoop, closed_by_break
from orchestrator.worker.metrics import Metrics
from orchestrator.worker.restore import Source, open_source
from orchestrator.worker.saving import PlainSaver
from orchestrator.worker.validation import Validation

ACTIVE: Run | None = None

_UNSEEDED = torch.default_generator.initial_seed()  # known only where this is imported before the script runs
_SCRIPT_SEEDS = 1 << 32  # torch itself starts from 64 random bits, people from a number they can type


def init() -> Run:
    """Join the group (or be a group of one under plain Python) and restore `run.state`. Safe to repeat: same object.

    Before it returns all ranks share one seed: `--seed`, else rank 0's `torch.initial_seed()` if the script has set
    one, else 0; a run keeps its seed.
    """
    global ACTIVE
    if ACTIVE is None:
        ACTIVE = Run()
        if ACTIVE.context is None and ACTIVE.world_size > 1:
            from orchestrator.worker.plain_end import GroupEnd

            GroupEnd(ACTIVE).install()
        if isinstance(ACTIVE.saver, PlainSaver):
            from orchestrator.worker.plain_end import ScriptEnd

            ScriptEnd(ACTIVE, ACTIVE.saver).install()
    return ACTIVE


class Run(Crossing):
    """One rank's view of the run. Made by `init`."""

    def __init__(self) -> None:
        context = context_module.CURRENT
        group = join()
        if context is not None:
            context.mark("connect")
        options, source = _launched(context) if context is not None else _plain(group)
        super().__init__(context, group, options, source)
        self.seed = self._settle_seed(options.get("seed"))
        rng.seed_all(rng.derive(self.seed, "init"))
        self._strategy, _ = strategies.choose(options.get("strategy", "auto"), group.world_size)
        self._strategy.on_forward(self._after_forward)
        self.metrics = Metrics(group)
        self._opened_epochs: set[str] = set()

    # -- who and where --------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's rank, 0 … world_size - 1."""
        return self.group.rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its node."""
        return self.group.local_rank

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.group.world_size

    @property
    def device(self) -> torch.device:
        """Where this rank computes, and where batches arrive."""
        return self.group.device

    @property
    def attempt(self) -> int:
        """Which group of this run this is, from 1; 0 outside the launcher."""
        return self.context.attempt if self.context is not None else 0

    @property
    def name(self) -> str:
        """The run's name."""
        return self.context.run_name if self.context is not None else str(self.options["run_name"])

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def _settle_seed(self, asked: int | None) -> int:
        if self.source is not None:
            kept = int(self.source.head["seed"])
            if asked is not None and asked != kept:
                raise ConfigRefusedError(
                    f"This run was started with seed {kept}; `--seed {asked}` would make it another run. Leave "
                    "`--seed` out, "
                    "or start anew with `--run-name`."
                )
            return kept
        own = asked if asked is not None else _seed_of_script()
        return int(self.group.share("seed", str(own)))

    # -- what is trained ------------------------------------------------------------------------------------------

    def prepare(self, module: nn.Module, **options: Any) -> nn.Module:
        """Move `module` to `run.device` and spread it over the ranks. Before the optimizer is built.

        `options` go to DistributedDataParallel. The module's own attributes stay reachable on what is returned.
        """
        return self._strategy.wrap(module, self.device, **options)

    def track(self, *, per_rank: Sequence[str] = (), **named: Any) -> None:
        """Say what a checkpoint holds, and restore it right here if the run has one.

        Modules, optimizers, anything with `state_dict`/`load_state_dict`, tensors, arrays, generators. `per_rank` names
        what differs between ranks; all else must be the same on every rank. Raises UsageError for state that is neither
        tensors nor JSON and for an optimizer of parameters that are not tracked; ConfigRefusedError for a checkpoint of
        another model, naming what differs.
        """
        self._track(named, per_rank)
        for value in named.values():
            if isinstance(value, nn.Module) and hasattr(value, "_orig_mod"):
                self._strategy.on_forward(self._after_forward, also=value)

    @property
    def last_microbatch(self) -> bool:
        """Whether the microbatch at hand is the last of its step: then gradients are exchanged, and the optimizer may
        step.
        """
        return self._item is None or self._item.last_micro

    def share_buffers(self) -> None:
        """Give every rank rank 0's module buffers (running statistics). Every rank must call it."""
        self._strategy.share_buffers()

    # -- loops ----------------------------------------------------------------------------------------------------

    def batches(
        self,
        source: Any,
        batch_size: int | None = None,
        epochs: int | None = None,
        max_steps: int | None = None,
        shuffle: bool | None = None,
        seed: int | None = None,
        drop_last: bool | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        accumulate: int = 1,
        train: bool = True,
        name: str | None = None,
    ) -> TrainingLoop | Validation:
        """Iterate over this rank's share of every global batch, on `run.device`; resumes at the exact sample.

        `batch_size` counts samples per optimizer step over all ranks and microbatches. `accumulate=k` yields k
        microbatches a step and exchanges gradients on the last (`run.last_microbatch`); divide the loss by k as usual.
        `epochs` is 1 unless `max_steps` alone ends the loop. `train=False`: this rank's share of a validation set,
        each sample once, counts no steps; every rank must enter it. A second training loop in one script needs a
        `name`.
        """
        if epochs is None and max_steps is None:
            epochs = 1
        settings: dict[str, Any] = {
            "batch_size": batch_size,
            "max_steps": max_steps,
            "shuffle": shuffle,
            "seed": self.seed if seed is None else seed,
            "drop_last": drop_last,
            "num_workers": num_workers,
            "collate_fn": collate_fn,
            "accumulate": accumulate,
            "train": train,
            "rank": self.rank,
            "world_size": self.world_size,
            "device": self.device,
        }
        if not train:
            return Validation(self, make_loop(source, epochs=epochs or 1, **settings))
        key, record = self.book.open(name, "run.batches")
        loop = make_loop(source, epochs=epochs, first_epoch=max(0, record.outer), **settings)
        return TrainingLoop(self, key, record, loop)

    def steps(self, total: int, accumulate: int = 1, name: str | None = None) -> TrainingLoop:
        """0 … total - 1, for loops without a dataset. With `accumulate=k` the body runs k forward and backward passes a
        step, and gradients are exchanged on the last.
        """
        if total < 0 or accumulate < 1:
            raise UsageError(
                f"run.steps(total={total}, accumulate={accumulate}): total >= 0 and accumulate >= 1 are needed."
            )
        key, record = self.book.open(name, "run.steps")
        return TrainingLoop(self, key, record, StepsSource(total), accumulate)

    def epochs(self, total: int, name: str = "epochs") -> Iterator[int]:
        """0 … total - 1 around `batches`: what follows the inner loop takes effect exactly once per epoch."""
        if name in self._opened_epochs:
            raise UsageError(f"Second `run.epochs` of one name; pass another `name=` than {name!r}.")
        self._opened_epochs.add(name)
        return self._epochs(total, f"epochs:{name}")

    def _epochs(self, total: int, key: str) -> Iterator[int]:
        record = self.book.records.setdefault(key, LoopRecord())
        while record.index < total and record.done in ("", "end") and not self._finished_before(record.index):
            epoch = record.index
            self.epoch = self.book.outer_epoch = epoch
            self.book.outer_total = total
            before = set(self.book.opened)
            self.reruns.mark()
            try:
                yield epoch
            except GeneratorExit:
                self.book.outer_epoch = -1
                if closed_by_break(sys._getframe().f_back):
                    record.done = "break"
                raise
            self.book.opened = before
            self.book.outer_epoch = -1
            record.index += 1
            if self.finishing:
                record.done = "finish"
        record.done = record.done or "end"

    def _finished_before(self, epoch: int) -> bool:
        """Whether the run was told to finish; the epoch in which it was still has its rest to do."""
        return self.finishing and not any(r.outer == epoch and r.restored for r in self.book.records.values())

    # -- numbers --------------------------------------------------------------------------------------------------

    def log(self, **metrics: Any) -> None:
        """Report numbers (or one-element tensors); the console and checkpoints get their mean over ranks. Never
        waits.
        """
        self.metrics.log(metrics)

    def mean(self, value: Any, weight: float = 1.0) -> float:
        """The weighted mean over ranks, the same float on every rank. Every rank must call it; waits for all."""
        return self.metrics.mean(value, weight)

    def save(self, name: str | None = None) -> None:
        """Ask for a checkpoint at the next resume point. Named ones are kept, and addressed RUN@name."""
        self.request_save(name or "")

    def finish(self, reason: str = "") -> None:
        """This rank's wish to end: all ranks leave the loop at the same step, and the run completes."""
        self.finish_reason = reason or "run.finish() was called"


def _launched(context: WorkerContext) -> tuple[dict[str, Any], Source | None]:
    return context.options, open_source(context.resume, context.segments)


def _plain(group: Group) -> tuple[dict[str, Any], Source | None]:
    """Outside the launcher: environment variables only, and nothing is stored unless ORCHESTRATOR_STORAGE is set."""
    from orchestrator.worker import plain

    settings = plain.options(os.environ)
    if not settings["storage"]:
        return settings, None
    place = plain.Place.open(settings, group)
    return {**settings, "place": place, "run_name": place.name}, place.source


def _seed_of_script() -> int:
    """The seed that the script gave torch, 0 if it gave none."""
    seed = torch.initial_seed()
    unset = seed == _UNSEEDED and seed >= _SCRIPT_SEEDS
    return 0 if unset else seed


__all__ = ["ACTIVE", "Group", "Run", "init"]
