"""Which sample comes when, and which rank reads it: functions of (seed, epoch, position), never of history.

No state to save, nothing to skip on resume, and the sequence of global batches is the same at any world size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.errors import UsageError

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 8
# Up to here a table is exactly uniform and faster; a Feistel network on so few values is neither.
_TABLE_MAX = 4096
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(words: _Words) -> _Words:
    """splitmix64's finaliser on a whole array (the array is overwritten)."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _keys(seed: int, epoch: int, count: int) -> list[int]:
    """`count` round keys: a chain of mixed words, so that neighbouring seeds and epochs share none."""
    start = np.array([seed & _MASK], dtype=np.uint64)
    state = int(_mix(start)[0]) ^ (epoch * _GOLDEN & _MASK)
    words = np.array([(state + (i + 1) * _GOLDEN) & _MASK for i in range(count)], dtype=np.uint64)
    return [int(word) for word in _mix(_mix(words))]


class Permutation:
    """A keyed bijection on [0, n): sample = permutation(seed, epoch)(position). O(1) memory, any position at once.

    A generalised Feistel network over [0, a) x [0, b) with a * b just above n (Black & Rogaway, "Ciphers with
    arbitrary finite domains", 2002), walked along its cycle until inside [0, n). `shuffle=False`: the identity.
    """

    def __init__(self, n: int, seed: int, epoch: int, shuffle: bool = True) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        self._shuffle = shuffle and n > 1
        self._keys = _keys(seed, epoch, _ROUNDS)
        self._a = max(1, math.isqrt(n - 1) + 1) if n > 1 else 1
        self._b = -(-n // self._a)
        self._table = self._build_table() if self._shuffle and n <= _TABLE_MAX else None

    def take(self, positions: npt.ArrayLike) -> Indices:
        """The samples at `positions` (any shape, values in [0, n)); the same shape, int64.

        Raises IndexError for a position outside of [0, n).
        """
        where = np.asarray(positions, dtype=np.int64)
        if where.size and (int(where.min()) < 0 or int(where.max()) >= self.n):
            raise IndexError(f"positions must lie in [0, {self.n})")
        if not self._shuffle:
            return np.array(where, dtype=np.int64)
        if self._table is not None:
            return self._table[where]
        walked: Indices = self._walk(where.ravel().astype(np.uint64)).astype(np.int64)
        return walked.reshape(where.shape)

    def _build_table(self) -> Indices:
        words = np.arange(self.n, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._keys[0])
        return np.asarray(np.argsort(_mix(_mix(words) ^ np.uint64(self._keys[1])), kind="stable"), dtype=np.int64)

    def _walk(self, values: _Words) -> _Words:
        values = self._encrypt(values)
        outside = np.flatnonzero(values >= self.n)
        while outside.size:  # a * b exceeds n by less than a: one value in about sqrt(n) walks on
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.n]
        return values

    def _encrypt(self, values: _Words) -> _Words:
        size_left, size_right = np.uint64(self._a), np.uint64(self._b)
        left, right = values // size_right, values % size_right
        for key in self._keys:  # an even number of rounds: the halves end with the sizes they began with
            moved = (left + _mix(right ^ np.uint64(key)) % size_left) % size_left
            left, right = right, moved
            size_left, size_right = size_right, size_left
        joined: _Words = left * size_right + right
        return joined


@dataclass(frozen=True)
class Split:
    """How the samples of one global batch are dealt out: rank r reads [offsets[r], offsets[r] + counts[r])."""

    counts: tuple[int, ...]
    offsets: tuple[int, ...]


