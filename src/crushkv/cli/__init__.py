"""The command line: `crushkv generate`, `run`, `policies`, `doctor`."""

from .app import main

__all__ = ["main"]
