"""Time and memory of requests: measured, written as JSON lines, summed up, plotted."""

from .prompt import repeated_prompt
from .record import Record, read_records, write_record
from .request import measure_request
from .summary import Figure, Spread, summarize

__all__ = [
    "Figure",
    "Record",
    "Spread",
    "measure_request",
    "read_records",
    "repeated_prompt",
    "summarize",
    "write_record",
]
