"""What is compiled for CPUs gives what the plain forms give, with each set of instructions that this processor has."""

from __future__ import annotations

import pytest
import torch

from compiled_cases import (  # noqa: F401
    test_centres_are_found_and_taken_off_as_plainly,
    test_keys_by_channel_are_quantized_as_plainly,
    test_no_tokens_take_no_bytes,
    test_the_spread_of_channels_is_fitted_as_plainly,
    test_tokens_are_quantized_as_plainly,
)
from crushkv.compiled import cpu_basis, cpu_library
from crushkv.storage import ChannelFormat, channels
from crushkv.storage.quantization import quantize

BUILDS = [build for build in cpu_library.BUILDS if cpu_library.load(build) is not None]
pytestmark = pytest.mark.skipif(not BUILDS, reason="the library was not built")


@pytest.fixture(params=BUILDS, autouse=True)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_library, "build", lambda: request.param)
    return request.param


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_read_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 90, 20, dtype=dtype)[:, :, 5:]
    indices = torch.randint(85, (2, 3, 70))
    found = cpu_basis.coordinates(x, indices, indices, None, None)
    assert torch.equal(found, x.gather(2, indices[..., None].expand(-1, -1, -1, 20)).float())
    torch.testing.assert_close(cpu_basis.mean(x, torch.arange(85), None, None), x.float().mean(2, keepdim=True))


def test_no_tokens() -> None:
    form = ChannelFormat(torch.full((2, 8), 3), torch.ones(2, 8))
    none = torch.empty(1, 2, 0, 8)
    assert channels.ChannelTensor.of(channels.quantize(none, torch.ones(1, 2, 1, 8), form), form).tokens == 0
    assert quantize(none, 8).codes.shape == none.shape


def test_numbers_that_are_not_finite_stay_within_the_codes() -> None:
    """What a broken model computes must not end the process."""
    form = ChannelFormat(torch.full((1, 8), 3), torch.ones(1, 8))
    for odd in (float("nan"), float("inf"), -float("inf")):
        x = torch.full((1, 1, 3, 8), odd)
        assert int(channels.quantize(x, torch.ones(1, 1, 1, 8), form).codes.max()) < 8
        quantize(x, 8)
