"""The driver's end of a worker: starts the process, asks it, and ends it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any


class WorkerError(Exception):
    """The process cannot be started, or has ended."""


class Worker:
    """One worker process.

    Attributes:
        methods: what it offers; to each the only budget that it has, `"any"`, or None for the full cache.
        versions: of the packages that its figures depend on.

    Raises:
        WorkerError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        try:
            self._process = subprocess.Popen(
                [*command, "--threads", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise WorkerError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            offer = self._read()
        except BaseException:
            self.stop()
            raise
        self.methods: dict[str, float | str | None] = offer["methods"]
        self.versions: dict[str, str] = offer["versions"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The record of a request. Raises `WorkerError` where the process ends instead of answering."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then reading tells why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """Ends the process. It keeps nothing, so there is nothing to wait for."""
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            return dict(json.loads(line))
        status = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().strip().splitlines()
        raise WorkerError(f"the worker ended with status {status}" + (f": {said[-1][:300]}" if said else ""))
