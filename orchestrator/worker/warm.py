"""What every worker needs sooner or later, imported once in the zygote and touched once in a waiting spare."""

from __future__ import annotations

import orchestrator.worker.faults
import orchestrator.worker.report
import orchestrator.worker.run
import orchestrator.worker.salvage
import orchestrator.worker.tracked  # noqa: F401


def up() -> None:
    """Pay a fork's first-use costs (autograd's threads, copied pages) while waiting, not on the way to the first
    step.
    """
    import torch

    state = torch.random.get_rng_state()
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    torch.nn.functional.cross_entropy(layer(torch.zeros(2, 4)), torch.zeros(2, dtype=torch.long)).backward()
    optimizer.step()
    torch.random.set_rng_state(state)