def split(batch_size: int, world_size: int, accumulate: int = 1, loads: Sequence[float] | None = None) -> Split:
    """Contiguous shares, as even as possible (or as near to `loads` as possible), each a multiple of `accumulate`.

    Shares in multiples of `accumulate` make every rank's microbatches equally large; ranks then differ by at most
    `accumulate` samples, and gradients are weighted by `counts[r] / batch_size`. A share can be 0 if there are fewer
    samples than ranks. Raises ValueError if `accumulate` does not divide `batch_size`: see `check_batch` for users.
    """
    units, rest = divmod(batch_size, accumulate)
    if rest:
        raise ValueError(f"{accumulate} microbatches cannot share {batch_size} samples equally")
    shares = _even(units, world_size) if loads is None else _by_load(units, world_size, loads)
    counts = tuple(share * accumulate for share in shares)
    offsets = tuple(sum(counts[:rank]) for rank in range(world_size))
    return Split(counts, offsets)


def _even(units: int, world_size: int) -> list[int]:
    base, rest = divmod(units, world_size)
    return [base + (rank < rest) for rank in range(world_size)]


def _by_load(units: int, world_size: int, loads: Sequence[float]) -> list[int]:
    """Largest remainders; afterwards nobody is left with nothing while there is one unit for everybody."""
    if len(loads) != world_size or min(loads) <= 0:
        raise ValueError(f"{world_size} ranks need {world_size} positive loads, not {list(loads)}")
    exact = [units * load / sum(loads) for load in loads]
    shares = [math.floor(share) for share in exact]
    for rank in sorted(range(world_size), key=lambda r: (shares[r] - exact[r], r))[: units - sum(shares)]:
        shares[rank] += 1
    while units >= world_size and 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def batches_per_epoch(n: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps in one pass over `n` samples."""
    return n // batch_size if drop_last else -(-n // batch_size)


def check_batch(n: int | None, batch_size: int, world_size: int, accumulate: int, drop_last: bool) -> None:
    """Refuse what cannot train, saying what would. `n`: samples of the dataset, None if unknown. Raises UsageError."""
    if n == 0:
        raise UsageError("The dataset is empty (its length is 0), so nothing would train; check where its data are.")
    if batch_size % accumulate:
        raise UsageError(
            f"batch_size={batch_size} cannot be split into accumulate={accumulate} equal microbatches; "
            f"pass {_near(batch_size, world_size * accumulate)} instead."
        )
    if batch_size < world_size * accumulate:
        parts = f" in {accumulate} microbatches" if accumulate > 1 else ""
        raise UsageError(
            f"batch_size={batch_size} counts samples over all ranks and leaves nothing for some of {world_size} "
            f"ranks{parts}; pass at least batch_size={world_size * accumulate} or start fewer workers."
        )
    if n is None:
        return
    if drop_last and n < batch_size:
        raise UsageError(
            f"{n} samples make no full batch of {batch_size}, so nothing would train; "
            "lower `batch_size` or pass `drop_last=False`."
        )
    rest = n % batch_size
    if not drop_last and rest % accumulate:
        raise UsageError(
            f"The last batch of each epoch has {rest} samples ({n} = {n // batch_size} x {batch_size} + {rest}), which "
            f"accumulate={accumulate} microbatches cannot share equally; pass `drop_last=True` or another batch_size."
        )


def _near(batch_size: int, unit: int) -> str:
    """The multiples of `unit` on both sides of a batch size that does not fit."""
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    return f"batch_size={below} or {above}" if below else f"batch_size={above}"


def batch_text(batch_size: int, world_size: int, accumulate: int = 1) -> str:
    """The global batch as a product: `64 = 2 ranks x 32`, `64 = 2 ranks x 4 microbatches x 8`, `10 = 4 + 3 + 3`."""
    counts = split(batch_size, world_size, accumulate).counts
    micro = f" x {accumulate} microbatches" if accumulate > 1 else ""
    if counts[0] == counts[-1]:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        return f"{batch_size} = {ranks}{micro} x {counts[0] // accumulate}"
    if micro or world_size > 8:
        return f"{batch_size} = {world_size} ranks{micro} x {counts[-1] // accumulate} or {counts[0] // accumulate}"
    return f"{batch_size} = " + " + ".join(map(str, counts))
