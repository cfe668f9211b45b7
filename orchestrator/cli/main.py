"""The `orchestrator` command: finds the subcommand, turns errors into one paragraph and an exit code.

Subcommands are imported when they are asked for: `--help` and errors of use must not wait for torch or ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from orchestrator.errors import EXIT_SECOND_CTRL_C, EXIT_USAGE, OrchestratorError
from orchestrator.text import did_you_mean

_COMMANDS = {
    "launch": ("orchestrator.cli.launch:launch_command", "Train a script, and keep it going."),
    "status": ("orchestrator.cli.look:status_command", "Where a run stands."),
    "events": ("orchestrator.cli.look:events_command", "What happened to a run."),
    "logs": ("orchestrator.cli.look:logs_command", "What a rank printed."),
    "stop": ("orchestrator.cli.ask:stop_command", "Ask a live run to save and stop."),
    "save": ("orchestrator.cli.ask:save_command", "Ask a live run for a checkpoint."),
    "checkpoint": ("orchestrator.cli.checkpoint:checkpoint_group", "List, show, verify, export checkpoints."),
    "chaos": ("orchestrator.cli.launch:chaos_command", "Compare a run with faults to an undisturbed one."),
    "doctor": ("orchestrator.cli.doctor:doctor_command", "What this machine can do, and what is in the way."),
    "report": ("orchestrator.cli.later:report_command", "A page about a run (not available yet)."),
    "submit": ("orchestrator.cli.later:submit_command", "Send a run to a Ray job server (not available yet)."),
    "attach": ("orchestrator.cli.later:attach_command", "Reach a detached run (not available yet)."),
    "deploy": ("orchestrator.cli.later:deploy_command", "Write cluster manifests (not available yet)."),
}


class App(click.Group):
    """The group of all commands. `main` never lets click print or exit by itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0].replace("_", "-")
        if name not in _COMMANDS and not name.startswith("-"):
            hint = did_you_mean(name, _COMMANDS)
            if not hint and name.endswith(".py"):
                hint = f"; to train it: `orchestrator launch {args[0]}`"
            raise click.UsageError(f"there is no command `{name}`{hint or '; see `orchestrator --help`'}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in _COMMANDS.items()])

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        extra.update(standalone_mode=False, obj=tuple(words))
        sys.exit(_guarded(lambda: super(App, self).main(words, prog_name or "orchestrator", **extra)))


def _guarded(call: Any) -> int:
    """The exit code of `call`; errors that are meant for people become one paragraph on stderr."""
    try:
        result = call()
    except OrchestratorError as error:
        return _tell(str(error), error.exit_code)
    except click.NoSuchOption as error:
        return _tell(_no_such_option(error), EXIT_USAGE)
    except click.ClickException as error:
        return _tell(error.format_message().rstrip("."), EXIT_USAGE)
    except click.Abort:
        return EXIT_SECOND_CTRL_C
    except BrokenPipeError:
        # The reader (head, less) has gone; without this Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    return result if isinstance(result, int) else 0


def _tell(text: str, exit_code: int) -> int:
    click.echo(f"error: {text}", err=True)
    return exit_code


def _no_such_option(error: click.NoSuchOption) -> str:
    known = [name for param in error.ctx.command.params for name in param.opts] if error.ctx else []
    name = error.option_name.replace("_", "-")
    hidden = (
        {name for param in error.ctx.command.params if getattr(param, "hidden", False) for name in param.opts}
        if error.ctx
        else set()
    )
    visible = [option for option in known if option not in hidden]
    where = error.ctx.command_path if error.ctx else "orchestrator"
    return f"there is no option {name}{did_you_mean(name, visible) or f'; see `{where} --help`'}"


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    try:
        version = metadata.version("training-orchestrator")
    except metadata.PackageNotFoundError:
        version = "from source"
    click.echo(f"orchestrator {version}")
    ctx.exit()


cli = App(
    name="orchestrator",
    params=[click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version)],
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    no_args_is_help=True,
    help="Trains PyTorch scripts on Ray, and makes a lost worker cost no step.",
)


def main() -> None:
    """Entry point of the console script."""
    cli.main()


if __name__ == "__main__":
    main()
