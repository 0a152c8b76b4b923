"""Quantizing and packing, compiled and plain: for GPUs in `kernels_gpu_cases.py`, for CPUs in `test_compiled.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crushkv import compiled
from crushkv.rope import Rope
from crushkv.storage import ChannelFormat, channels
from crushkv.storage.basis import fit_channels
from crushkv.storage.channels import ChannelTensor
from crushkv.storage.packing import PLANES, pack
from crushkv.storage.quantization import quantize
from stores import rope_of


def both(monkeypatch: pytest.MonkeyPatch, run: Any) -> tuple[Any, Any]:
    """What the compiled form gives, and the plain one."""
    found = run()
    monkeypatch.setenv(compiled.VARIABLE, "plain")
    return found, run()


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape).to(device)


@pytest.mark.parametrize(("size", "tokens"), [(32, 70), (20, 9), (20, 1030)])
def test_keys_by_channel_are_quantized_as_plainly(
    size: int, tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assert compiled.quantizer(device) is not None
    widths = torch.randint(0, 7, (2, size))
    form = ChannelFormat(widths, torch.rand(2, size, device=device))
    x, spread = random(2, 2, tokens, size, device=device), torch.rand(2, 2, 1, size, device=device) + 0.1

    def run() -> tuple[Any, Any]:
        codes = channels.quantize(x, spread, form)
        return codes, ChannelTensor.of(codes, form).tensors

    (codes, planes), (expected, _) = both(monkeypatch, run)
    assert (codes.codes != expected.codes).float().mean() < 1e-3
    assert (codes.scale != expected.scale).float().mean() < 0.02
    for name, plane in ChannelTensor.of(codes, form).tensors.items():  # of the same codes, plainly
        assert torch.equal(plane, planes[name]), name


@pytest.mark.parametrize(("known", "tokens"), [(True, 70), (False, 70), (True, 700), (False, 700)])
def test_the_spread_of_channels_is_fitted_as_plainly(
    known: bool, tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    forms = [ChannelFormat(torch.randint(0, 7, (2, 20)), torch.rand(2, 20, device=device)) for _ in range(2)]
    parts = [random(2, 2, count, 20, device=device) ** 3 for count in (tokens, 0, 9)]
    attended = None
    if known:
        attended = torch.rand(2, 2, tokens + 9, device=device) ** 4
        attended[0, :, ::3] = -1  # empty slots
        attended[1, :, 10:40] = 0.5  # as much as each other
    spread = torch.rand(2, 2, 1, 20, device=device).half() + 0.1

    def run() -> Tensor:
        return channels.fitted_spread(spread, parts, [forms[0], forms[0], forms[1]], attended)

    found, expected = both(monkeypatch, run)
    assert (found != expected).float().mean() < 0.02
    assert (found != spread).any()


@pytest.mark.parametrize(
    "rope", [None, rope_of(32, base=100.0), rope_of(32, base=100.0, turned=20)], ids=["still", "all", "part"]
)
@pytest.mark.parametrize("padded", [False, True])
def test_centres_are_found_and_taken_off_as_plainly(
    rope: Rope | None, padded: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assert compiled.centring(device) is not None
    keys = random(2, 3, 600, 32, device=device) + 5 * random(1, 3, 1, 32, device=device)
    keys = keys[:, :, 7:590]  # as a buffer with room to grow
    rope = None if rope is None else rope.to(device)
    positions = torch.arange(60_000, 60_000 + keys.shape[2], device=device)[None, None]
    real = torch.rand(2, keys.shape[2], device=device) > 0.3 if padded else None
    indices = torch.randint(keys.shape[2], (2, 3, 50), device=device)[..., 5:]  # as a part of more

    def run() -> tuple[Tensor, ...]:
        basis = fit_channels(keys, positions, real, rope)
        assert basis.centre is not None and basis.spread is not None
        places = positions.expand(2, 3, -1).gather(2, indices)
        return basis.centre, basis.spread, basis.taken(keys, indices, places)

    for found, expected in zip(*both(monkeypatch, run), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("size", "tokens"), [(32, 21), (36, 601)])
@pytest.mark.parametrize("bits", sorted(PLANES))
def test_tokens_are_quantized_as_plainly(
    bits: int, size: int, tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = random(2, 2, tokens, size, device=device) * torch.logspace(-6, 3, tokens, device=device)[:, None]

    def run() -> tuple[Any, Any]:
        codes = quantize(x, size // 2)
        return codes, pack(codes.codes >> (8 - bits), bits)

    (codes, planes), (expected, _) = both(monkeypatch, run)
    assert (codes.span != expected.span).float().mean() < 0.02
    assert (codes.codes != expected.codes).float().mean() < 0.02
    for plane, other in zip(planes, pack(codes.codes >> (8 - bits), bits), strict=True):
        assert torch.equal(plane, other)


def test_no_tokens_take_no_bytes(device: torch.device) -> None:
    """Heads that need little may leave a tier empty."""
    x, spread = random(2, 2, 0, 20, device=device), torch.ones(2, 2, 1, 20, device=device)
    codes = quantize(x, 10)
    for bits in PLANES:
        assert all(plane.shape == (2, 2, 0, 20) for plane in pack(codes.codes, bits))
    form = ChannelFormat(torch.randint(0, 7, (2, 20)), torch.rand(2, 20, device=device))
    tensors = ChannelTensor.of(channels.quantize(x, spread, form), form).tensors
    assert all(tensor.numel() == 0 for tensor in tensors.values())
