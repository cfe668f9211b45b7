"""How a loop tells being left by `break` or `return` from being unwound by an exception."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from orchestrator.worker.loops import closed_by_break

seen: list[bool] = []


def _inner() -> Iterator[int]:
    try:
        yield from range(5)
    except GeneratorExit:
        seen.append(closed_by_break(sys._getframe().f_back))
        raise


def _loop() -> Iterator[int]:
    yield from _inner()


def _wrapped(source: Iterator[int]) -> Iterator[int]:
    yield from source


def _tqdm_like(source: Iterator[int]) -> Iterator[int]:
    for item in source:  # noqa: UP028 - as tqdm does it
        yield item


def _break() -> None:
    for _ in _loop():
        break


def _return() -> int:
    for item in _loop():
        return item
    return -1


def _break_through_wrappers() -> None:
    for _ in enumerate(_tqdm_like(_wrapped(_loop()))):
        break


def _break_in_try() -> None:
    for _ in _tqdm_like(_loop()):
        try:
            break
        finally:
            seen.clear()


def _exception() -> None:
    for _ in _loop():
        int("x")


def _exception_in_with() -> None:
    for _ in enumerate(_tqdm_like(_loop())):
        with open("/dev/null"):
            raise KeyError(1)


def _exception_from_exception() -> None:
    for _ in _wrapped(_loop()):
        try:
            int("x")
        except ValueError as error:
            raise RuntimeError("again") from error


@pytest.mark.parametrize(
    ("leave", "expected"),
    [
        (_break, True),
        (_return, True),
        (_break_through_wrappers, True),
        (_break_in_try, True),
        (_exception, False),
        (_exception_in_with, False),
        (_exception_from_exception, False),
    ],
)
def test_leaving(leave: Callable[[], object], expected: bool) -> None:
    seen.clear()
    try:
        leave()
    except (ValueError, KeyError, RuntimeError):
        assert not expected
    assert seen == [expected]
