"""Processes that a test interrupts."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """What a process to be interrupted does first: one started in the background inherits deafness to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
