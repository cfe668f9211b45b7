"""The arrows of docs/architecture.md, section 2, read from the source: who may import whom, and what pure means."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "orchestrator"

BASE = {"errors", "spec", "text"}
BELOW_DRIVER = BASE | {"control", "storage", "strategies", "worker", "agent"}

# layer: the layers it may import besides itself
ARROWS: dict[str, set[str]] = {
    "errors": BASE,
    "spec": BASE,
    "text": BASE,
    "control": BASE,
    "storage": BASE,
    "strategies": BASE | {"storage"},
    "worker": BASE | {"storage", "strategies"},
    "agent": BASE | {"storage", "worker"},
    "driver": BASE | {"control", "storage", "agent"},
    "ui": BELOW_DRIVER | {"driver"},
    "chaos": BELOW_DRIVER | {"driver"},
    "cli": BELOW_DRIVER | {"driver", "ui", "chaos"},
    "__main__": {"cli"},
    "__init__": BASE | {"worker", "storage"},  # the public names, resolved on first use
}

RAY_LAYERS = {"driver", "agent"}
TORCH_FREE_LAYERS = {"driver", "ui", "control", *BASE}  # the driver never touches tensors
STORAGE_WITH_TORCH = {"storage/shards.py"}

PURE = ["errors.py", "spec.py", "text.py", "control/*.py"]
PURE += [f"storage/{name}.py" for name in ("layout", "manifest", "retention", "codec")]
# fmt: off
PURE_STDLIB = {
    "__future__", "abc", "base64", "bisect", "collections", "dataclasses", "difflib", "enum", "fractions", "functools",
    "hashlib", "heapq", "itertools", "json", "math", "operator", "re", "statistics", "string", "struct", "textwrap",
    "types", "typing", "urllib.parse",
}
# fmt: on
IMPURE_BUILTINS = {"open", "print", "input", "exec", "eval", "breakpoint", "__import__"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def pure_sources() -> list[Path]:
    return [path for pattern in PURE for path in sorted(PACKAGE.glob(pattern))]


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(path: Path) -> str:
    """"control" for control/machine.py, "errors" for errors.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, typing_too: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in the file, inside functions too; `from a import b` gives "a.b"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing_too:
            skipped |= {child for statement in node.body for child in ast.walk(statement)}
    package = ["orchestrator", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def wrong_arrows(path: Path) -> list[str]:
    layer = layer_of(path)
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "orchestrator" or len(parts) == 1:
            continue
        target = parts[1] if parts[1] in ARROWS else "__init__"
        if target not in ARROWS[layer] | {layer}:
            wrong.append(f"{relative(path)}:{line}: {layer} imports {name}")
    return wrong


def external(path: Path) -> Iterator[tuple[int, str]]:
    return ((line, name) for line, name in imports(path, typing_too=False) if name.split(".")[0] != "orchestrator")


def external_users(module: str) -> list[tuple[Path, int]]:
    return [(path, line) for path in sources() for line, name in external(path) if name.split(".")[0] == module]


def test_every_module_belongs_to_a_known_layer() -> None:
    assert {layer_of(path) for path in sources()} <= set(ARROWS)


def test_arrows_run_one_way() -> None:
    assert [wrong for path in sources() for wrong in wrong_arrows(path)] == []


def test_only_driver_and_agent_import_ray() -> None:
    assert [f"{relative(p)}:{line}" for p, line in external_users("ray") if layer_of(p) not in RAY_LAYERS] == []


def test_torch_stays_out_of_driver_console_and_the_pure_parts() -> None:
    wrong = [(p, line) for p, line in external_users("torch") if layer_of(p) in TORCH_FREE_LAYERS]
    assert [f"{relative(p)}:{line}" for p, line in wrong] == []


def test_only_the_shards_part_of_storage_imports_torch() -> None:
    in_storage = [(p, line) for p, line in external_users("torch") if layer_of(p) == "storage"]
    assert [f"{relative(p)}:{line}" for p, line in in_storage if relative(p) not in STORAGE_WITH_TORCH] == []


def pure_module_name(path: Path) -> str:
    return "orchestrator." + relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def allowed_in_pure(name: str) -> bool:
    """`name` is "module.attribute" or "module"; PurePath classes compute, the other classes of pathlib do I/O."""
    if name.startswith("pathlib.Pure") or name == "random":  # of random only seeded generators: `unseeded_randomness`
        return True
    return any(name == module or name.startswith(module + ".") for module in PURE_STDLIB)


def unseeded_randomness(tree: ast.AST) -> list[int]:
    """Lines that use `random` in another way than `random.Random(seed)`, which is a function of its seed."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    seeded = {call.func for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "Random"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random"
        if node not in seeded
    ]


@pytest.mark.parametrize("path", pure_sources(), ids=relative)
def test_pure_modules_do_no_io_and_read_no_clock(path: Path) -> None:
    wrong = [f"line {line}: imports {name}" for line, name in external(path) if not allowed_in_pure(name)]
    pure = {pure_module_name(other) for other in pure_sources()}
    for line, name in imports(path):
        if name.startswith("orchestrator.") and not ({name, name.rpartition(".")[0]} & pure):
            wrong.append(f"line {line}: imports {name}, which is not pure")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong += [f"line {line}: random without a seed" for line in unseeded_randomness(tree)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS:
            wrong.append(f"line {node.lineno}: calls {node.func.id}()")
    assert wrong == []


def loaded_after(statement: str) -> set[str]:
    """The heavy modules that a fresh interpreter holds after `statement`."""
    code = f"import sys; {statement}; print(*({{'torch', 'ray', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    assert loaded_after("import orchestrator") == set()


def test_importing_the_pure_modules_loads_neither_torch_nor_ray() -> None:
    assert loaded_after(f"import {', '.join(map(pure_module_name, pure_sources()))}") == set()


# --- the checks above can fail ---


def in_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    return path


@pytest.mark.parametrize(
    "name, text",
    [
        ("control/a.py", "from orchestrator.storage import layout"),
        ("control/a.py", "def f():\n    from ..driver.loop import run"),
        ("storage/a.py", "import orchestrator.worker.run"),
        ("worker/a.py", "from orchestrator import agent"),
        ("driver/a.py", "from orchestrator.cli.main import main"),
        ("agent/a.py", "from orchestrator.control.machine import step"),
    ],
)
def test_a_wrong_arrow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    assert len(wrong_arrows(in_package(tmp_path, monkeypatch, name, text))) == 1


def test_a_relative_import_of_the_own_layer_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from .events import Event\nfrom ..errors import UsageError"
    path = in_package(tmp_path, monkeypatch, "control/a.py", text)
    assert wrong_arrows(path) == []


@pytest.mark.parametrize("name", ["time.monotonic", "os", "io", "random.random", "socket", "pathlib.Path", "torch"])
def test_what_pure_modules_may_not_import(name: str) -> None:
    assert not allowed_in_pure(name)


def test_randomness_without_a_seed_is_seen() -> None:
    code = "import random\nrandom.Random(7).random()\nrandom.random()\nrandom.Random().random()\nf(random)"
    assert unseeded_randomness(ast.parse(code)) == [3, 4]
