"""Signals to the driver: before the loop runs one unwinds, then it becomes an event, in the end it is too late."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from orchestrator.control.events import SaveRequested
from orchestrator.errors import EXIT_INTERRUPTED, EXIT_SECOND_CTRL_C, EXIT_STOPPED

if TYPE_CHECKING:
    from orchestrator.driver.shell import Shell


class Interrupted(BaseException):
    """A signal arrived before there was a loop to hear it, or a second Ctrl-C did."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Signals:
    """Handlers of the driver. Raises `Interrupted` out of whatever the main thread does, at most once."""

    def __init__(self) -> None:
        self._shell: Shell | None = None
        self._interrupts = 0
        self._over = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals; called again after Ray has put its own handlers in."""
        handlers = {
            signal.SIGINT: self._person,
            signal.SIGTERM: self._platform,
            signal.SIGHUP: self._platform,
            signal.SIGUSR1: self._platform,
            signal.SIGUSR2: self._save,
        }
        for number, handler in handlers.items():
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run is to outlive its terminal
            previous = signal.signal(number, handler)
            self._previous.setdefault(number, previous)

    def restore(self) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def serve(self, shell: Shell) -> None:
        """From now on signals are events of this loop."""
        self._shell = shell

    def finished(self) -> None:
        """The outcome is certain: only a second Ctrl-C still cuts the clearing up short."""
        self._over = True

    def _person(self, *_: object) -> None:
        self._interrupts += 1
        if self._interrupts > 2:
            return
        if self._interrupts == 2:
            self._raise(EXIT_SECOND_CTRL_C)
        elif self._shell is None:
            self._raise(EXIT_STOPPED)
        elif not self._over:
            self._shell.interrupt("person")

    def _platform(self, *_: object) -> None:
        if self._over:
            return
        if self._shell is None:
            self._raise(EXIT_INTERRUPTED)
        else:
            self._shell.interrupt("platform")

    def _raise(self, exit_code: int) -> None:
        self._over = True
        raise Interrupted(exit_code)

    def _save(self, *_: object) -> None:
        if self._shell is not None:
            self._shell.post_event(SaveRequested())
