"""`orchestrator launch` and `orchestrator chaos`: options, checks, and the hand-over to the driver."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from orchestrator.cli import config, machine, preflight
from orchestrator.cli.build import Machine, Note, Program, build_spec
from orchestrator.cli.settings import IGNORED_TORCHRUN, SETTINGS, Setting
from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.spec import RunSpec
from orchestrator.ui.console import Console, make_console

_OURS_BEFORE_SCRIPT = ("--workers", "--nproc-per-node", "--storage", "--run-name", "--save-every", "--max-restarts")
_NEEDED = ("ray", "torch", "numpy", "safetensors", "google_crc32c")


@dataclass(frozen=True)
class Launch:
    """A launch that passed every check."""

    spec: RunSpec
    notes: tuple[Note, ...]


def _variable_name(setting_name: str) -> str:
    return "set_" + setting_name.replace("-", "_")


def _option(setting: Setting) -> click.Option:
    shown = setting.help
    if setting.default is not None and not setting.flag and "torchrun" not in shown:
        shown += f"  [{setting.default}]"
    names = [setting.option, _variable_name(setting.name)]
    if setting.flag:
        return click.Option(names, is_flag=True, help=shown)
    return click.Option(names, metavar=setting.metavar, multiple=setting.multiple, help=shown)


def _ignored_option(name: str, flag: bool) -> click.Option:
    names = [f"--{name}", f"ignored_{name.replace('-', '_')}"]
    return click.Option(names, hidden=True, is_flag=True) if flag else click.Option(names, hidden=True, multiple=True)


def launch_options() -> list[click.Parameter]:
    """Every option of a launch, then SCRIPT and its arguments."""
    return [
        *[_option(setting) for setting in SETTINGS.values()],
        click.Option(["--config", "config_file"], metavar="FILE.yaml", help="Options from a file; flags win."),
        click.Option(["--print-config"], is_flag=True, help="Print every option with its origin, and start nothing."),
        click.Option(["-m", "--module"], is_flag=True, help="SCRIPT is a module's name, as for `python -m`."),
        *[_ignored_option(name, flag) for name, flag in IGNORED_TORCHRUN.items()],
        click.Option(["--no-python", "no_python"], is_flag=True, hidden=True),
        click.Argument(["script_and_args"], nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]..."),
    ]


def _from_flags(ctx: click.Context) -> config.Layer:
    layer: config.Layer = {}
    for setting in SETTINGS.values():
        name = _variable_name(setting.name)
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            value = ctx.params[name]
            text = "true" if setting.flag else tuple(value) if setting.multiple else value
            _refuse_swallowed_option(setting, text)
            layer[setting.name] = config.Given(text, "command line")
    return layer


def _refuse_swallowed_option(setting: Setting, text: str | tuple[str, ...]) -> None:
    for value in text if isinstance(text, tuple) else (text,):
        if value.startswith("--"):
            raise UsageError(f"{setting.option} needs a value ({setting.metavar}), and `{value}` is the next option")


def _layers(ctx: click.Context) -> tuple[config.Layer, list[Note]]:
    environment, warnings = config.from_environment(os.environ)
    file = ctx.params["config_file"]
    layer = config.merge(config.defaults(), config.read_yaml(file) if file else {}, environment, _from_flags(ctx))
    return layer, [Note(warning, "warning") for warning in warnings]


def _program(ctx: click.Context) -> Program:
    words: tuple[str, ...] = tuple(ctx.params["script_and_args"])
    if not words:
        what = "a module's name after -m" if ctx.params["module"] else "a script"
        raise UsageError(f"{ctx.info_name} needs {what}, such as `orchestrator {ctx.info_name} --workers 2 train.py`")
    return Program(words[0], words[1:], ctx.params["module"])


def _torchrun_notes(ctx: click.Context) -> list[Note]:
    if ctx.params["no_python"]:
        raise UsageError("--no-python: only Python scripts and modules can be run; start other programs from a script")
    given = [
        f"--{name}"
        for name in IGNORED_TORCHRUN
        if ctx.get_parameter_source(f"ignored_{name.replace('-', '_')}") is click.core.ParameterSource.COMMANDLINE
    ]
    if not given:
        return []
    says = "is torchrun's and says" if len(given) == 1 else "are torchrun's and say"
    return [Note(f"{', '.join(given)} {says} nothing here: ranks find each other by themselves; ignored")]


def _misplaced_notes(ctx: click.Context, program: Program) -> list[Note]:
    spelled = {word.partition("=")[0].replace("_", "-") for word in program.args if word.startswith("--")}
    misplaced = [
        option
        for option in _OURS_BEFORE_SCRIPT
        if option in spelled
        and ctx.get_parameter_source(_variable_name(option[2:])) is not click.core.ParameterSource.COMMANDLINE
    ]
    return [
        Note(f"{option} stands after {program.script}, so the script gets it; our options come before the script")
        for option in misplaced
    ]


def prepare(ctx: click.Context, faults: tuple[str, ...] = (), reference: str | None = None) -> Launch | None:
    """Everything up to the start; None if only the configuration was asked for. Raises UsageError."""
    layer, notes = _layers(ctx)
    here = Machine(machine.cores(), machine.gpus())
    if ctx.params["print_config"]:
        build_spec(layer, Program("-"), here)
        click.echo(config.as_yaml(layer))
        return None
    notes += _torchrun_notes(ctx)
    program = _program(ctx)
    command = ("orchestrator", *(ctx.find_object(tuple) or ()))
    spec, more = build_spec(layer, program, here, command, faults, reference)
    preflight.check_platform()
    preflight.check_working_directory()
    preflight.check_program(program)
    if spec.address == "local":
        preflight.check_imports(program)
    preflight.check_storage(spec.storage)
    return Launch(spec, (*notes, *more, *_misplaced_notes(ctx, program)))


@contextmanager
def _console(launch: Launch) -> Iterator[Console]:
    console = make_console(launch.spec.json, launch.spec.quiet, sys.stdout)
    try:
        for note in launch.notes:
            console.notice(note.text, note.level)
        yield console
    finally:
        console.close()


@contextmanager
def _installation() -> Iterator[None]:
    """A package of others that is missing or broken is told as that, not by a traceback of ours."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] not in _NEEDED:
            raise
        raise OrchestratorError(
            f"{error.name} cannot be imported ({error}); `orchestrator doctor` says more"
        ) from error


