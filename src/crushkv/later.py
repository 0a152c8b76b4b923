"""Numbers that a device computes, on their way to main memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A number of a device, which the host goes on without until it reads it.

    A GPU that is asked for a number at once runs dry meanwhile: nothing waits in its queue any more.

    Args:
        number: a scalar tensor.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._arrived: torch.cuda.Event | None = None
        if number.is_cuda:
            self._number = number.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(number.device))

    @property
    def under_way(self) -> bool:
        """Whether a device may still be computing it."""
        return self._arrived is not None

    def read(self) -> float:
        """The number; what the device had to do before it is waited for, and nothing behind it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)
