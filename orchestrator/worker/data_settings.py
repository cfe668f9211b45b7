"""What `run.batches` was given, brought to one form, whether it came as arguments or as a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from orchestrator.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """One data loop. `batch_size`: samples per optimizer step over all ranks; None: an iterable of ready batches."""

    source: Any  # a map-style dataset, or an iterable
    mapped: bool
    batch_size: int | None
    epochs: int | None
    max_steps: int | None
    shuffle: bool
    seed: int
    drop_last: bool
    accumulate: int
    train: bool
    first_epoch: int = 0
    sampler: Any = None  # whose own order counts, drawn once an epoch
    collate_fn: Callable[[Any], Any] | None = None
    num_workers: int = 0
    pin_memory: bool | None = None  # None: where it helps
    loader_options: tuple[tuple[str, Any], ...] = ()  # passed on to torch's DataLoader as they are


def settle(
    source: Any,
    *,
    batch_size: int | None,
    epochs: int | None,
    max_steps: int | None,
    shuffle: bool | None,
    seed: int,
    drop_last: bool | None,
    num_workers: int,
    collate_fn: Callable[[Any], Any] | None,
    accumulate: int,
    train: bool,
    first_epoch: int,
) -> Settings:
    """Check the arguments of `run.batches` and take a DataLoader apart. Raises UsageError, naming the argument."""
    _check_count("batch_size", batch_size, optional=True)
    _check_count("epochs", epochs, optional=True, least=0)
    _check_count("max_steps", max_steps, optional=True, least=0)
    _check_count("accumulate", accumulate)
    _check_count("num_workers", num_workers, least=0)
    if epochs is None and max_steps is None:
        raise UsageError("run.batches needs an end: pass `epochs` or `max_steps`.")
    settings = Settings(
        source=source,
        mapped=False,
        batch_size=batch_size,
        epochs=epochs,
        max_steps=max_steps,
        shuffle=train if shuffle is None else bool(shuffle),
        seed=seed,
        drop_last=(train if drop_last is None else bool(drop_last)) and train,
        accumulate=accumulate if train else 1,
        train=train,
        first_epoch=first_epoch,
        collate_fn=collate_fn,
        num_workers=num_workers,
    )
    # StatefulDataLoader over an iterable keeps its own place; over a dataset it is a DataLoader like any other.
    if isinstance(source, DataLoader) and not (_stateful(source) and isinstance(source.dataset, IterableDataset)):
        settings = _from_loader(settings, source)
    return _classify(settings)


def _check_count(name: str, value: Any, optional: bool = False, least: int = 1) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise UsageError(f"run.batches({name}={value!r}): pass a whole number of at least {least}.")


def _stateful(source: Any) -> bool:
    return all(callable(getattr(source, name, None)) for name in ("state_dict", "load_state_dict"))


def _classify(settings: Settings) -> Settings:
    source = settings.source
    kind = type(source).__name__
    if isinstance(source, IterableDataset) or not _indexable(source):
        return _iterable(settings, kind)
    if isinstance(source, (str, bytes, Mapping)):
        raise UsageError(f"run.batches cannot read samples from a {kind}; pass a dataset, a DataLoader or a list.")
    if settings.batch_size is None:
        raise UsageError(f"run.batches({kind}) needs `batch_size`: samples per optimizer step over all ranks.")
    return replace(settings, mapped=True)


def _indexable(source: Any) -> bool:
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _iterable(settings: Settings, kind: str) -> Settings:
    source = settings.source
    if not hasattr(source, "__iter__"):
        missing = " (it has no `__len__`)" if hasattr(source, "__getitem__") else ""
        raise UsageError(
            f"run.batches cannot read from {kind}{missing}; pass a dataset with `__len__` and `__getitem__`, "
            "a DataLoader, or an iterable with `state_dict` and `load_state_dict`."
        )
    if settings.train and not _stateful(source):
        raise UsageError(
            f"{kind} is an iterable without `state_dict` and `load_state_dict`, so training could not resume at the "
            "exact sample; add both methods (what it has read so far, and going back there), or pass a dataset with "
            "`__len__` and `__getitem__`. For loops without a dataset use `run.steps(total)`."
        )
    if settings.num_workers:
        raise UsageError(
            f"run.batches(num_workers={settings.num_workers}): an iterable is read in the training process, where its "
            "`state_dict` can be asked for; use 0, or pass torchdata's StatefulDataLoader, which has its own processes."
        )
    if settings.batch_size is None and settings.collate_fn is not None:
        raise UsageError(f"`collate_fn` needs `batch_size`: without it {kind} is expected to yield ready batches.")
    return settings


def _from_loader(settings: Settings, loader: DataLoader[Any]) -> Settings:
    own_batches = loader.batch_size is None and loader.batch_sampler is not None
    if own_batches:
        raise UsageError(
            f"The DataLoader has a batch_sampler of its own ({type(loader.batch_sampler).__name__}), whose batches "
            "cannot be shared out among ranks; give it `batch_size=` and a `sampler=`, or pass the dataset itself."
        )
    size = _global_size(loader)
    if settings.batch_size is not None and size not in (None, settings.batch_size):
        raise UsageError(
            f"run.batches(batch_size={settings.batch_size}) contradicts the DataLoader, whose batch is {size} over all "
            "ranks; drop one of the two."
        )
    settings = replace(
        settings,
        source=loader.dataset,
        batch_size=settings.batch_size or size,
        drop_last=bool(loader.drop_last) and settings.train,
        collate_fn=settings.collate_fn or _own_collate(loader),
        num_workers=settings.num_workers or loader.num_workers,
        pin_memory=bool(loader.pin_memory),
        loader_options=_loader_options(loader),
    )
    if isinstance(loader.dataset, IterableDataset):
        return settings
    return _with_sampler(settings, loader.sampler)


def _global_size(loader: DataLoader[Any]) -> int | None:
    """A DistributedSampler's loader counts its own rank's samples, any other all of them."""
    if loader.batch_size is None or not isinstance(loader.sampler, DistributedSampler):
        return loader.batch_size
    return loader.batch_size * loader.sampler.num_replicas


def _own_collate(loader: DataLoader[Any]) -> Callable[[Any], Any] | None:
    standard = loader.collate_fn in (default_collate, default_convert)
    return None if standard else loader.collate_fn


def _loader_options(loader: DataLoader[Any]) -> tuple[tuple[str, Any], ...]:
    # Not persistent_workers: one stream runs through all epochs, so its processes live as long as the loop anyway.
    names = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
    return tuple((name, getattr(loader, name)) for name in names) if loader.num_workers else ()


def _with_sampler(settings: Settings, sampler: Any) -> Settings:
    """The samplers we can replace become a shuffle flag; all others keep their own order."""
    whole = isinstance(sampler, DistributedSampler) or (
        isinstance(sampler, (RandomSampler, SequentialSampler)) and len(sampler) == len(settings.source)
    )
    if not whole or getattr(sampler, "replacement", False):
        return replace(settings, sampler=sampler)
    return replace(settings, shuffle=getattr(sampler, "shuffle", isinstance(sampler, RandomSampler)))
