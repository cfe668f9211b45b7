"""Counter-based randomness: every generator is a function of where the run is, never of how it got there.

So a rank that dies takes no generator state along: whoever replaces it computes the same seeds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """A bijection of 64-bit words in which every input bit moves every output bit (splitmix64, Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def derive(seed: int, *parts: int | str) -> int:
    """A 64-bit seed for the stream named by `parts`: the same on every machine, Python and release.

    Different (seed, parts) give unrelated values; `1` and `"1"` differ, and so do `("ab",)` and `("a", "b")`.
    """
    text = repr((int(seed), *(part if isinstance(part, str) else int(part) for part in parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=64)
def _stream(seed: int, loop_key: str, rank: int) -> int:
    return derive(seed, "step", loop_key, rank)


def step_seed(seed: int, loop_key: str, index: int, rank: int) -> int:
    """The 64-bit seed of step `index` of loop `loop_key` on `rank`."""
    return mix64(_stream(seed, loop_key, rank) + index * _GOLDEN & _MASK)


def seed_step(seed: int, loop_key: str, index: int, rank: int) -> None:
    """Reseed torch (CPU, and CUDA where it is in use), numpy and random for one step. About 8 µs on CPU."""
    seed_all(step_seed(seed, loop_key, index, rank))


def seed_all(value: int, cuda: bool = True) -> None:
    """Seed this process's global generators from one 64-bit value.

    torch.manual_seed is avoided on purpose: it also visits every accelerator back end, 75 µs a call.
    numpy gets other bits than torch, because both expand 32 bits into the same Mersenne twister.
    """
    torch.default_generator.manual_seed(value)
    np.random.seed(value >> 32)
    random.seed(value)
    for generator in _cuda_generators() if cuda else ():
        generator.manual_seed(value)


def _cuda_generators() -> tuple[torch.Generator, ...]:
    """None before CUDA is in use: asking would initialise it."""
    return torch.cuda.default_generators if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def guard(cuda: bool = True) -> Iterator[None]:
    """Whatever happens inside, the global generators continue afterwards as if it had not. About 80 µs."""
    restore = capture(cuda)
    try:
        yield
    finally:
        restore()


def capture(cuda: bool = True) -> Callable[[], None]:
    """A function that puts all global generators back into the state they have now; it can be called repeatedly."""
    torch_state, numpy_state, random_state = (
        torch.default_generator.get_state(),
        np.random.get_state(legacy=False),
        random.getstate(),
    )
    cuda_states = [(generator, generator.get_state()) for generator in (_cuda_generators() if cuda else ())]

    def restore() -> None:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(random_state)
        for generator, state in cuda_states:
            generator.set_state(state)

    return restore
