"""Parsing and printing of what people write: sizes, durations, triggers, rank counts. Pure: no I/O, no clock."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence

from orchestrator.errors import UsageError
from orchestrator.spec import SaveTrigger

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SIZE = re.compile(rf"\s*{_NUMBER}\s*([A-Za-z]*)\s*")
_QUANTITY = re.compile(rf"\s*{_NUMBER}\s*([A-Za-z]*)\s*")
_DURATION_PART = re.compile(rf"{_NUMBER}\s*([A-Za-z]+)\s*")

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgtp", 1)},
}
_SECONDS = {
    **dict.fromkeys(("ms",), 0.001),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
_STEPS = ("step", "steps")
_EPOCHS = ("epoch", "epochs")
_BIGGER_IS_BETTER = ("acc", "auc", "f1", "score", "precision", "recall", "bleu", "iou", "reward", "r2")


def parse_size(text: str) -> int:
    """Bytes from "10GiB", "500 MB", "4096"; K, M, G alone are powers of 1024. Raises UsageError; must be at least 1."""
    match = _SIZE.fullmatch(text)
    unit = _SIZE_UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise UsageError("write a size such as 500MB, 10GiB or a number of bytes")
    size = int(float(match.group(1)) * unit)
    if size < 1:
        raise UsageError("the size must be at least one byte")
    return size


def parse_duration(text: str) -> float:
    """Seconds from "30s", "5m", "1h30m", "250ms" or a bare number of seconds. Raises UsageError; 0 is allowed."""
    stripped = text.strip().lower()
    if re.fullmatch(_NUMBER, stripped):
        return float(stripped)
    parts = [match.groups() for match in _DURATION_PART.finditer(stripped)]
    whole = _DURATION_PART.sub("", stripped) == "" and parts
    if not whole or any(unit not in _SECONDS for _, unit in parts):
        raise UsageError("write a duration such as 30s, 5m, 1h30m or a number of seconds")
    return math.fsum(float(number) * _SECONDS[unit] for number, unit in parts)


def parse_trigger(text: str) -> SaveTrigger:
    """One trigger: "100steps", "30s", "5m", "1epoch" or "auto". Raises UsageError."""
    stripped = text.strip().lower()
    if stripped == "auto":
        return SaveTrigger("auto", 0)
    match = _QUANTITY.fullmatch(stripped)
    if match is None:
        raise UsageError("write 100steps, 30s, 5m, 1epoch or auto, or several of them with commas between")
    number, unit = float(match.group(1)), match.group(2)
    if unit == "":
        raise UsageError(f"{stripped} of what? Write {stripped}steps, {stripped}s, {stripped}m or {stripped}epochs")
    if unit in _STEPS or unit in _EPOCHS:
        if number < 1 or number != int(number):
            raise UsageError(f"{unit} are counted in whole numbers from 1 on")
        return SaveTrigger("steps" if unit in _STEPS else "epochs", int(number))
    if unit not in _SECONDS:
        known = (*_STEPS, *_EPOCHS, *_SECONDS)
        raise UsageError(f"unknown unit `{unit}`{did_you_mean(unit, known)}; write 100steps, 30s, 5m, 1epoch or auto")
    if number <= 0:
        raise UsageError("the interval must be longer than nothing; write for example 30s")
    return SaveTrigger("seconds", number * _SECONDS[unit])


def parse_triggers(text: str) -> tuple[SaveTrigger, ...]:
    """A comma-separated list of triggers, any of which fires. Raises UsageError; an empty list is refused."""
    return tuple(parse_trigger(part) for part in text.split(","))


def parse_keep_every(text: str) -> SaveTrigger:
    """One trigger other than `auto`. Raises UsageError."""
    trigger = parse_trigger(text)
    if trigger.unit == "auto":
        raise UsageError("`auto` says when to save, not what to keep; write for example 1000steps or 1epoch")
    return trigger


def parse_steps(text: str) -> tuple[int, ...]:
    """Step numbers "1,1000", each at least 1, sorted, each once. Raises UsageError."""
    steps = [part.strip() for part in text.split(",")]
    if any(not re.fullmatch(r"\d+", step) or int(step) < 1 for step in steps):
        raise UsageError("write step numbers from 1 on with commas between, such as 1,1000")
    return tuple(sorted({int(step) for step in steps}))


def parse_keep_best(text: str) -> tuple[int, str, str]:
    """(count, metric, "min" | "max") from "K:METRIC[:min|max]".

    Without a direction metrics whose names speak of accuracy or a score are maximised and all others minimised.
    Raises UsageError.
    """
    parts = [part.strip() for part in text.split(":")]
    if len(parts) not in (2, 3) or not re.fullmatch(r"0*[1-9]\d*", parts[0]) or not parts[1]:
        raise UsageError("write K:METRIC, K:METRIC:min or K:METRIC:max, such as 2:val_loss:min")
    if len(parts) == 2:
        parts.append("max" if any(word in parts[1].lower() for word in _BIGGER_IS_BETTER) else "min")
    if parts[2] not in ("min", "max"):
        raise UsageError(f"`{parts[2]}` is no direction; end with :min or :max")
    return int(parts[0]), parts[1], parts[2]


def parse_workers(text: str) -> tuple[int, int] | None:
    """(fewest, most) ranks from "N" or "MIN:MAX"; None for "auto". Raises UsageError."""
    stripped = text.strip()
    if stripped == "auto":
        return None
    match = re.fullmatch(r"([+-]?\d+)(?::([+-]?\d+))?", stripped)
    if match is None:
        raise UsageError("write how many ranks to run, such as 4, or auto for one per GPU")
    fewest = int(match.group(1))
    most = int(match.group(2)) if match.group(2) is not None else fewest
    if fewest < 1:
        raise UsageError("a run needs at least 1 worker; write how many ranks to run, such as 4, or auto")
    if most < fewest:
        raise UsageError(
            f"the range is upside down; write {most}:{fewest}" if most > 0 else "write a range such as 2:4"
        )
    return fewest, most


def parse_count(text: str, least: int = 0) -> int:
    """A whole number of at least `least`. Raises UsageError."""
    if not re.fullmatch(r"\s*\+?\d+\s*", text) or int(text) < least:
        raise UsageError(f"write a whole number from {least} on")
    return int(text)


def parse_amount(text: str) -> float:
    """A number of at least 0, such as 0.5. Raises UsageError."""
    if not re.fullmatch(_NUMBER, text.strip()):
        raise UsageError("write a number from 0 on, such as 1 or 0.5")
    return float(text)


def parse_flag(text: str) -> bool:
    """True or false as YAML and shells spell them. Raises UsageError."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("", "0", "false", "no", "off"):
        return False
    raise UsageError("write true or false")


