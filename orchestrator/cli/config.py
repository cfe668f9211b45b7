"""Where a launch's settings come from: defaults < YAML < environment < command line, each value with its origin.

Pure but for `read_yaml`, which reads one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.cli.settings import KNOWN_VARIABLES_PREFIX, SETTINGS, Setting
from orchestrator.errors import UsageError
from orchestrator.text import did_you_mean

_UNSET = ("", "~", "null", "Null", "NULL")
_PREFIX = "ORCHESTRATOR_"


@dataclass(frozen=True)
class Given:
    """A setting's text (a tuple for what may be repeated; None: unset) and where it was set, for people."""

    text: str | tuple[str, ...] | None
    origin: str

    @property
    def is_default(self) -> bool:
        return self.origin == "default"


Layer = dict[str, Given]


def defaults() -> Layer:
    return {name: Given(setting.default, "default") for name, setting in SETTINGS.items()}


def from_environment(environ: Mapping[str, str]) -> tuple[Layer, list[str]]:
    """What ORCHESTRATOR_* variables (and RAY_ADDRESS) set, and a warning for each unknown one."""
    layer: Layer = {}
    warnings = []
    if environ.get("RAY_ADDRESS"):
        layer["address"] = Given(environ["RAY_ADDRESS"], "environment RAY_ADDRESS")
    by_variable = {setting.variable: setting for setting in SETTINGS.values() if setting.in_config}
    for variable in sorted(environ):
        if not variable.startswith(_PREFIX) or variable.startswith(KNOWN_VARIABLES_PREFIX):
            continue
        setting = by_variable.get(variable)
        if setting is None:
            warnings.append(f"unknown variable {variable} is ignored{did_you_mean(variable, by_variable)}")
        elif environ[variable] != "":
            value = environ[variable]
            layer[setting.name] = Given((value,) if setting.multiple else value, f"environment {variable}")
    return layer, warnings


def read_yaml(path: str) -> Layer:
    """The settings of a YAML file: a mapping of option names to values. Raises UsageError with file and line."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({_reason(error)}); give a YAML file of options") from None
    return parse_yaml(content, path)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8 text"


def parse_yaml(content: str, path: str) -> Layer:
    """As `read_yaml`, from text. Scalars stay text, so `off`, `2:2` and `1e3` mean what they say."""
    try:
        root = yaml.compose(content, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UsageError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}: must be a mapping of options to values, such as `workers: 2`")
    layer: Layer = {}
    for key, value in root.value:
        where = f"{path}:{key.start_mark.line + 1}"
        setting = _setting_of(str(key.value), where)
        if setting.name in layer:
            raise UsageError(f"{where}: `{key.value}` is set twice; keep one of them")
        layer[setting.name] = Given(_yaml_text(setting, value, where), where)
    return layer


def _setting_of(key: str, where: str) -> Setting:
    name = key.replace("_", "-")
    setting = SETTINGS.get(name)
    if setting is None or not setting.in_config:
        known = [known.name for known in SETTINGS.values() if known.in_config]
        hint = "; use `workers`" if setting else did_you_mean(name, known)
        raise UsageError(f"{where}: unknown key `{key}`{hint or '; see `orchestrator launch --help` for the options'}")
    return setting


def _yaml_text(setting: Setting, node: yaml.Node, where: str) -> str | tuple[str, ...] | None:
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        if plain and node.value in _UNSET:
            return None
        return (node.value,) if setting.multiple else str(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        items = tuple(str(item.value) for item in node.value)
        return items if setting.multiple else ",".join(items)
    if isinstance(node, yaml.MappingNode) and setting.multiple:
        return tuple(f"{key.value}={value.value}" for key, value in node.value)
    raise UsageError(f"{where}: `{setting.name}` must be a single value or a list, such as `{_example(setting)}`")


def _example(setting: Setting) -> str:
    return f"{setting.name}: {setting.default or setting.metavar}"


def merge(*layers: Layer) -> Layer:
    """Later layers win; an unset value (None) hides no set one, and what may be repeated adds up."""
    merged: Layer = {}
    for layer in layers:
        for name, given in layer.items():
            before = merged.get(name)
            if before is None or given.text is not None:
                merged[name] = _added(before, given)
    return merged


def _added(before: Given | None, given: Given) -> Given:
    if before and isinstance(before.text, tuple) and isinstance(given.text, tuple):
        return Given(before.text + given.text, f"{before.origin}, {given.origin}")
    return given


def parse(layer: Layer) -> dict[str, Any]:
    """Name → parsed value (None where unset). Raises UsageError naming the option and where it was set."""
    return {name: _parse_one(SETTINGS[name], given) for name, given in layer.items()}


def _parse_one(setting: Setting, given: Given) -> Any:
    if given.text is None:
        return () if setting.multiple else None
    try:
        if isinstance(given.text, tuple):
            return tuple(setting.parse(item) for item in given.text)
        return setting.parse(given.text)
    except UsageError as error:
        raise UsageError(f"{_named(setting, given)}: {error}") from None


def _named(setting: Setting, given: Given) -> str:
    shown = " ".join(given.text) if isinstance(given.text, tuple) else given.text
    value = "" if setting.flag else f" {shown}"
    place = "" if given.origin == "command line" else f" (from {given.origin})"
    return f"{setting.option}{value}{place}"


def as_yaml(layer: Layer) -> str:
    """The merged settings as YAML that `--config` reads again, each with its origin in a comment."""
    lines = []
    for name, setting in SETTINGS.items():
        given = layer.get(name)
        if given is not None and setting.in_config:
            lines.append((f"{name}: {_yaml_value(setting, given)}", given.origin))
    width = min(48, max((len(line) for line, _ in lines), default=0))
    return "\n".join(f"{line:<{width}}  # {origin}" for line, origin in lines)


def _yaml_value(setting: Setting, given: Given) -> str:
    if given.text is None:
        return "null"
    if isinstance(given.text, tuple):
        return _flow([str(item) for item in given.text])
    if setting.flag:
        return "true" if setting.parse(given.text) else "false"
    return _flow(given.text)


def _flow(value: str | list[str]) -> str:
    """One line of YAML; numbers stay bare and what only looks like something else is quoted."""
    if isinstance(value, str) and value.isdigit():
        return value
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return dumped.removesuffix("\n").removesuffix("\n...")
