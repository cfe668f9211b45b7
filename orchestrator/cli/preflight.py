"""What is checked before anything starts: the system, the program, the place for runs. Nothing is created on disk."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestrator.cli.build import Program
from orchestrator.errors import UsageError
from orchestrator.text import did_you_mean


def check_platform() -> None:
    """Raises UsageError on anything but Linux."""
    if sys.platform != "linux":
        raise UsageError(
            f"`launch` needs Linux (forked workers, shared memory, pidfds), and this is {sys.platform}; "
            "plain `python train.py` runs the same script here, on one rank"
        )


def check_program(program: Program) -> None:
    """Raises UsageError for what could never start: no such file or module, or a syntax error in it."""
    if program.module:
        _check_module(program.script)
    else:
        _check_script(program.script)


def _check_script(script: str) -> None:
    path = Path(script)
    if script.startswith("-"):
        raise UsageError(f"`{script}` is no script; give a file, such as train.py, after the options")
    if path.is_dir():
        raise UsageError(f"{script} is a directory; give the script itself, such as {path / 'train.py'}")
    if not path.exists():
        raise UsageError(_missing_script(script, path))
    if not path.is_file():
        raise UsageError(
            f"{script} is not a regular file; workers read it again at each restart, so write it to a file"
        )
    _compile(path, script)


def _missing_script(script: str, path: Path) -> str:
    nearby: list[str] = []
    if path.parent.is_dir():
        nearby = [str(path.with_name(entry.name)) for entry in path.parent.glob("*.py")]
    hint = did_you_mean(str(path), nearby)
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    looks_like_module = not script.endswith(".py") and "/" not in script and _find_module(script) is not None
    if looks_like_module:
        hint = f"; for the module of that name use `-m {script}`"
    return f"there is no script {script}{where}{hint or '; check the path'}"


def _compile(path: Path, shown: str) -> None:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{shown} cannot be read ({error.strerror}); check its permissions") from None
    try:
        compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise UsageError(_syntax_error(shown, error)) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{shown} is no Python source ({error}); give the script's .py file") from None


def _syntax_error(shown: str, error: SyntaxError) -> str:
    line = (error.text or "").strip()
    where = f"{shown}:{error.lineno}" if error.lineno else shown
    return f"{where}: {type(error).__name__}: {error.msg}" + (f": `{line}`" if line else "") + "; nothing was started"


def _check_module(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"`-m {name}` is no module's name; write it with dots and without .py, such as package.train")
    spec = _find_module(name)
    if spec is None:
        raise UsageError(
            f"there is no module {name} on Python's path or in {Path.cwd()}; check the name, or install it"
        )
    if spec.submodule_search_locations is not None:
        spec = _find_module(f"{name}.__main__")
        if spec is None:
            raise UsageError(
                f"{name} is a package without a __main__ module; name the module to run, such as {name}.train"
            )
    if spec.origin and spec.origin.endswith(".py"):
        _compile(Path(spec.origin), os.path.relpath(spec.origin))


def _find_module(name: str) -> importlib.machinery.ModuleSpec | None:
    """The module as `python -m` would find it, the working directory first; no package is imported for it."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    top, *rest = name.split(".")
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(top)
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = importlib.machinery.PathFinder.find_spec(part, list(spec.submodule_search_locations))
    except (ImportError, ValueError):
        return None
    finally:
        sys.path[:] = before
    return spec


def check_imports(program: Program) -> None:
    """Raises UsageError for a library that the script imports first thing and that is not installed here.

    Only for workers on this machine; a script that changes `sys.path` finds out for itself.
    """
    path = Path(program.script) if not program.module else _module_file(program.script)
    if path is None or path.suffix != ".py":
        return
    source = path.read_bytes()
    if b"sys.path" in source:
        return
    before = list(sys.path)
    sys.path.insert(0, str(path.parent.resolve() if not program.module else Path.cwd()))
    try:
        for line, name in _top_imports(ast.parse(source)):
            if name not in sys.builtin_module_names and not _is_there(name):
                raise UsageError(
                    f"{path}:{line} imports {name}, which is not installed for {sys.executable}; install it, or run "
                    "the orchestrator from the environment that has it. Nothing was started"
                )
    finally:
        sys.path[:] = before


def _module_file(name: str) -> Path | None:
    spec = _find_module(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _find_module(f"{name}.__main__")
    return Path(spec.origin) if spec is not None and spec.origin else None


def _top_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports that run in any case: not those under `if` or `try`."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


def _is_there(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def check_storage(storage: str) -> None:
    """Raises UsageError if a run's directory could not be created below `storage`. Creates nothing."""
    path = Path(storage.removeprefix("file://")).absolute()
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"--storage {storage}: {place} is a file; give a directory for the runs")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"--storage {storage}: {place} is not writable for this user; give another directory")


def check_working_directory() -> None:
    """Raises UsageError if the working directory has been deleted under this process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working directory does not exist any more; `cd` into an existing one first") from None
