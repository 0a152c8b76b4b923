"""Numbers that a device computes, on their way to main memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A few numbers of a device, which the host goes on without until it reads them.

    A GPU that is asked for a number at once runs dry meanwhile: nothing waits in its queue any more.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = numbers.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    @property
    def under_way(self) -> bool:
        """Whether a device may still be computing them."""
        return self._arrived is not None

    def read(self) -> Tensor:
        """The numbers, in main memory; what the device had to do before is waited for, and nothing behind it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.cpu()
