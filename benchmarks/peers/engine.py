"""An engine of the comparison: asks its worker, and goes on where that one fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from process import Worker, WorkerError

Record = dict[str, Any]
WARM_UP = {"tokens": 512, "batch": 1, "new_tokens": 2}
ATTEMPTS = 2  # after so many ends of the worker, a method is not asked for again


class Engine:
    """Asks one worker, which runs from the first need of it until `stop`.

    Args:
        name: as in the records.
        command: that starts the worker.
        threads: that it computes with.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self._command = command
        self._threads = threads
        self._worker: Worker | None = None
        self._warm: set[str] = set()
        self._ended: Counter[str] = Counter()

    def start(self) -> Worker:
        """The worker. Raises `WorkerError` where it cannot be started."""
        if self._worker is None:
            self._worker, self._warm = Worker(self._command, self._threads), set()
        return self._worker

    def ask(self, request: Record) -> Record:
        """The record of a request; before a method's first one, a small one that is not measured."""
        method = request["method"]
        record = {"kind": "request", "engine": self.name, **request}
        if self._ended[method] == ATTEMPTS:
            return {**record, "error": f"not asked again: the worker ended {ATTEMPTS} times"}
        try:
            worker = self.start()
            if method not in self._warm:
                worker.ask({**request, **WARM_UP})
                self._warm.add(method)
            return worker.ask(request)
        except WorkerError as error:
            self._ended[method] += 1
            self.stop()
            return {**record, "error": str(error)}

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
