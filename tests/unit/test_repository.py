"""The repository around the code: links, packaging, commands of the README, what continuous integration runs."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reading pyproject.toml on Python 3.10 needs tomli")

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=;~! ]", requirement)[0].lower()


@pytest.mark.parametrize("name", ["storage", "strategies"])
def test_the_doors_at_the_top_level_are_relative_links_into_the_package(name: str) -> None:
    assert os.readlink(ROOT / name) == f"orchestrator/{name}"
    assert (ROOT / name / "__init__.py").is_file()


def test_only_the_real_package_is_packaged() -> None:
    find = project()["tool"]["setuptools"]["packages"]["find"]
    assert find == {"include": ["orchestrator", "orchestrator.*"], "namespaces": False}


def test_every_folder_of_the_package_is_importable_without_namespace_packages() -> None:
    folders = {path.parent for path in (ROOT / "orchestrator").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_constraints_pin_every_direct_dependency_and_no_range_forbids_the_pin() -> None:
    packaging = pytest.importorskip("packaging.requirements", reason="comparing versions needs packaging")
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {name_of(line): line.split(";")[0].partition("==")[2].strip() for line in lines if line}
    declared = project()["project"]
    wanted = [*declared["dependencies"], *sum(declared["optional-dependencies"].values(), [])]
    for requirement in map(packaging.Requirement, wanted):
        assert pins.get(requirement.name.lower()), f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name.lower()]), f"the pin is outside of {requirement}"


def test_the_console_script_names_a_function_that_exists() -> None:
    module, function = project()["project"]["scripts"]["orchestrator"].split(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_readme_names_make_targets_and_files_that_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\b", readme)) <= targets
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_continuous_integration_runs_the_tests_then_the_wheel_then_chaos() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert os.access(script, os.X_OK) and "set -euo pipefail" in text
    order = [text.index(part) for part in ("make test", "-m build --wheel", "orchestrator launch", "make chaos")]
    assert order == sorted(order)
    assert not re.search(r"https?://|--index-url|--extra-index-url", text + (ROOT / "Makefile").read_text())


def test_the_licence_is_apache_2_and_said_so() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text() and project()["project"]["license"] == "Apache-2.0"


def test_the_changelog_tells_of_the_current_version() -> None:
    assert f"## {project()['project']['version']} " in (ROOT / "CHANGELOG.md").read_text()