@click.pass_context
def _launch(ctx: click.Context, /, **_: Any) -> int:
    launch = prepare(ctx)
    if launch is None:
        return 0
    with _console(launch) as console, _installation():
        from orchestrator.driver.launch import run

        return int(run(launch.spec, console))


@click.pass_context
def _chaos(ctx: click.Context, /, fault: tuple[str, ...], reference: str | None, **_: Any) -> int:
    launch = prepare(ctx, tuple(fault), reference)
    if launch is None:
        return 0
    if not fault:
        raise UsageError("chaos needs at least one --fault, such as `--fault kill:rank=1,step=50`")
    with _console(launch) as console, _installation():
        from orchestrator.chaos.run import main

        return int(main(launch.spec, list(fault), console))


launch_command = click.Command(
    "launch",
    callback=_launch,
    params=launch_options(),
    context_settings={"allow_interspersed_args": False, "max_content_width": 110},
    options_metavar="[OPTIONS]",
    help="Train SCRIPT on the workers asked for, and keep it going. Options come first; all after SCRIPT is SCRIPT's.",
)

chaos_command = click.Command(
    "chaos",
    callback=_chaos,
    params=[
        click.Option(["--fault"], multiple=True, metavar="SPEC", help="kill:rank=1,step=50, random:seed=7,count=20, …"),
        click.Option(["--reference"], metavar="DIR", help="Keep the undisturbed run here, and use it again next time."),
        *launch_options(),
    ],
    context_settings={"allow_interspersed_args": False, "max_content_width": 110},
    options_metavar="[LAUNCH OPTIONS] --fault SPEC…",
    help="Run SCRIPT undisturbed and with faults, and compare the final state bit by bit; exit 0 only if equal.",
)
