"""Commands whose time has not come: each says so, and what to do instead."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.errors import UsageError


def later(path: str, instead: str) -> click.Command:
    """`orchestrator PATH` (its group, if any, and its name), refusing all it is given. `instead`: what serves now."""

    def refuse(**_: Any) -> int:
        raise UsageError(f"`orchestrator {path}` is not available yet; {instead}")

    return click.Command(
        path.split()[-1],
        callback=refuse,
        params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        help=f"Not available yet; {instead}.",
    )


report_command = later("report", "use `orchestrator status RUN` and `orchestrator events RUN --json`")
submit_command = later("submit", "use `ray job submit -- orchestrator launch …` on the cluster")
attach_command = later("attach", "use `orchestrator events RUN --follow` and `orchestrator logs RUN --follow`")
deploy_command = later("deploy", "take the manifests in deploy/ as they are")
