"""What `--json` prints: one JSON value on one line, strict even where a metric is NaN."""

from __future__ import annotations

import json
from typing import Any

import click

from orchestrator.ui.jsonlines import plain


def print_json(value: Any) -> None:
    """NaN and infinities are written as their names, since strict readers refuse the bare words."""
    click.echo(json.dumps(plain(value), allow_nan=False))
