"""`doctor`, and what only a real process shows: start-up time, exit codes, nothing heavy imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import doctor, machine, probes
from orchestrator.cli.main import cli
from orchestrator.cli.probes import Finding

ROOT = Path(__file__).resolve().parents[3]


def orchestrator(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *words],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_findings_make_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("a", "fine"), Finding("b", "odd", "warning")]
    monkeypatch.setattr(doctor, "all_probes", lambda uri: [lambda f=f: f for f in found])
    result = CliRunner().invoke(cli, ["doctor"])
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        ["ok    a  fine", "warn  b  odd", "a launch can work here"],
    )
    found.append(Finding("c", "broken", "error"))
    assert CliRunner().invoke(cli, ["doctor"]).exit_code == 1
    report = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert (report["ok"], report["findings"][2]) == (False, {"topic": "c", "text": "broken", "level": "error"})


def test_a_probe_that_breaks_is_a_finding() -> None:
    def odd_probe() -> Finding:
        raise OSError("no such thing")

    assert doctor.examine([odd_probe]) == [
        Finding("odd probe", "could not be tried (OSError: no such thing)", "warning")
    ]


def test_storage_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    finding = probes.storage(str(tmp_path / "runs"))
    assert finding.level in ("ok", "warning")
    assert "fsync" in finding.text
    assert list(tmp_path.iterdir()) == []
    assert probes.storage("s3://bucket/x").level == "error"


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("0,1,2,3,4", 4)])
def test_gpus_that_are_visible_count(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setattr(machine.Path, "iterdir", lambda path: iter(range(4)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == count


def test_help_and_errors_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'ray', 'numpy'):\n"
        "            raise RuntimeError('imported ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    for words, code in [(["launch", "--help"], 0), (["launch", "none.py"], 2), (["checkpoint", "list", "x"], 2)]:
        done = orchestrator(*words, cwd=tmp_path, PYTHONPATH=path)
        assert (done.returncode, "imported" in done.stderr) == (code, False), done.stderr


def test_bad_input_of_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    done = orchestrator("launch", "--workers", "2", "bad.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: bad.py:1: SyntaxError: ")
    assert done.stderr.endswith(": `def f(:`; nothing was started\n")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.py"]


def test_a_missing_library_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import json\nimport no_such_library.part\n")
    done = orchestrator("launch", "--workers", "2", "train.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train.py:2 imports no_such_library, which is not installed for ")
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]
