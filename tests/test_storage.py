"""How kept tokens are held: packing, quantization and projection against plain code, bytes against arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from crushkv.config import CrushConfig
from crushkv.core import Tier, select, split_bytes, split_tokens
from crushkv.rope import Rope
from crushkv.storage import RAW, Formats, KeyEnergy, LastQueries, LayerSizes, TieredStorage, channel_formats
from crushkv.storage.basis import fit
from crushkv.storage.packing import PLANES, pack, packed_bytes, unpack
from crushkv.storage.quantization import dequantize, group_length, groups, narrowed, quantize, widened
from crushkv.storage.rotation import rotation
from crushkv.storage.widths import allocate, channel_bits
from crushkv.storage.workspace import Workspace
from reference import dequantized, quantized
from stores import rope_of

WIDTHS = sorted(PLANES)
ODD = [1, 2, 3, 7, 8, 9, 64, 65]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tokens", ODD)
@pytest.mark.parametrize("size", [1, 3, 4, 16, 80])
def test_codes_come_back_from_their_bytes(bits: int, tokens: int, size: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, tokens, size), dtype=torch.uint8)
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes, bits, tokens), codes)
    assert sum(plane.nbytes for plane in planes) == 2 * 3 * packed_bytes(tokens, size, bits)
    # Never more than the bits themselves, but for bytes that are not full.
    full = tokens * size * bits / 8
    assert full <= packed_bytes(tokens, size, bits) < full + size * len(planes)


@settings(deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 20), st.integers(1, 96), st.integers(1, 128), st.integers(0, 99))
def test_quantization_equals_plain_code(bits: int, tokens: int, size: int, group_size: int, seed: int) -> None:
    x = torch.randn(1, 2, tokens, size, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 5 - 2)
    found = quantize(x, group_size)
    out = torch.empty_like(x)
    dequantize(narrowed(found.codes, bits), found.zero, found.span, bits, out)
    length = group_length(size, group_size)
    assert size % length == 0 and found.zero.shape[-1] == size // length == groups(size, group_size)
    for head, token in itertools.product(range(2), range(tokens)):
        for start in range(0, size, length):
            numbers = x[0, head, token, start : start + length].tolist()
            codes, low, span = quantized(numbers, bits)
            expected = dequantized(codes, low, span, bits)
            cell = span / 2**bits
            # In float32, zero may be rounded to the place beside, where it lies between two.
            least, most = min(0.0, *numbers), max(0.0, *numbers)
            place = (span - most - least) / (2 * span) * 255 % 1
            moved = span / 255 * (abs(place - 0.5) < 1e-3)
            held = out[0, head, token, start : start + length].tolist()
            for number, got, want in zip(numbers, held, expected, strict=True):
                assert abs(number - want) <= cell / 2 * 1.001
                # In float32, a number on the border of two cells may fall into either. Borders move with zero.
                border = (number - low) / cell
                on_border = abs(border - round(border)) < 1e-3 + moved / cell
                # Float32 rounds at the size of the span, however small the number.
                assert got == pytest.approx(want, rel=1e-4, abs=1e-5 + 1e-6 * span + cell * on_border + moved)


def test_codes_nest() -> None:
    """Fewer bits of the 8-bit code are the code of fewer bits; more bits of it lead back."""
    every = torch.arange(256, dtype=torch.uint8)
    for bits in WIDTHS:
        codes = narrowed(every, bits)
        assert torch.equal(codes, every // 2 ** (8 - bits))
        assert torch.equal(narrowed(widened(codes, bits), bits), codes)
        for fewer in (width for width in WIDTHS if width < bits):
            assert torch.equal(narrowed(widened(codes, bits), fewer), narrowed(every, fewer))


@pytest.mark.parametrize(("size", "group_size", "length"), [(64, 64, 64), (128, 64, 64), (80, 64, 40), (67, 64, 67)])
def test_groups_divide_a_head(size: int, group_size: int, length: int) -> None:
    assert group_length(size, group_size) == length


@pytest.mark.parametrize("size", [1, 2, 3, 16, 64, 80, 96, 128, 5 * 7])
def test_the_rotation_is_orthogonal_and_spreads(size: int) -> None:
    matrix = rotation(size, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    # One large channel becomes a part of all of them.
    assert matrix.abs().max() <= math.sqrt(2 / size) + 1e-6 or size == 1


def test_a_projection_equals_a_singular_value_decomposition() -> None:
    x = torch.randn(2, 3, 50, 16) @ torch.diag(0.7 ** torch.arange(16.0)) + 3
    real = torch.ones(2, 50, dtype=torch.bool)
    real[1, :20] = False
    positions = torch.arange(50)[None, None]
    basis = fit(x, positions, real, centred=True, rotate=True, rank=5)
    back = basis.coordinates(x, positions) @ basis.projection.transpose(-1, -2) + basis.centre  # type: ignore[union-attr]
    for row, head in itertools.product(range(2), range(3)):
        tokens = x[row, head][real[row]]
        mean = tokens.mean(0)
        u, s, v = torch.linalg.svd(tokens - mean, full_matrices=False)
        expected = u[:, :5] * s[:5] @ v[:5] + mean
        assert torch.allclose(back[row, head][real[row]], expected, atol=1e-3)


def test_a_share_of_the_energy_decides_the_rank() -> None:
    scale = torch.tensor([10.0, 5.0, 1.0, 0.1])
    x = torch.linalg.qr(torch.randn(40, 4))[0] * scale
    energy = (scale**2).cumsum(0) / (scale**2).sum()
    for rank in (1, 2, 3):
        for share in (float(energy[rank - 1]) - 1e-3, float(energy[rank - 1]) + 1e-4):
            basis = fit(x[None, None], torch.arange(40)[None, None], None, centred=False, rotate=False, rank=share)
            assert basis.projection is not None
            assert basis.projection.shape[-1] == rank + (share > float(energy[rank - 1]))


FORMATS = [
    Formats((4, 4), (4, 4)),
    Formats((8, 8), (2, 2)),
    Formats((4, 3), (2, 3), group_size=8),
    Formats((3, 3), (3, 3), rotation=False),
    Formats((RAW, 4), (RAW, 4)),
    Formats((RAW, RAW), (RAW, RAW), rank=5),
    Formats((8, 4), (4, 2), rank=5),
    Formats((4, 4), (2, 2), (8, 8)),
    Formats((4, 3), (4, 3), (4, 4), rank=5),
    Formats((2.25, 2), (2.25, 2), by_channel=True),
    Formats((4, 4), (1.5, 2), (8, 8), by_channel=True),
    Formats((8, 4), (3, 4), (8, 8), by_channel=True),
]


def filled(formats: Formats, tokens: int = 60, dtype: torch.dtype = torch.float32) -> tuple[TieredStorage, Any, Any]:
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 3, tokens, size).to(dtype) for size in (16, 12))
    keys[..., 3] += 20  # a channel as keys have them
    storage = TieredStorage(formats)
    storage.append(keys, values)
    storage.fit(None)
    return storage, keys, values


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_held_are_the_arithmetic(formats: Formats, dtype: torch.dtype) -> None:
    for important, representative, kept in ((31, 9, 10), (1, 1, 1), (40, 0, 5), (0, 17, 5)):
        storage, *_ = filled(formats, dtype=dtype)
        tokens = important + representative + kept
        both = (important, representative) if len(formats.contested) == 2 else (important + representative,)
        lengths = (*both, kept, 0) if formats.recent_block else (*both, kept)
        storage.keep(torch.arange(tokens).expand(2, 3, -1), lengths)
        sizes = storage.sizes()
        assert storage.nbytes == 2 * sizes.tiers(kept, important, representative)
        halves = LayerSizes(formats, sizes.kv_heads, sizes.sizes, sizes.ranks, raw_bytes=2)
        assert storage.nbytes_at_16_bits == 2 * halves.tiers(kept, important, representative)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_token_is_quantized_once(formats: Formats) -> None:
    """Twenty times the tokens are shuffled between the tiers, and new ones come: codes stay what they were."""
    storage, keys, values = filled(formats)
    origin = torch.arange(60).expand(2, 3, -1)  # which token lies in each slot
    narrowest = torch.full((2, 3, 260), 2)  # 0: was representative; 1: was important; 2: was neither
    for step in range(20):
        order = torch.rand(2, 3, storage.length).argsort(-1)
        dense_slots = storage.blocked
        # What was quantized never becomes raw again.
        order = torch.stack([row[row < dense_slots] for row in order.flatten(0, 1)]).view(2, 3, -1) if step else order
        new = torch.arange(dense_slots, storage.length).expand(2, 3, -1) if step else order[..., :0]
        slots = torch.cat([new[..., :-4], order], dim=-1) if step else order[..., :-4]
        tail = new[..., -4:] if step else order[..., -4:]
        half = slots.shape[-1] // 2
        contested = (half, slots.shape[-1] - half) if len(formats.contested) == 2 else (slots.shape[-1],)
        lengths = (*contested, 4, 0) if formats.recent_block else (*contested, 4)
        indices = torch.cat([slots, tail], dim=-1)
        storage.keep(indices, lengths)
        origin = origin.gather(-1, indices)
        tiers = [1, 0] if len(contested) == 2 else [1]
        start = 0
        for tier, length in zip(tiers, lengths, strict=False):
            inside = origin[..., start : start + length]
            narrowest.scatter_(-1, inside, narrowest.gather(-1, inside).clamp(max=tier))
            start += length
        added = [torch.randn(2, 3, 10, x.shape[-1]) for x in (keys, values)]
        keys, values = torch.cat([keys, added[0]], dim=2), torch.cat([values, added[1]], dim=2)
        origin = torch.cat([origin, torch.arange(keys.shape[2] - 10, keys.shape[2]).expand(2, 3, -1)], dim=-1)
        storage.append(*added)
    assert storage.bases is not None
    for which, (x, read) in enumerate(zip((keys, values), storage.read(), strict=True)):
        if formats.by_channel and not which:
            continue  # see below
        basis = storage.bases[which]
        coordinates = basis.coordinates(x, torch.arange(x.shape[2])[None, None])
        found = basis.coordinates(read, storage.positions)
        error = (found - coordinates.gather(2, origin[..., None].expand_as(found))).abs()
        level = narrowest.gather(-1, origin)
        for tier, of in ((2, formats.recent), (1, formats.important), (0, formats.representative)):
            bits = of[which]
            if bits == RAW:
                continue
            length = group_length(coordinates.shape[-1], formats.group_size)
            span = coordinates.unflatten(-1, (-1, length))
            # A span holds zero, and is a power of two in eighths.
            span = 1.1 * (span.amax(-1).clamp(min=0) - span.amin(-1).clamp(max=0)).repeat_interleave(length, -1)
            span = span.gather(2, origin[..., None].expand_as(found))
            at = (level == tier) & (torch.arange(level.shape[-1]) < storage.blocked)
            # Half a cell, and half a finer one for what came back to the wider tier.
            bound = span / 2 ** (bits + 1) + span / 2 ** (formats.important[which] + 1) + 0.02
            assert (error <= bound)[at].all()
            assert at.any() or (tier == 0 and len(formats.contested) == 1)


ROPE = Rope(
    torch.tensor([*range(8, 16), *range(8)]), torch.cat([-(0.5 ** torch.arange(8.0)), 0.5 ** torch.arange(8.0)])
)


@pytest.mark.parametrize("rope", [None, ROPE], ids=["no RoPE", "RoPE"])
@pytest.mark.parametrize("known", [True, False], ids=["attention is known", "unknown"])
def test_keys_with_widths_by_channel_equal_the_plain_rounding(rope: Rope | None, known: bool) -> None:
    torch.manual_seed(1)
    keys = torch.randn(2, 3, 40, 16) * torch.linspace(0.2, 4, 16)
    if rope is not None:
        keys = rope.turned(keys + 30 * torch.randn(3, 1, 16), torch.arange(40))
    queries = torch.randn(2, 6, 5, 16) * torch.linspace(3, 0.1, 16)
    formats = Formats((3, RAW), (1.5, RAW), by_channel=True)
    storage = TieredStorage(formats)
    storage.append(keys, keys)
    storage.fit(None, rope, query_energy=queries.square().sum((0, 2)))
    attended = torch.rand(2, 3, 40) ** 8
    attended[1, :, 3] = -1  # an empty slot
    storage.keep(torch.arange(40).expand(2, 3, -1), (20, 16, 4), attended if known else None)
    (basis, _), (found, _) = storage.bases or (), storage.read()
    assert basis.centre is not None and basis.spread is not None
    for row, head in itertools.product(range(2), range(3)):
        centre = basis.centre[row, head].expand(40, -1)
        centre = centre if rope is None else reference.turned(centre, range(40), rope)
        spread = basis.spread[row, head, 0].float()
        rest = keys[row, head] - centre
        energy = rest.square().mean(0)
        energy = energy if rope is None else (energy + energy[rope.partner]) / 2
        ranges = (range(20), range(20, 36))
        counted = attended[row, head].tolist() if known else [1.0] * 40
        parts = [
            (rest[tokens], counted[tokens.start : tokens.stop], form.widths[head].tolist())
            for form, tokens in zip(storage.forms, ranges, strict=True)
            if form is not None
        ]
        chosen = (spread / energy.sqrt() - torch.tensor(reference.SPREADS)[:, None]).abs().min(0)
        assert (chosen.values < 5e-3).all()
        errors = reference.spread_errors(parts, energy.sqrt())
        assert (errors.gather(0, chosen.indices[None]) <= errors.amin(0) + 0.01).all()
        for form, tokens in zip(storage.forms, ranges, strict=True):
            assert form is not None
            for token in tokens:
                numbers = reference.rounded_channels(rest[token], spread, form.widths[head].tolist(), form.weight[head])
                assert torch.allclose(found[row, head, token], numbers + centre[token], atol=1e-4)
    assert torch.allclose(found[:, :, 36:], keys[:, :, 36:])
    # A constant before RoPE, thirty times the spread, is no part of the error.
    assert (found - keys)[:, :, :20].square().mean() < 0.25 * torch.linspace(0.2, 4, 16).square().mean()


def test_keys_that_are_attended_to_are_rounded_best() -> None:
    """They have larger numbers than the others, as such keys have, and the others lose next to nothing by that."""
    torch.manual_seed(3)
    keys = torch.randn(1, 2, 2000, 32)
    keys[:, :, ::100] *= 4
    attended = torch.full((1, 2, 2000), 1e-4)
    attended[:, :, ::100] = 0.05
    errors = []
    for known in (torch.ones_like(attended), attended):
        storage = TieredStorage(Formats((3, RAW), (3, RAW), by_channel=True))
        storage.append(keys, keys)
        storage.fit(None, None, query_energy=torch.ones(2, 32))
        storage.keep(torch.arange(2000).expand(1, 2, -1), (2000, 0), known)
        error = (storage.read()[0] - keys).square().mean(-1)
        errors.append((float(error[..., ::100].mean()), float(error.mean())))
    (of_them, of_all), (of_them_known, of_all_known) = errors
    assert of_them_known < of_them and of_all_known < 1.1 * of_all, errors


def test_codes_of_a_block_move_and_are_not_made_anew() -> None:
    formats = Formats((3, 4), (1.5, 2), (8, 8), by_channel=True)
    storage, *_ = filled(formats)
    storage.keep(torch.arange(60).expand(2, 3, -1), (30, 20, 10, 0))
    before = storage.read()[0].clone()
    # Within each block another order, and a token of each block less.
    order = torch.cat([torch.randperm(30)[:29], 30 + torch.randperm(20)[:19], 50 + torch.randperm(10)[:9]])
    storage.keep(order.expand(2, 3, -1), (29, 19, 9, 0))
    assert torch.allclose(storage.read()[0], before[:, :, order], atol=1e-5)
    assert torch.equal(storage.positions, order.expand(2, 3, -1))
    # A token of the first block in the second one is coded from what it stood for.
    storage.keep(torch.arange(57).expand(2, 3, -1), (10, 38, 9, 0))
    after = storage.read()[0]
    assert torch.allclose(after[:, :, :10], before[:, :, order[:10]], atol=1e-5)
    assert torch.allclose(after[:, :, 29:], before[:, :, order[29:]], atol=1e-5)
    assert (after[:, :, 10:29] - before[:, :, order[10:29]]).abs().max() > 0.1


def test_a_layer_that_the_profile_has_not_foreseen_gets_wider_channels() -> None:
    torch.manual_seed(2)
    keys, values = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    queries = torch.zeros(1, 4, 8, 16)
    queries[..., 3] = 40.0  # all of the queries' energy is where the profile has none
    last = LastQueries(queries, 16**-0.5, limit=1.0, sink=4)
    energy = torch.ones(2, 16)
    energy[:, 3] = 1e-6
    formats = Formats((2, 2), (2, 2), by_channel=True)

    def held(last: LastQueries | None) -> TieredStorage:
        storage = TieredStorage(formats)
        storage.append(keys, values)
        storage.fit(None, None, channel_formats(formats, KeyEnergy(energy, energy), keys.device), last=last)
        storage.keep(torch.arange(300).expand(1, 2, -1), (264, 36))
        return storage

    def error(storage: TieredStorage) -> float:
        rest = storage.read()[0][:, :, :264] - keys[:, :, :264]
        logits = queries.view(1, 2, -1, 16) @ rest.transpose(-1, -2) * 16**-0.5
        return float(logits.square().mean().sqrt())

    storage, blind = held(last), held(None)
    assert storage.widened_by >= 1 and storage.formats.important == (2 + storage.widened_by, 2)
    assert error(storage) <= 1.1 < 5 < error(blind)
    # It is counted, and comes back with the state.
    assert storage.nbytes == storage.sizes().tiers(36, 264, 0)
    again = TieredStorage(formats)
    again.load_state(storage.state(), storage.seen)
    assert again.widened_by == storage.widened_by and again.nbytes == storage.nbytes
    assert torch.equal(again.read()[0], storage.read()[0])
    # A layer as the profile has it is left as it was asked for.
    usual = held(LastQueries(torch.randn(1, 4, 8, 16), 16**-0.5, limit=1.0))
    assert usual.widened_by == 0 and usual.formats == formats


@pytest.mark.parametrize("profile", [True, False])
def test_heads_that_part_are_held_as_if_they_had_been_alone(profile: bool) -> None:
    """Coordinates, widths, and whether these suffice: found once for a layer, they are those of each group of heads."""
    torch.manual_seed(3)
    keys, values = torch.randn(2, 4, 200, 16) * torch.rand(4, 1, 16), torch.randn(2, 4, 200, 16)
    queries = torch.randn(2, 8, 8, 16)
    queries[:, 6:, :, 3] = 40.0  # the last head's, where the profile has no energy
    energy = torch.ones(4, 16)
    energy[:, 3] = 1e-6
    formats = Formats((2, 2), (2, 2), by_channel=True)

    def fitted(heads: list[int]) -> TieredStorage:
        of_queries = [2 * head + i for head in heads for i in range(2)]
        storage = TieredStorage(formats)
        storage.append(keys[:, heads], values[:, heads])
        own = KeyEnergy(energy[heads], energy[heads])
        forms = channel_formats(formats, own, keys.device) if profile else ()
        squares = queries[:, of_queries].square().sum((0, 2))
        last = LastQueries(queries[:, of_queries], 16**-0.5, limit=1.0, sink=4)
        storage.fit(None, rope_of(16), forms, squares, last)
        return storage

    whole, widened = fitted([0, 1, 2, 3]), []
    for heads in ([0, 2], [1, 3]):
        alone = fitted(heads)
        parted = whole.parted(lambda x, dim, heads=heads: x.index_select(dim, torch.tensor(heads)))
        assert parted.seen == alone.seen and torch.equal(parted.positions, alone.positions)
        for storage in (alone, parted):
            storage.keep(torch.arange(0, 200, 2).expand(2, 2, -1), (80, 20))
        one, other = alone.state(), parted.state()
        assert one.keys() == other.keys() and alone.nbytes == parted.nbytes
        assert alone.state_nbytes == parted.state_nbytes and alone.widened_by == parted.widened_by
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], msg=name)
        widened.append(parted.widened_by)
    assert not profile or (widened[0] == 0 and widened[1] > 0)


def test_heads_that_part_and_stay_as_they_are_have_memory_of_their_own() -> None:
    storage = TieredStorage(Formats())
    storage.append(torch.randn(1, 4, 50, 16), torch.randn(1, 4, 50, 16))
    part = storage.parted(lambda x, dim: x.narrow(dim, 0, 1))
    part.dense.copied()
    assert part.nbytes * 4 == storage.nbytes and torch.equal(part.read()[0], storage.read()[0][:, :1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1000), min_size=4, max_size=24), st.floats(1, 6))
def test_widths_are_those_that_bits_one_by_one_lead_to(energy: list[float], mean: float) -> None:
    bits = channel_bits(mean, len(energy))
    distinct = torch.tensor(energy).double() + 1e-3 * torch.rand(len(energy), dtype=torch.float64) + 1e-6
    found = allocate(distinct[None], mean)[0]
    assert found.tolist() == reference.widths(distinct.tolist(), bits)
    assert int(found.sum()) == bits and int(found.max()) <= 6


def test_attention_over_rotated_keys_is_attention() -> None:
    storage, keys, values = filled(Formats((8, 8), (8, 8)), tokens=40)
    storage.keep(torch.arange(40).expand(2, 3, -1), (30, 10))
    query = torch.randn(2, 3, 5, 16)
    turn_keys, turn_values = storage.rotations()
    assert turn_keys is not None and turn_values is not None
    rotated_keys, rotated_values = storage.attended()
    found = (
        torch.nn.functional.scaled_dot_product_attention(query @ turn_keys, rotated_keys, rotated_values)
        @ turn_values.T
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, *storage.read())
    assert torch.allclose(found, expected, atol=1e-5)
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    assert (found - exact).abs().max() < 0.1
    # Tokens outside of the blocks come back exactly.
    assert torch.allclose(storage.read()[0][:, :, 30:], keys[:, :, 30:], atol=1e-5)


def test_one_layer_is_unpacked_at_a_time() -> None:
    workspace = Workspace()
    layers = [TieredStorage(Formats((4, 4), (4, 4)), workspace=workspace) for _ in range(5)]
    for layer in layers:
        layer.append(torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16))
        layer.fit(None)
        layer.keep(torch.arange(50).expand(1, 2, -1), (40, 10))
    first = layers[0].attended()[0]
    again = layers[1].attended()[0]
    assert first.data_ptr() == again.data_ptr()
    one = 2 * 2 * 50 * 16 * 4
    assert one <= workspace.nbytes <= 1.2 * one


OPTIONS = st.builds(
    CrushConfig,
    sink=st.integers(0, 4),
    window=st.integers(1, 20),
    page_size=st.sampled_from([1, 4, 16]),
    representative_share=st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.7]),
)


@settings(max_examples=200, deadline=None)
@given(OPTIONS, st.integers(1, 400), st.integers(0, 200_000), st.sampled_from(FORMATS))
def test_a_split_is_the_largest_that_fits(config: CrushConfig, held: int, limit: int, formats: Formats) -> None:
    sizes = LayerSizes(formats, 3, (16, 12), (16, 12) if formats.rank is None else (5, 5), 2)
    found = split_bytes(limit, held, config, sizes)
    every = [
        split_tokens(budget, held, config, sizes) for budget in range(min(held, config.sink + config.window), held + 1)
    ]
    fitting = [split for split in every if split.nbytes <= limit]
    assert found.tokens == max((split.tokens for split in fitting), default=every[0].tokens)
    assert [split.nbytes for split in every] == sorted(split.nbytes for split in every)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.35, 0.45, 0.7, 0.9])
def test_a_split_has_the_tiers_of_the_selection(share: float) -> None:
    """Shares of a count may end in a half, where the last bit of a product decides how it is rounded."""
    config = CrushConfig(sink=0, window=1, page_size=1, representative_share=share)
    sizes = LayerSizes(FORMATS[0], 1, (16, 16), (16, 16), 2)
    for budget in range(2, 100):
        split = split_tokens(budget, 200, config, sizes)
        scores = torch.arange(200.0).expand(1, 1, -1)
        tiers = select(scores, 1, torch.tensor([budget]), config).kept.tiers
        assert split.representative == int((tiers == Tier.REPRESENTATIVE).sum())
        assert split.important == int((tiers == Tier.IMPORTANT).sum())
