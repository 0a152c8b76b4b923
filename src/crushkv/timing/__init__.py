"""Time and memory of requests: measured, written as JSON lines, summed up, plotted."""

from .prompt import repeated_prompt
from .record import ENGINE, FULL, Record, label, read_records, record_of, write_record
from .request import Request, measure_request, rotated, share
from .summary import OWN_STAGES, Figure, Spread, summarize

__all__ = [
    "ENGINE",
    "FULL",
    "OWN_STAGES",
    "Figure",
    "Record",
    "Request",
    "Spread",
    "label",
    "measure_request",
    "read_records",
    "record_of",
    "repeated_prompt",
    "rotated",
    "share",
    "summarize",
    "write_record",
]
