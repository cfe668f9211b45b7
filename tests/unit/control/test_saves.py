"""The order of commits of one step."""

from __future__ import annotations

from orchestrator.control.events import Committed, SaveStaged, ShardPersisted
from orchestrator.control.saves import SaveBook


def whole(book: SaveBook, step: int, reason: str) -> None:
    """A save of one share, staged and in storage."""
    book.stage(SaveStaged(1, 0, step, 1, reason), 0.0)
    book.shard(ShardPersisted(1, step, 0, 1, reason, {}), 0.0)


def test_final_is_the_last_of_its_step() -> None:
    book = SaveBook(600.0, None)
    whole(book, 60, "periodic")
    whole(book, 60, "final")
    first = book.next_commit(0.0)
    assert first is not None and first.reason == "periodic"
    book.committed(Committed(1, 60, ok=True, reason="periodic"))
    second = book.next_commit(0.0)
    assert second is not None and second.reason == "final"
    book.committed(Committed(1, 60, ok=True, reason="final"))
    assert not book.pending and not book.lost


def test_a_step_that_is_committed_needs_no_periodic_checkpoint_any_more() -> None:
    book = SaveBook(600.0, None)
    book.stage(SaveStaged(1, 0, 60, 1, "periodic"), 0.0)
    whole(book, 60, "final")
    commit = book.next_commit(0.0)
    assert commit is not None and commit.reason == "final"
    book.committed(Committed(1, 60, ok=True, reason="final"))
    book.shard(ShardPersisted(1, 60, 0, 1, "periodic", {}), 0.0)
    assert book.next_commit(0.0) is None and not book.pending and not book.lost
