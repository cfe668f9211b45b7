"""`orchestrator doctor`: can a launch work here, and if not, why not?"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict

import click

from orchestrator.cli.output import print_json
from orchestrator.cli.probes import Finding, all_probes
from orchestrator.storage.store import default_storage
from orchestrator.text import human_count

_MARKS = {"ok": "ok", "warning": "warn", "error": "FAIL"}


def examine(probes: list[Callable[[], Finding]]) -> list[Finding]:
    """Run every probe; one that breaks is itself a finding."""
    findings = []
    for probe in probes:
        try:
            findings.append(probe())
        except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
            name = getattr(probe, "__name__", "probe").replace("_", " ")
            findings.append(Finding(name, f"could not be tried ({type(error).__name__}: {error})", "warning"))
    return findings


def _doctor(storage: str | None, as_json: bool) -> int:
    findings = examine(all_probes(storage or default_storage()))
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        print_json({"ok": errors == 0, "findings": [asdict(finding) for finding in findings]})
        return 1 if errors else 0
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        click.echo(f"{_MARKS[finding.level]:<4}  {finding.topic:<{width}}  {finding.text}")
    click.echo(
        f"{human_count(errors, 'thing')} would keep a launch from working" if errors else "a launch can work here"
    )
    return 1 if errors else 0


doctor_command = click.Command(
    "doctor",
    callback=_doctor,
    params=[
        click.Option(["--storage"], metavar="URI", help="Where runs would live.  [./runs]"),
        click.Option(["--json", "as_json"], is_flag=True, help="For machines."),
    ],
    help="Examine this machine: versions, memory, GPUs, kernel abilities, storage. Exit 1 if a launch could not work.",
)
