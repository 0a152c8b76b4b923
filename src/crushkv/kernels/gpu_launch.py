"""Launches of kernels that differ in little from one time to the next."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compiled import FUSED


class Launch:
    """A kernel with its arguments, of which a few are given each time.

    Triton looks at every argument of a launch to find the code that was compiled for such ones, which takes longer than
    many a kernel runs. What changes here must never ask for other code: a pointer or a number that changes is either
    not specialised on, or a launch serves only those that are alike in it.

    Args:
        kernel: Triton's function.
        arguments: those that stay, by name. After the first launch only their addresses are known here: tensors may
            go in the meantime, but the next launch needs them in place.
        changing: names of the others.
        options: of the compiler.
    """

    def __init__(self, kernel: Any, arguments: dict[str, Any], changing: tuple[str, ...], **options: Any) -> None:
        self._kernel, self._arguments, self._changing, self._options = kernel, arguments, changing, options
        self._compiled: Any = None
        self._values: list[Any] = []
        self._places: list[int] = []

    def __call__(self, grid: tuple[int, int, int], *changing: Any) -> None:
        if self._compiled is None:
            given = dict(zip(self._changing, changing, strict=True))
            compiled = self._kernel[grid](**self._arguments, **given, **FUSED, **self._options)
            if compiled is not None:  # the interpreter compiles nothing
                self._keep(compiled)
            return
        values = self._values.copy()
        for place, value in zip(self._places, changing, strict=True):
            values[place] = value.data_ptr() if isinstance(value, Tensor) else value
        self._compiled[grid](*values)

    def _keep(self, compiled: Any) -> None:
        names = self._kernel.arg_names
        self._values = [address(self._arguments.get(name)) for name in names]
        self._places = [names.index(name) for name in self._changing]
        self._compiled, self._arguments = compiled, {}


def address(value: Any) -> Any:
    """Where a tensor lies; anything else is what it is."""
    return value.data_ptr() if isinstance(value, Tensor) else value
