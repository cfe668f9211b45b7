"""`--fault` specifications, and the faults that they come to once the undisturbed run is known. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from orchestrator.errors import UsageError
from orchestrator.text import did_you_mean

KINDS = ("kill", "raise", "exit", "oom")
LATER = {"stop": "hangs are not detected yet", "node": "a node cannot be taken away yet"}
MOMENTS = ("start", "step", "forward", "backward", "optimizer", "boundary", "save", "any")
START_S = 0.25  # about what a group needs from its fork to its first step
_HARMLESS_SIGNALS = frozenset({17, 18, 19, 20, 21, 22, 23, 28})  # ignored by default, or they only stop a process
_AT_THE_END = ("boundary", "save")  # moments that also come once all steps are complete
_MARGIN_STEPS = 3  # a timer must not outlive the loop
_MIXED = ("start", "forward", "backward", "optimizer", "boundary", "save", "any", "any")
_KEYS = {
    "kill": {"rank", "step", "moment", "at", "signal"},
    "raise": {"rank", "step", "moment", "at"},
    "exit": {"rank", "step", "moment", "at", "code"},
    "oom": {"rank", "step", "moment", "at"},
    "random": {"seed", "count", "kinds"},
}


@dataclass(frozen=True)
class Fault:
    """One failure on purpose: `rank` fails when `step` steps are complete, at `moment` of the step that follows.

    `offset`, 0 to 1, says where inside the moment; `delay_s` is that for the moments which a timer finds (`any`,
    `start`). A fault with `after` is armed only once the fault of that id has struck.
    """

    id: str
    kind: str
    rank: int
    step: int
    moment: str
    offset: float = 0.5
    delay_s: float = 0.0
    code: int = 3
    signal: int = 9
    after: str = ""

    def to_json(self) -> str:
        """As `RunSpec.faults` holds it and `orchestrator.worker.faults` takes it."""
        return json.dumps(asdict(self))

    @property
    def where(self) -> str:
        """For people: "in backward of step 12"."""
        if self.moment == "start":
            return "at start-up"
        return f"{_PREPOSITION.get(self.moment, 'in')} {_NOUN.get(self.moment, self.moment)} of step {self.step}"


_PREPOSITION = {"step": "at", "boundary": "at", "any": "at", "save": "in"}
_NOUN = {
    "step": "the top",
    "boundary": "the boundary",
    "any": "any moment",
    "save": "the save",
    "optimizer": "the optimizer",
}


@dataclass(frozen=True)
class RandomFaults:
    """`count` faults drawn from `seed`; `kinds` are equally likely."""

    seed: int
    count: int
    kinds: tuple[str, ...] = ("kill", "raise", "exit")


@dataclass(frozen=True)
class Undisturbed:
    """What an undisturbed run says of the program: ranks, steps, and the time of a step in seconds."""

    world_size: int
    steps: int
    step_s: float


def parse(specs: Sequence[str]) -> list[Fault | RandomFaults]:
    """All `--fault` options in order. Raises UsageError naming the one that is wrong, and how."""
    return [_parse(spec, number) for number, spec in enumerate(specs, 1)]


def _parse(spec: str, number: int) -> Fault | RandomFaults:
    kind, _, rest = spec.strip().partition(":")
    if kind in LATER:
        raise _later(spec, kind)
    if kind not in _KEYS:
        raise _unknown(spec, "kind", kind, (*KINDS, "random"))
    values = _values(spec, rest, _KEYS[kind])
    return _random(spec, values) if kind == "random" else _fault(spec, kind, values, f"fault-{number}")


def _unknown(spec: str, what: str, word: str, known: Sequence[str]) -> UsageError:
    there_are = ", ".join(known)
    return UsageError(f"--fault {spec}: there is no {what} `{word}`{did_you_mean(word, known)}; there are {there_are}.")


def _later(spec: str, kind: str) -> UsageError:
    return UsageError(f"--fault {spec}: `{kind}` is not available in this version: {LATER[kind]}.")


def _values(spec: str, rest: str, known: set[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise UsageError(f"--fault {spec}: `{part}` is no KEY=VALUE.")
        if key not in known:
            raise _unknown(spec, "key", key, sorted(known))
        if key in values:
            raise UsageError(f"--fault {spec}: `{key}` is given twice.")
        values[key] = value
    return values


def _whole(spec: str, values: dict[str, str], key: str, default: int | None, least: int, most: int = 1 << 31) -> int:
    text = values.get(key)
    if text is None:
        if default is None:
            raise UsageError(f"--fault {spec}: `{key}=` is missing.")
        return default
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        bounds = f"from {least} on" if most == 1 << 31 else f"from {least} to {most}"
        raise UsageError(f"--fault {spec}: {key}={text} must be a whole number {bounds}.")
    return int(text)


def _random(spec: str, values: dict[str, str]) -> RandomFaults:
    kinds = tuple(dict.fromkeys(values.get("kinds", "kill+raise+exit").split("+")))
    for kind in kinds:
        if kind in LATER:
            raise _later(spec, kind)
        if kind not in KINDS:
            raise _unknown(spec, "kind", kind, KINDS)
    return RandomFaults(_whole(spec, values, "seed", 0, 0), _whole(spec, values, "count", 1, 1, 1000), kinds)


def _fault(spec: str, kind: str, values: dict[str, str], name: str) -> Fault:
    moment = values.get("moment", "step")
    if moment not in MOMENTS:
        raise _unknown(spec, "moment", moment, MOMENTS)
    if moment == "start" and kind == "raise":
        raise UsageError(
            f"--fault {spec}: an exception before the first step is the program's own and never retried; use kill or "
            "exit."
        )
    if _whole(spec, values, "signal", 9, 1, 64) in _HARMLESS_SIGNALS:
        raise UsageError(f"--fault {spec}: signal {values['signal']} ends no process.")
    if moment == "start" and "step" in values:
        raise UsageError(f"--fault {spec}: the start-up comes before any step; leave `step=` out.")
    return Fault(
        id=name,
        kind=kind,
        rank=_whole(spec, values, "rank", None, 0),
        step=_whole(spec, values, "step", 0 if moment == "start" else None, 0),
        moment=moment,
        offset=_fraction(spec, values),
        code=_whole(spec, values, "code", 3, 0, 255),
        signal=_whole(spec, values, "signal", 9, 1, 64),
    )


def _fraction(spec: str, values: dict[str, str]) -> float:
    text = values.get("at", "0.5")
    try:
        offset = float(text)
    except ValueError:
        offset = -1.0
    if not 0.0 <= offset <= 1.0:
        raise UsageError(f"--fault {spec}: at={text} must be a number from 0 to 1: where inside the moment.")
    return offset


def check_ranks(parsed: Sequence[Fault | RandomFaults], world_size: int) -> None:
    """Raises UsageError for a rank that there will not be. Known before anything runs."""
    for fault in parsed:
        if isinstance(fault, Fault) and fault.rank >= world_size:
            raise UsageError(
                f"--fault {fault.kind}: there is no rank {fault.rank} among {world_size} workers; ranks count from 0."
            )


def schedule(parsed: Sequence[Fault | RandomFaults], calm: Undisturbed) -> tuple[Fault, ...]:
    """The faults of one run; random ones are drawn here, the same ones for the same seed and undisturbed run.

    Raises UsageError for a step that never comes.
    """
    check_ranks(parsed, calm.world_size)
    faults: list[Fault] = []
    for item in parsed:
        if isinstance(item, RandomFaults):
            faults += _draw(item, calm, len(faults))
        else:
            _check_step(item, calm)
            faults.append(replace(item, delay_s=_delay_s(item.moment, item.offset, calm)))
    return _chained(faults)


def _check_step(fault: Fault, calm: Undisturbed) -> None:
    last = calm.steps if fault.moment in _AT_THE_END else calm.steps - 1
    if fault.step > last:
        raise UsageError(
            f"--fault {fault.kind}: moment `{fault.moment}` of step {fault.step} never comes: the undisturbed run "
            f"completed {calm.steps} steps, so the last one to strike at is {last}."
        )


def _delay_s(moment: str, offset: float, calm: Undisturbed) -> float:
    if moment == "start":
        return offset * START_S
    return offset * calm.step_s if moment == "any" else 0.0


def _chained(faults: list[Fault]) -> tuple[Fault, ...]:
    """Of several start-up faults of one rank each waits for the one before: a process dies once."""
    last: dict[int, str] = {}
    chained = []
    for fault in faults:
        if fault.moment == "start":
            fault = replace(fault, after=fault.after or last.get(fault.rank, ""))
            last[fault.rank] = fault.id
        chained.append(fault)
    return tuple(chained)


def _draw(wish: RandomFaults, calm: Undisturbed, taken: int) -> list[Fault]:
    """Spread over the run: fault i falls into the i-th of `count` equal parts. Raises UsageError for a short run."""
    first, end = 2, calm.steps - _MARGIN_STEPS
    if end <= first:
        least = first + _MARGIN_STEPS
        raise UsageError(f"Random faults need more than {least} steps; the undisturbed run has {calm.steps}.")
    chance = random.Random(f"{wish.seed}/{calm.world_size}/{wish.count}/{'+'.join(wish.kinds)}")
    faults: list[Fault] = []
    for index in range(wish.count):
        step = first + int((index + chance.random()) * (end - first) / wish.count)
        final = index == wish.count - 1 and chance.random() < 0.5
        faults.append(_drawn(chance, wish, calm, f"fault-{taken + index + 1}", step, faults, final))
    return faults


def _drawn(
    chance: random.Random,
    wish: RandomFaults,
    calm: Undisturbed,
    name: str,
    step: int,
    before: list[Fault],
    final: bool,
) -> Fault:
    """One random fault. At start-up it strikes right after the fault before it; `final`: a save is that of the end."""
    kind, moment = chance.choice(wish.kinds), chance.choice(_MIXED)
    rank, offset = chance.randrange(calm.world_size), round(chance.random(), 4)
    if moment == "start" and kind == "raise" and not before:
        moment = "any"  # before the first step of a launch an exception is the program's own
    if moment == "save" and final:
        step = calm.steps
    after = before[-1].id if moment == "start" and before else ""
    delay_s = round(_delay_s(moment, offset, calm), 6)
    return Fault(name, kind, rank, 0 if moment == "start" else step, moment, offset, delay_s, after=after)
