"""What the driver does with the signals it inherits."""

from __future__ import annotations

import signal

from orchestrator.driver.signals import Signals


def test_nohup_is_respected_and_everything_is_given_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    usual = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    try:
        signals.install()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != usual
        signals.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == usual
    finally:
        signals.restore()
        signal.signal(signal.SIGHUP, before)
