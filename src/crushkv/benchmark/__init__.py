"""Time and memory of requests: measured, written as JSON lines, summed up, plotted."""

from .prompt import repeated_prompt
from .record import ENGINE, FULL, Record, read_records, write_record
from .request import measure_request, share
from .summary import Figure, Spread, summarize

__all__ = [
    "ENGINE",
    "FULL",
    "Figure",
    "Record",
    "Spread",
    "measure_request",
    "read_records",
    "repeated_prompt",
    "share",
    "summarize",
    "write_record",
]