def parse_names(text: str) -> tuple[str, ...]:
    """Dotted Python names with commas between. Raises UsageError."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not all(part.isidentifier() for name in names for part in name.split(".")):
        raise UsageError("write module names with commas between, such as numpy,transformers")
    return names


def parse_assignment(text: str) -> tuple[str, str]:
    """(name, value) from "K=V"; the value may be empty and may hold `=`. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name.strip()):
        raise UsageError("write NAME=VALUE")
    if "\0" in value:
        raise UsageError("a value cannot hold a NUL character")
    return name.strip(), value


def mask_assignments(words: Sequence[str], option: str) -> tuple[str, ...]:
    """A command's words with the values of `option K=V` and `option=K=V` hidden: `--env TOKEN=…`."""
    masked: list[str] = []
    for word in words:
        if masked and masked[-1] == option:
            word = _masked(word)
        elif word.startswith(f"{option}="):
            word = f"{option}={_masked(word[len(option) + 1 :])}"
        masked.append(word)
    return tuple(masked)


def _masked(assignment: str) -> str:
    return f"{assignment.partition('=')[0]}=…" if "=" in assignment else assignment


def human_bytes(size_bytes: float) -> str:
    """1536 → "1.5 KiB"; whole numbers below 1 KiB."""
    size, unit = float(size_bytes), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(size) < 1023.95:
            break
        size, unit = size / 1024, bigger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """0.114 → "0.11 s", 75 → "1 min 15 s", 3700 → "1 h 02 min", 100000 → "1 d 4 h"."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def human_count(count: int, thing: str) -> str:
    """(1, "step") → "1 step", (2, "step") → "2 steps"."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean `x`?" with the closest known word, or "" where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""
