"""`orchestrator checkpoint`: list, show, verify, export and prune what a run has committed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from orchestrator import text
from orchestrator.cli.later import later
from orchestrator.cli.output import print_json
from orchestrator.cli.rundir import local_path
from orchestrator.errors import StorageError, SupersededError, UsageError
from orchestrator.spec import Retention
from orchestrator.storage import checkpoints
from orchestrator.storage.checkpoints import RunStore, Verdict
from orchestrator.storage.commitlog import LogEntry, outcome_entry
from orchestrator.storage.layout import Selector, parse_selector
from orchestrator.storage.lock import RunLock
from orchestrator.storage.manifest import CheckpointRecord, Manifest
from orchestrator.storage.prune import PruneReport, prune
from orchestrator.text import human_bytes, human_count, human_seconds

_TENSORS_SHOWN = 200


def _selector(step: str | None) -> Selector | None:
    return None if step is None else parse_selector(step.removeprefix("@"))


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)


def _warn_of_damaged_entries(run: RunStore) -> None:
    for why in run.log.unreadable.values():
        click.echo(f"warning: {why}", err=True)


def _facts(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "step": record.step,
        "epoch": record.epoch,
        "samples": record.samples,
        "reason": record.reason,
        "name": record.name or None,
        "bytes": record.bytes,
        "created": record.created,
        "metrics": dict(record.metrics),
        "path": record.directory,
    }


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as columns, aligned left, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _when(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def _list(run: str, as_json: bool) -> int:
    opened = checkpoints.open_run(run)
    records = checkpoints.list_checkpoints(opened)
    _warn_of_damaged_entries(opened)
    if as_json:
        print_json([_facts(record) for record in records])
        return 0
    if not records:
        click.echo(f"run {opened.address.name} has no checkpoint yet")
        return 0
    rows = [("STEP", "EPOCH", "REASON", "NAME", "SIZE", "SAVED", "METRICS")]
    rows += [_row(record) for record in records]
    click.echo("\n".join(table(rows)))
    return 0


def _row(record: CheckpointRecord) -> tuple[str, str, str, str, str, str, str]:
    metrics = " ".join(f"{name}={value:.4g}" for name, value in record.metrics.items())
    size, saved = human_bytes(record.bytes), _when(record.created)
    return str(record.step), str(record.epoch), record.reason, record.name or "-", size, saved, metrics


def _show(run: str, step: str | None, as_json: bool) -> int:
    opened = checkpoints.open_run(run)
    with _warnings_on_stderr():
        record, manifest = checkpoints.find_sound(opened, _selector(step))
    facts = _manifest_facts(record, manifest)
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(_show_lines(facts)))
    return 0


def _manifest_facts(record: CheckpointRecord, manifest: Manifest) -> dict[str, Any]:
    return {
        **_facts(record),
        "run": manifest.run,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "strategy": manifest.strategy,
        "config": dict(manifest.config),
        "versions": dict(manifest.versions),
        "user": manifest.state.get("user"),
        "files": [{"path": file.path, "bytes": file.bytes, "crc32c": file.crc32c} for file in manifest.files],
        "tensors": {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in manifest.tensors.items()
        },
    }


def _show_lines(facts: dict[str, Any]) -> list[str]:
    tensors, files = facts["tensors"], facts["files"]
    head = [("run", facts["run"]), ("path", facts["path"]), ("step", f"{facts['step']}, epoch {facts['epoch']}")]
    head += [("samples", str(facts["samples"])), ("saved", f"{_when(facts['created'])} ({facts['reason']})")]
    if facts["name"]:
        head.append(("name", facts["name"]))
    head.append(("ranks", f"{facts['world_size']}, attempt {facts['attempt']}, strategy {facts['strategy'] or 'none'}"))
    for label in ("metrics", "user", "versions"):
        if facts[label]:
            head.append((label, json.dumps(facts[label], default=str)))
    head.append(("size", f"{human_bytes(facts['bytes'])} in {human_count(len(files), 'file')}"))
    lines = [f"{label:<9} {value}" for label, value in head]
    rows = [
        (f"  {name}", tensor["dtype"], "x".join(map(str, tensor["shape"])) or "scalar")
        for name, tensor in tensors.items()
    ]
    lines.append(f"{human_count(len(rows), 'tensor')}:")
    lines += table(rows[:_TENSORS_SHOWN]) if rows else []
    if len(rows) > _TENSORS_SHOWN:
        lines.append(f"  … and {len(rows) - _TENSORS_SHOWN} more (--json has all)")
    return lines


def _verify(run: str, step: str | None, as_json: bool) -> int:
    opened = checkpoints.open_run(run)
    begin = time.perf_counter()
    tell: Callable[[Verdict], None] | None = None if as_json else lambda verdict: click.echo(_verdict_line(verdict))
    verdicts = checkpoints.verify(opened, _selector(step), tell)
    _warn_of_damaged_entries(opened)
    seconds = time.perf_counter() - begin
    bad = [verdict for verdict in verdicts if not verdict.ok]
    if as_json:
        results = [
            {**_facts(verdict.record), "ok": verdict.ok, "why": verdict.why or None, "bytes_read": verdict.bytes_read}
            for verdict in verdicts
        ]
        print_json({"ok": not bad, "checkpoints": results})
    elif bad:
        click.echo(f"error: {human_count(len(bad), 'checkpoint')} of {len(verdicts)} damaged: {bad[0].why}", err=True)
    else:
        read = human_bytes(sum(verdict.bytes_read for verdict in verdicts))
        click.echo(f"{human_count(len(verdicts), 'checkpoint')} sound ({read} read in {human_seconds(seconds)})")
    return 1 if bad else 0


def _verdict_line(verdict: Verdict) -> str:
    if verdict.ok:
        return f"ok       step {verdict.record.step}  {human_bytes(verdict.bytes_read)}"
    return f"DAMAGED  step {verdict.record.step}  {verdict.why}"


def _export(run: str, step: str | None, file_format: str, output: str, as_json: bool) -> int:
    opened = checkpoints.open_run(run)
    with _warnings_on_stderr():
        manifest = checkpoints.export(opened, _selector(step), file_format, output)
    size = Path(output).stat().st_size
    if as_json:
        facts = {"output": output, "format": file_format, "step": manifest.step, "bytes": size}
        print_json({**facts, "tensors": len(manifest.tensors)})
        return 0
    count = human_count(len(manifest.tensors), "tensor")
    click.echo(f"step {manifest.step} of {manifest.run}: {count}, {human_bytes(size)}, in {output}")
    return 0


def _prune(run: str, dry_run: bool, as_json: bool, **asked: str | None) -> int:
    retention = _retention(asked)
    opened = checkpoints.open_run(run)
    if dry_run:
        return _tell_pruned(prune(opened.log, retention, dry_run=True), True, as_json)
    with RunLock(local_path(opened.address.uri)):
        ended = opened.log.outcome()
        opened.log.take_over()
        try:
            report = prune(opened.log, retention)
        except SupersededError:
            raise  # the log is another driver's now
        except BaseException:
            with suppress(StorageError):
                _end_again(opened, ended)
            raise
        _end_again(opened, ended)
    return _tell_pruned(report, False, as_json)


def _end_again(run: RunStore, ended: LogEntry | None) -> None:
    """The takeover ended the word on how the run ended; nothing about that has changed."""
    if ended is not None:
        run.log.append(outcome_entry(**ended.body))


def _retention(asked: dict[str, str | None]) -> Retention:
    if all(value is None for value in asked.values()):
        raise UsageError("checkpoint prune needs a rule of what to keep, such as --keep-last 3")
    last, every = asked["keep_last"], asked["keep_every"]
    best, size = asked["keep_best"], asked["keep_bytes"]
    return Retention(
        1 if last is None else _read("--keep-last", last, lambda value: text.parse_count(value, 1)),
        None if every is None else _read("--keep-every", every, text.parse_keep_every),
        None if best is None else _read("--keep-best", best, text.parse_keep_best),
        None if size is None else _read("--keep-bytes", size, text.parse_size),
    )


def _read(option: str, value: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(value)
    except UsageError as error:
        raise UsageError(f"{option} {value}: {error}") from None


def _tell_pruned(report: PruneReport, dry_run: bool, as_json: bool) -> int:
    if as_json:
        plan = [{**_facts(record), "kept_by": list(kept_by)} for record, kept_by in report.plan]
        print_json({"dry_run": dry_run, "freed_bytes": report.freed_bytes, "plan": plan})
        return 0
    for record, kept_by in report.plan:
        what = f"keep    step {record.step}  ({', '.join(kept_by)})" if kept_by else f"remove  step {record.step}"
        click.echo(what)
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{human_count(len(report.removed), 'checkpoint')} {verb}, {human_bytes(report.freed_bytes)}")
    return 0


_RUN = click.Argument(["run"], metavar="RUN")
_JSON = click.Option(["--json", "as_json"], is_flag=True, help="For machines.")
_STEP = click.Option(["--step"], metavar="N|last|best|NAME", help="Which one; or write RUN@STEP.")


def _command(
    name: str, callback: Callable[..., int], options: Sequence[click.Parameter], help_text: str
) -> click.Command:
    return click.Command(name, callback=callback, params=[_RUN, *options, _JSON], help=help_text)


checkpoint_group = click.Group(
    "checkpoint",
    no_args_is_help=True,
    help="What a run has committed. RUN is STORAGE/NAME, or NAME below the default storage.",
    commands=[
        _command("list", _list, [], "Every committed checkpoint, oldest first."),
        _command("show", _show, [_STEP], "One checkpoint: step, configuration, tensors."),
        _command("verify", _verify, [_STEP], "Re-read every byte; exit 1 naming the first bad file."),
        _command(
            "export",
            _export,
            [
                _STEP,
                click.Option(
                    ["--format", "file_format"],
                    type=click.Choice(checkpoints.FORMATS),
                    default="safetensors",
                    help="[safetensors]",
                ),
                click.Option(["--output", "-o"], required=True, metavar="FILE", help="Where to write it."),
            ],
            "Write one checkpoint as one file.",
        ),
        _command(
            "prune",
            _prune,
            [
                click.Option(["--keep-last"], metavar="N", help="Keep the newest N.  [1]"),
                click.Option(["--keep-every"], metavar="SPEC", help="Keep one every so many steps, epochs, seconds."),
                click.Option(["--keep-best"], metavar="K:METRIC[:min|max]", help="Keep the K best."),
                click.Option(["--keep-bytes"], metavar="SIZE", help="Keep the newest up to this size in all."),
                click.Option(["--dry-run"], is_flag=True, help="Only say what would go."),
            ],
            "Remove what no rule keeps; named and final ones stay. Not while the run is live.",
        ),
        later("checkpoint import", "load the file in the script and `run.track` what it held"),
        later("checkpoint fork", "copy the run's directory under a new name while it is not live"),
    ],
)
