"""Errors that reach a user, each with the exit code that `orchestrator` ends with. Pure: imports nothing of ours."""

from __future__ import annotations

EXIT_COMPLETED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75
EXIT_STOPPED = 76
EXIT_CONFIG_REFUSED = 78
EXIT_SECOND_CTRL_C = 130


class OrchestratorError(Exception):
    """Base of all our errors: one paragraph saying what happened, where, and what to do next."""

    exit_code = EXIT_FAILED


class UsageError(OrchestratorError):
    """The user asked for something that cannot be: nothing was started, nothing was damaged."""

    exit_code = EXIT_USAGE


class ConfigRefusedError(OrchestratorError):
    """The run's stored configuration or checkpoint does not fit this program."""

    exit_code = EXIT_CONFIG_REFUSED


class StorageError(OrchestratorError):
    """Storage could not be read or written."""


class CheckpointDamagedError(StorageError):
    """A checkpoint's bytes or manifest are not what was committed."""


class SupersededError(StorageError):
    """Another driver has taken over this run; this one must write nothing more."""
