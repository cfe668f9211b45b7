"""Which libraries of the user's script are worth importing once, in the zygote, instead of once in every worker."""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
from pathlib import Path

_NEVER = frozenset({"__future__", "orchestrator", "ray"})


def libraries_of(script: str, module: bool, cwd: str) -> list[str]:
    """Installed modules that the script imports at its top level, in order; the user's own files are left out.

    Nothing is imported here. A script that cannot be read or parsed has none: its error belongs to the run.
    """
    try:
        path = _module_path(script, cwd) if module else Path(script)
        tree = ast.parse(path.read_bytes()) if path is not None else None
    except (OSError, SyntaxError, ValueError):
        return []
    if tree is None:
        return []
    names = [name for node in tree.body for name in _imported(node)]
    return [name for name in dict.fromkeys(names) if _is_installed(name.partition(".")[0])]


def _module_path(name: str, cwd: str) -> Path | None:
    base = Path(cwd, *name.split("."))
    candidates = (base.with_suffix(".py"), base / "__main__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module]
    return []


def _is_installed(root: str) -> bool:
    if root in _NEVER:
        return False
    try:
        found = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return False
    if found is None or found.origin is None:
        return False
    places = {os.path.realpath(sysconfig.get_paths()[key]) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return found.origin in ("built-in", "frozen") or any(
        os.path.realpath(found.origin).startswith(place + os.sep) for place in places
    )
