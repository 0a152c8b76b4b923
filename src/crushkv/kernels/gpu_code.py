# mypy: disable-error-code="no-untyped-def"
"""The GPU's code, in Triton. `gpu` calls it, and says what the tensors hold.

Letters: B rows, H query heads, Hkv KV heads, G query heads a KV head, P tokens of a block, D channels of a key, E
channels of a value. Logits are in units of log2, so that `exp2` takes them.

Packed bytes are read as words of four. The bits of a code are those of a subnormal float16: the code times UNIT, which
is 2 ** -24, and a power of two more where they do not begin at the lowest bit. So a mask makes numbers of two codes of
a word, those of the bytes 0 and 2, or 1 and 3. Matrix units multiply subnormal numbers as exactly as others.

A block's tokens are walked in tiles of TILE tokens: PART neighbours of each of 8 stretches, of `length` tokens each. In
a plane of w bits, the tokens at the same place of 8 / w stretches share a byte, so that a tile has all that is in its
bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..compiled import interpreted


@triton.jit(do_not_specialize=["queried", "positions", "rows", "shares"], do_not_specialize_on_alignment=["queries"])
def prepare_queries(
    weights,  # float16 [blocks, B * H, SLOTS]
    offsets,  # float32 [blocks, B * H]
    turned,  # [B * H, D]: queries @ rotation
    of_centre,  # float32 [B * Hkv, positions, G_FILLED]
    queries,  # [B * H, D]
    channels,  # int32 [blocks, Hkv, SLOTS], of the slots
    units,  # float32 [blocks, B, Hkv, SLOTS], of their codes; 0: the slot is empty
    middles,  # float32 [blocks, Hkv, SLOTS], of their codes
    first,  # int32 [K], see `Turning`
    second,
    of_first,  # float32 [B, Hkv, K], see `Centre`
    of_second,
    table,  # float16 [positions, K]
    table_rest,
    rotation,  # float32 [D, D]
    queried,  # B * H
    positions,
    rows,  # programs of the first kind: `queried`, or 0 where neither weights nor a rotation are asked for
    shares,  # programs of the second kind that share the positions
    factor,
    D,
    KV_HEADS,
    G: tl.constexpr,
    G_FILLED: tl.constexpr,
    BLOCKS: tl.constexpr,  # whose keys have widths by channel
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    D_FILLED: tl.constexpr,
    EXACT: tl.constexpr,
    TURNED: tl.constexpr,
):
    """What is needed of the queries besides themselves. Programs: rows and query heads, then parts of the centre's
    logits, which are shares of the positions of ROWS query heads each."""
    program = tl.program_id(0)
    if program < rows:
        if BLOCKS > 0:
            _weights(
                weights, offsets, queries, channels, units, middles, queried, factor, D, KV_HEADS, program,
                G, BLOCKS, SLOTS,
            )  # fmt: skip
        if TURNED:
            _turn(turned, queries, rotation, D, program, D_FILLED)
    else:
        part = program - rows
        _centre_logits(
            of_centre, queries, first, second, of_first, of_second, table, table_rest, queried // G, positions, factor,
            D, part // shares, part % shares, shares, G, G_FILLED, K, ROWS, TILE, EXACT,
        )  # fmt: skip


@triton.jit
def _weights(
    weights, offsets, queries, channels, units, middles, queried, factor, D, KV_HEADS, row, G: tl.constexpr,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Weights are what the codes of each plane's rows are multiplied with; offsets, the product with the middles of the
    codes, which each logit is too large by."""
    slots = tl.arange(0, SLOTS)
    for block in tl.static_range(BLOCKS):
        at = (block * KV_HEADS + row // G % KV_HEADS) * SLOTS + slots
        q = tl.load(queries + row * D + tl.load(channels + at)).to(tl.float32)
        w = (q * tl.load(units + (block * (queried // G) + row // G) * SLOTS + slots) * factor).to(tl.float16)
        tl.store(weights + (block * queried + row) * SLOTS + slots, w)
        tl.store(offsets + block * queried + row, tl.sum(w.to(tl.float32) * tl.load(middles + at), 0))


@triton.jit
def _turn(turned, queries, rotation, D, row, D_FILLED: tl.constexpr):
    e = tl.arange(0, D_FILLED)
    sums = tl.zeros([D_FILLED], tl.float32)
    for begin in range(0, D, 16):
        d = begin + tl.arange(0, 16)
        q = tl.load(queries + row * D + d, mask=d < D, other=0).to(tl.float32)
        matrix = tl.load(rotation + d[:, None] * D + e[None, :], mask=(d < D)[:, None] & (e < D)[None, :], other=0)
        sums += tl.sum(q[:, None] * matrix, 0)
    tl.store(turned + row * D + e, sums.to(turned.dtype.element_ty), mask=e < D)


@triton.jit
def _centre_logits(
    out, queries, first, second, of_first, of_second, table, table_rest, heads, positions, factor, D, part, share,
    shares, G: tl.constexpr, G_FILLED: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """`out [B * Hkv, positions, G_FILLED]`: the product of each query with its head's centre, turned to each position.

    It is `z @ table.T` with `z[k] = q[first[k]] * of_first[k] + q[second[k]] * of_second[k]`. EXACT: numbers are split
    into two of float16 each, so that the product is as exact as one in float32.

    heads: B * Hkv. The query heads of each are filled up to a power of two, whose logits of a position lie side by
    side.
    """
    HEADS: tl.constexpr = ROWS // G_FILLED
    k, r = tl.arange(0, K), tl.arange(0, ROWS)
    head = part * HEADS + r // G_FILLED
    real = ((head < heads) & (r % G_FILLED < G))[:, None]
    query, factors = queries + (head * G + r % G_FILLED)[:, None] * D, head[:, None] * K + k[None, :]
    of_z = tl.load(query + tl.load(first + k)[None, :], mask=real, other=0).to(tl.float32)
    z = of_z * tl.load(of_first + factors, mask=real, other=0)
    of_z = tl.load(query + tl.load(second + k)[None, :], mask=real, other=0).to(tl.float32)
    z = (z + of_z * tl.load(of_second + factors, mask=real, other=0)) * factor
    most = tl.maximum(tl.max(tl.abs(z), 1), 1e-30)
    z = z / most[:, None]
    high = z.to(tl.float16)
    if EXACT:
        rest = (z - high.to(tl.float32)).to(tl.float16)
    own_head, g = part * HEADS + tl.arange(0, HEADS), tl.arange(0, G_FILLED)
    of_head = out + own_head.to(tl.int64)[:, None, None] * positions * G_FILLED + g[None, None, :]
    for begin in tl.range(share * TILE, positions, shares * TILE):
        position = begin + tl.arange(0, TILE)
        reached = position < positions
        at_table = position[None, :] * K + k[:, None]
        t = tl.load(table + at_table, mask=reached[None, :], other=0)
        product = tl.dot(high, t)
        if EXACT:
            t_rest = tl.load(table_rest + at_table, mask=reached[None, :], other=0)
            product = tl.dot(rest, t, tl.dot(high, t_rest, product))
        found = tl.permute(tl.reshape(product * most[:, None], [HEADS, G_FILLED, TILE]), [0, 2, 1])
        inside = (own_head < heads)[:, None, None] & reached[None, :, None]
        tl.store(of_head + position[None, :, None] * G_FILLED, found, mask=inside)


_INTERPRETED = tl.constexpr(interpreted())
_CODES = tl.constexpr(2.0**24)  # 1 / UNIT


@triton.jit
def _byte_of(i):
    """Which byte has the i-th number that is made of words."""
    return i // 4 * 4 + i % 2 * 2 + i // 2 % 2


@triton.jit
def _numbers(words, low, BITS: tl.constexpr, FIELD: tl.constexpr, RAISED: tl.constexpr = 0):
    """UNIT times the codes that begin at bit FIELD of each of the four bytes of words, as float16.

    3 bits: the lowest ones are in the words `low`, and the others stand RAISED bits too low.
    """
    MASK: tl.constexpr = (6 if BITS == 3 else (1 << BITS) - 1) * (0x00010001 << FIELD)
    even, odd = (words << RAISED) & MASK, (words >> (8 - RAISED)) & MASK
    if BITS == 3:
        even |= low & (0x00010001 << FIELD)
        odd |= (low >> 8) & (0x00010001 << FIELD)
    first, third = _halves(even, FIELD)
    second, fourth = _halves(odd, FIELD)
    return first, second, third, fourth


_SPLIT = tl.constexpr("mov.b32 {$0, $1}, $2;")
_MULTIPLY_AND_SPLIT = tl.constexpr("{ .reg .b32 x; mul.rn.f16x2 x, $2, $3; mov.b32 {$0, $1}, x; }")


@triton.jit
def _halves(pairs, FIELD: tl.constexpr):
    """The two float16 in each word, over 2 ** FIELD. The compiler would take pairs apart before it multiplies them."""
    if _INTERPRETED:  # which knows no PTX
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low * 2.0**-FIELD, high * 2.0**-FIELD
    elif FIELD == 0:
        return tl.inline_asm_elementwise(_SPLIT, "=h,=h,r", [pairs], (tl.float16, tl.float16), True, 1)
    else:
        FACTOR: tl.constexpr = (15 - FIELD) * 0x04000400
        return tl.inline_asm_elementwise(
            _MULTIPLY_AND_SPLIT, "=h,=h,r,r", [pairs, FACTOR], (tl.float16, tl.float16), True, 1
        )


@triton.jit
def _two(x, y):
    """Numbers of two stretches: of each byte in a dimension of their own, the last one."""
    return tl.join(x[0], y[0]), tl.join(x[1], y[1]), tl.join(x[2], y[2]), tl.join(x[3], y[3])


@triton.jit
def _four(x0, x1, x2, x3):
    return _two(_two(x0, x2), _two(x1, x3))


@triton.jit
def _eight(x0, x1, x2, x3, x4, x5, x6, x7):
    return _two(_four(x0, x2, x4, x6), _four(x1, x3, x5, x7))


@triton.jit
def _side_by_side(x):
    """`[..., 2, 2]`, in the order of `_byte_of`: the bytes come last, so that they lie side by side in registers."""
    return tl.join(tl.join(x[0], x[1]), tl.join(x[2], x[3]))


# Planes of channels: tokens stand side by side


@triton.jit
def _head_lines(plane, lines, row, length):
    """Where the lines of a head begin in a plane of channels, as a number, and how many there are.

    A line has a channel's bits of some stretches: one byte for each token of a stretch. lines: points to the first line
    of the head, to how many there are, and how many all heads have.
    """
    first = row * tl.load(lines + 2) + tl.load(lines)
    return plane.to(tl.int64) + first.to(tl.int64) * length, tl.load(lines + 1)


@triton.jit
def _line_words(plane, first, count, tile, length, LINES: tl.constexpr, PART: tl.constexpr):
    """A tile's bytes of LINES lines, from the `first` one: `[LINES, PART / 4]`."""
    line, word = first + tl.arange(0, LINES), tile * (PART // 4) + tl.arange(0, PART // 4)
    # Lines begin anywhere: what is read is two words, in which the bytes are looked for.
    begin = (plane & 3).to(tl.int32) + line * length
    at, aside = (begin >> 2)[:, None] + word[None, :], (begin & 3)[:, None]
    inside = (line < count)[:, None] & (word * 4 < length)[None, :]
    words = (plane & -4).to(tl.pointer_type(tl.int32)) + at
    low = tl.load(words, mask=inside, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(words + 1, mask=inside & (word[None, :] * 4 + 4 - aside < length), other=0)
    both = low.to(tl.uint64) | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    return (both >> (aside * 8).to(tl.uint64)).to(tl.int32)


@triton.jit
def _line_numbers(words, WIDTH: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):
    """UNIT times the codes in `_line_words`, `[channels, TILE]`."""
    if WIDTH == 4:
        x = _two(_numbers(words, words, 4, 0), _numbers(words, words, 4, 4))
    elif WIDTH == 2:
        x = _four(
            _numbers(words, words, 2, 0),
            _numbers(words, words, 2, 2),
            _numbers(words, words, 2, 4),
            _numbers(words, words, 2, 6),
        )
    else:
        x = _eight(
            _numbers(words, words, 1, 0),
            _numbers(words, words, 1, 1),
            _numbers(words, words, 1, 2),
            _numbers(words, words, 1, 3),
            _numbers(words, words, 1, 4),
            _numbers(words, words, 1, 5),
            _numbers(words, words, 1, 6),
            _numbers(words, words, 1, 7),
        )
    x = tl.reshape(_side_by_side(x), [ROWS, WIDTH, PART // 4, 8 // WIDTH, 4])
    return tl.reshape(tl.permute(x, [0, 3, 1, 2, 4]), [ROWS, 8 * PART])


@triton.jit
def _plane_product(
    logits, words, plane, count, weights, tile, length, WIDTH: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds UNIT times the product of the codes with the weights `[G, SLOTS]`, of which column n has those of n % G.

    words: the first ones of this tile. Those of the next are returned besides.
    """
    LINES: tl.constexpr = ROWS * WIDTH
    at = tl.arange(0, ROWS)[:, None] + (tl.arange(0, N) % G)[None, :] * SLOTS
    for first in range(0, count, LINES):
        # What comes next is under way while this is multiplied.
        last_one = first + LINES >= count
        following = tl.where(last_one, 0, first + LINES)
        next_words = _line_words(plane, following, count, tile + tl.where(last_one, 1, 0), length, LINES, PART)
        w = tl.load(weights + first // WIDTH + at)
        logits = tl.dot(tl.trans(_line_numbers(words, WIDTH, ROWS, PART)), w, logits)
        words = next_words
    return logits, words


# Planes of tokens: channels stand side by side


@triton.jit
def _place(STRETCH: tl.constexpr, t, length, P, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Where the bytes of tokens of a stretch stand in a plane, and where their bits in the byte.

    EVEN: a block has 8 stretches without a rest.
    """
    if EVEN:
        return STRETCH % WIDTH * length + t, STRETCH // WIDTH * WIDTH
    else:  # Triton would go on behind a return
        token, bytes_long = STRETCH * length + t, (P * WIDTH + 7) // 8
        return token % bytes_long, (token // bytes_long * WIDTH)[:, None]


@triton.jit
def _words_of(
    STRETCH: tl.constexpr, plane, t, channels, inside, length, P, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    place, _ = _place(STRETCH, t, length, P, WIDTH, EVEN)
    return tl.load(plane + place[:, None] * (SIZE // 4) + channels[None, :], mask=inside, other=0)


@triton.jit
def _token_words(plane, kv, t, channels, length, P, SIZE: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Words `[PART, channels / 4]` of a plane for each of the 8 stretches. Those that share bytes load them once."""
    plane = plane.to(tl.pointer_type(tl.int32)) + kv * ((P * WIDTH + 7) // 8) * (SIZE // 4)
    inside = (t < length)[:, None] & (channels < SIZE // 4)[None, :]
    return (
        _words_of(0, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
        _words_of(1, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
        _words_of(2, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
        _words_of(3, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
        _words_of(4, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
        _words_of(5, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
        _words_of(6, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
        _words_of(7, plane, t, channels, inside, length, P, SIZE, WIDTH, EVEN),
    )


@triton.jit
def _stretch_numbers(STRETCH: tl.constexpr, high, low, t, length, P, BITS: tl.constexpr, EVEN: tl.constexpr):
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    if not EVEN:
        _, shift = _place(STRETCH, t, length, P, WIDTH, EVEN)
        _, shift_of_low = _place(STRETCH, t, length, P, 1, EVEN)
        return _numbers(high[STRETCH] >> shift, low[STRETCH] >> shift_of_low, BITS, 0, 1 if BITS == 3 else 0)
    elif BITS == 3:  # the higher bits come to stand above the lowest
        return _numbers(high[STRETCH], low[STRETCH], 3, STRETCH, 1 + STRETCH % 2)
    else:
        return _numbers(high[STRETCH], low[STRETCH], BITS, STRETCH // WIDTH * WIDTH)


@triton.jit
def _token_numbers(
    high, low, t, length, P, BITS: tl.constexpr, EVEN: tl.constexpr, PART: tl.constexpr, CHANNELS: tl.constexpr
):
    """UNIT times the codes in `_token_words`, `[TILE, CHANNELS]`, with channels in the order of `_byte_of`."""
    x = _eight(
        _stretch_numbers(0, high, low, t, length, P, BITS, EVEN),
        _stretch_numbers(1, high, low, t, length, P, BITS, EVEN),
        _stretch_numbers(2, high, low, t, length, P, BITS, EVEN),
        _stretch_numbers(3, high, low, t, length, P, BITS, EVEN),
        _stretch_numbers(4, high, low, t, length, P, BITS, EVEN),
        _stretch_numbers(5, high, low, t, length, P, BITS, EVEN),
        _stretch_numbers(6, high, low, t, length, P, BITS, EVEN),
        _stretch_numbers(7, high, low, t, length, P, BITS, EVEN),
    )
    x = tl.reshape(_side_by_side(x), [PART, CHANNELS // 4, 8, 4])
    return tl.reshape(tl.permute(x, [2, 0, 1, 3]), [8 * PART, CHANNELS])


@triton.jit
def _found(found, rows, all_splits, E: tl.constexpr):
    """Where two parts of what programs find begin: float32 `totals` and `greatest`, `[all_splits, B * H]`.

    The first part is `[all_splits, B * H, E]`: values, weighted by `exp2(logit - greatest)`. The totals are the sums of
    these weights, and the greatest are logits.
    """
    totals = found + all_splits.to(tl.int64) * rows * E
    return totals, totals + all_splits.to(tl.int64) * rows


@triton.jit
def _tokens_of(tile, length, P, TILE: tl.constexpr):
    """The tokens of a tile by their place in a stretch, by their number, and which of them are there."""
    PART: tl.constexpr = TILE // 8
    of_tile = tl.arange(0, TILE)
    t = tile * PART + _byte_of(of_tile % PART)
    token = of_tile // PART * length + t
    return t, token, (t < length) & (token < P)


@triton.jit
def _ranges(zeros, spans, token, real, group, GROUPS: tl.constexpr):
    """The ranges of tokens, uint8 `[TILE, groups]` each; 0 where there is none."""
    at, there = token[:, None] * GROUPS + group[None, :], real[:, None] & (group < GROUPS)[None, :]
    return tl.load(zeros + at, mask=there, other=0), tl.load(spans + at, mask=there, other=0)


@triton.jit
def _of_group(x, group, NUMBER: tl.constexpr):
    """One column of `x [TILE, groups]`."""
    return tl.sum(tl.where((group == NUMBER)[None, :], x, 0.0), 1)


FIELDS = (
    *("k0", "k1", "k2", "k_zero", "k_span", "v0", "v1", "v_zero", "v_span", "positions", "lines"),  # addresses
    *("P", "first_slot", "positions_length", "heads", "k_row", "k_head", "v_row", "v_head"),
    *("splits", "first_split", "first_weights"),
)
"""What is told of a block of some heads that hold the same number of tokens.

    k0, k1, k2: keys: planes of channels, of 4, 2 and 1 bits; or planes of tokens; or numbers.
    k_zero, k_span: their ranges; for planes of channels, each token's scale alone.
    v0, v1, v_zero, v_span: values, likewise.
    positions: int32 `[B, heads, positions_length]`, of which the block's begin at first_slot.
    lines: int32 `[heads, 3, 3]`, of each plane of channels, see `_head_lines`.
    P: tokens. k_row, k_head, v_row, v_head: strides of numbers, in tokens.
    splits: programs that share the tokens of a head, of which the first is number first_split.
    first_weights: of the block, in KV heads of all rows.
"""
KIND = ("K_BITS", "V_BITS", "K_GROUPS", "V_GROUPS", "K_GROUPS_FILLED", "V_GROUPS_FILLED", "K_GROUP_FILLED", "N", "EVEN")
"""What code is made for, for a block: numbers of KIND_BITS bits each, the first one lowest.

    K_BITS, V_BITS: 0: widths by channel; 16: numbers.
    K_GROUPS, V_GROUPS: ranges of a token. K_GROUP_FILLED: channels of one of keys. FILLED: to a power of two.
    N: columns of the matrices. EVEN: the tokens of each group of heads divide by 8.
"""
KIND_BITS = 9  # the code below has this in numbers: the interpreter has no constants of Triton's in sums
_FIELDS = tl.constexpr(len(FIELDS))


@triton.jit
def _address(entry, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer to tensors, which begin at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(entry + FIELD).to(tl.pointer_type(DTYPE)), 16)


@triton.jit(
    do_not_specialize=[
        "groups", "grown", "tail_splits", "all_splits", "of_centre_length", "position_step", "shown_row", "shown_head",
    ],
    do_not_specialize_on_alignment=["queries", "offsets", "shown"],
)  # fmt: skip
def attend_everywhere(
    found,  # float32, see `_found`
    queries,  # [B * H, D]
    turned,  # the same as packed tokens are turned
    weights,  # of `prepare_queries`
    offsets,
    of_centre,  # float32 [B * Hkv, of_centre_length, G_FILLED]
    shown,  # uint8, strides shown_row and shown_head, over all slots
    table,  # int64 [blocks, groups of heads, FIELDS]
    tails,  # int64 [groups of heads, FIELDS], of what is not packed
    head_map,  # int32 [Hkv, 2], group and place in it of each head
    groups,  # of heads
    grown,  # tokens that are not packed and came after `tails` was made
    factor,  # of logits
    tail_splits,
    all_splits,
    of_centre_length,
    position_step,  # 0 where keys do not turn
    shown_row,
    shown_head,
    D: tl.constexpr,
    E: tl.constexpr,
    D_FILLED: tl.constexpr,
    E_FILLED: tl.constexpr,
    G: tl.constexpr,
    G_FILLED: tl.constexpr,
    BLOCKS: tl.constexpr,
    KINDS: tl.constexpr,  # of the blocks, and of what is not packed
    SLOTS: tl.constexpr,
    ROOM: tl.constexpr,  # of a plane's channels among the slots
    ROWS: tl.constexpr,  # of a plane's channels, that are multiplied at a time
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype in which numbers are multiplied
):
    """Attention over all that is held, block by block. Program: (part, KV head, row).

    Heads that hold different numbers of tokens are in groups, of which each has its own entry for a block.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, place = tl.load(head_map + head * 2), tl.load(head_map + head * 2 + 1)
    for block in tl.static_range(BLOCKS):
        entry = table + (block * groups + group) * _FIELDS
        splits = tl.load(entry + 19).to(tl.int32)
        # Blocks of few parts are for the first programs and for the last ones in turn.
        own = split if block % 2 == 0 else tl.num_programs(0) - 1 - split
        if own < splits:
            P, first_split = tl.load(entry + 11).to(tl.int32), tl.load(entry + 20).to(tl.int32)
            _attend(
                found, turned, weights, offsets, of_centre, shown, entry, factor, P, splits, first_split, all_splits,
                of_centre_length, position_step, shown_row, shown_head, own, head, place, row, D, E, D_FILLED,
                E_FILLED, G, G_FILLED, KINDS >> (81 * block), SLOTS, ROOM, ROWS, True, MASKED, TILE, PRODUCT,
            )  # fmt: skip
    own = split if BLOCKS % 2 == 0 else tl.num_programs(0) - 1 - split
    if own < tail_splits:
        entry = tails + group * _FIELDS
        P, first_split = tl.load(entry + 11).to(tl.int32) + grown, all_splits - tail_splits
        _attend(
            found, queries, weights, offsets, of_centre, shown, entry, factor, P, tail_splits, first_split, all_splits,
            0, 0, shown_row, shown_head, own, head, place, row, D, E, D_FILLED, E_FILLED, G, G_FILLED,
            KINDS >> (81 * BLOCKS), SLOTS, ROOM, ROWS, False, MASKED, TAIL_TILE, PRODUCT,
        )  # fmt: skip


@triton.jit
def _attend(
    found, queries, weights, offsets, of_centre, shown, entry, factor, P, splits, first_split, all_splits,
    of_centre_length, position_step, shown_row, shown_head, split, kv_head, place, row, D: tl.constexpr,
    E: tl.constexpr, D_FILLED: tl.constexpr, E_FILLED: tl.constexpr, G: tl.constexpr, G_FILLED: tl.constexpr,
    KIND: tl.constexpr, SLOTS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
    MASKED: tl.constexpr, TILE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Attention over a part of one block, number `split` of `splits`.

    Columns of the matrices are query heads, once for each group of a value's channels, whose weights are its own: what
    a column finds in other groups' channels is left out at the end. Rows are tokens, or channels of values.
    """
    K_BITS: tl.constexpr = (KIND >> 0) & 511
    V_BITS: tl.constexpr = (KIND >> 9) & 511
    K_GROUPS: tl.constexpr = (KIND >> 18) & 511
    V_GROUPS: tl.constexpr = (KIND >> 27) & 511
    K_GROUPS_FILLED: tl.constexpr = (KIND >> 36) & 511
    V_GROUPS_FILLED: tl.constexpr = (KIND >> 45) & 511
    K_GROUP_FILLED: tl.constexpr = (KIND >> 54) & 511
    N: tl.constexpr = (KIND >> 63) & 511
    EVEN: tl.constexpr = (KIND >> 72) & 511
    kv_heads = tl.num_programs(1)
    length = (P + 7) // 8  # of a stretch
    kv = row.to(tl.int64) * tl.load(entry + 14) + place  # among the heads of the group
    queried = row.to(tl.int64) * kv_heads + kv_head  # among all
    if K_BITS == 16:
        k0 = _address(entry, 0, queries.dtype.element_ty)
        k_row, k_head = tl.load(entry + 15), tl.load(entry + 16)
    else:
        k0, k1, k2 = _address(entry, 0, tl.uint8), _address(entry, 1, tl.uint8), _address(entry, 2, tl.uint8)
        k_zero, k_span = _address(entry, 3, tl.uint8), _address(entry, 4, tl.uint8)
        k_zero, k_span = k_zero + kv * P * K_GROUPS, k_span + kv * P * K_GROUPS
    if V_BITS == 16:
        v0 = _address(entry, 5, queries.dtype.element_ty)
        v_row, v_head = tl.load(entry + 17), tl.load(entry + 18)
    else:
        v0, v1 = _address(entry, 5, tl.uint8), _address(entry, 6, tl.uint8)
        v_zero, v_span = _address(entry, 7, tl.uint8), _address(entry, 8, tl.uint8)
        v_zero, v_span = v_zero + kv * P * V_GROUPS, v_span + kv * P * V_GROUPS
    first_slot = tl.load(entry + 12).to(tl.int32)
    if CENTRED:
        positions = _address(entry, 9, tl.int32) + kv * tl.load(entry + 13) + first_slot
        of_centre += queried * of_centre_length * G_FILLED
    shown += row.to(tl.int64) * shown_row + place.to(tl.int64) * shown_head + first_slot
    n = tl.arange(0, N)
    real_column = n < G * V_GROUPS
    query = queried * G + n % G
    group = tl.where(real_column, n // G, 0)
    PART: tl.constexpr = TILE // 8
    of_part = tl.arange(0, PART)
    tiles = (length + PART - 1) // PART
    first, last = tiles * split // splits, tiles * (split + 1) // splits
    d, e = tl.arange(0, D_FILLED), tl.arange(0, E_FILLED)
    value_words = tl.arange(0, E_FILLED // 4)
    if V_BITS != 16:
        e = _byte_of(e)
    if K_BITS == 0:
        first_weights = tl.load(entry + 21) * G
        weights += (first_weights + queried * G) * SLOTS
        offset = tl.load(offsets + first_weights + query)
        lines = _address(entry, 10, tl.int32) + place * 9
        plane4, count4 = _head_lines(k0, lines, row, length)
        plane2, count2 = _head_lines(k1, lines + 3, row, length)
        plane1, count1 = _head_lines(k2, lines + 6, row, length)
        words4 = _line_words(plane4, 0, count4, first, length, ROWS * 4, PART)
        words2 = _line_words(plane2, 0, count2, first, length, ROWS * 2, PART)
        words1 = _line_words(plane1, 0, count1, first, length, ROWS, PART)
    elif K_BITS == 16:
        q = tl.load(queries + query[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0)
    low = tl.zeros([TILE, N], tl.float32)
    total = tl.zeros([TILE, N], tl.float32)
    most = tl.full([N], float("-inf"), tl.float32)
    acc = tl.zeros([E_FILLED, N], tl.float32)
    _, token, real = _tokens_of(first, length, P, TILE)
    k_number, v_number = tl.arange(0, K_GROUPS_FILLED), tl.arange(0, V_GROUPS_FILLED)
    # What there is little of for a token is read a tile ahead.
    if CENTRED:
        next_position = tl.load(positions + token, mask=real, other=0)
    if K_BITS == 0:
        next_scale = tl.load(k_zero + token, mask=real, other=0)
    elif K_BITS != 16:
        next_k_zero, next_k_span = _ranges(k_zero, k_span, token, real, k_number, K_GROUPS)
    if V_BITS != 16:
        next_v_zero, next_v_span = _ranges(v_zero, v_span, token, real, v_number, V_GROUPS)
    for tile in range(first, last):
        t_part = tile * PART + _byte_of(of_part)
        t, token, real = _tokens_of(tile, length, P, TILE)
        real_next = (t + PART < length) & (token + PART < P)
        if CENTRED:
            position = next_position * position_step
            next_position = tl.load(positions + token + PART, mask=real_next, other=0)
        if K_BITS == 0:
            scale = next_scale.to(tl.float32)
            next_scale = tl.load(k_zero + token + PART, mask=real_next, other=0)
        elif K_BITS != 16:
            k_zeros, k_spans = next_k_zero.to(tl.float32), next_k_span.to(tl.float32)
            next_k_zero, next_k_span = _ranges(k_zero, k_span, token + PART, real_next, k_number, K_GROUPS)
        if V_BITS != 16:
            v_zeros, v_spans = next_v_zero.to(tl.float32), next_v_span.to(tl.float32)
            next_v_zero, next_v_span = _ranges(v_zero, v_span, token + PART, real_next, v_number, V_GROUPS)
        # Values first, so that they are under way while the logits are made. Those of 8 bits would fill the registers.
        if V_BITS == 16:
            of_head = v0 + (row * v_row + place * v_head) * E
            of_value = real[:, None] & (e < E)[None, :]
            v = tl.load(of_head + token[:, None] * E + e[None, :], mask=of_value, other=0)
        elif V_BITS < 8:
            x = _token_words(v0, kv, t_part, value_words, length, P, E, 2 if V_BITS == 3 else V_BITS, EVEN)
            y = _token_words(v1, kv, t_part, value_words, length, P, E, 1, EVEN) if V_BITS == 3 else x

        if CENTRED:
            at = position[:, None] * G_FILLED + (n % G)[None, :]
            centred = tl.load(of_centre + at, mask=real[:, None], other=0)

        logits = tl.zeros([TILE, N], tl.float32)
        if K_BITS == 0:
            logits, words4 = _plane_product(
                logits, words4, plane4, count4, weights, tile, length, 4, ROWS, PART, G, N, SLOTS
            )
            logits, words2 = _plane_product(
                logits, words2, plane2, count2, weights + ROOM, tile, length, 2, ROWS, PART, G, N, SLOTS
            )
            logits, words1 = _plane_product(
                logits, words1, plane1, count1, weights + 2 * ROOM, tile, length, 1, ROWS, PART, G, N, SLOTS
            )
            logits = (logits * _CODES - offset[None, :]) * tl.exp2((scale - 128) / 16)[:, None]
        elif K_BITS == 16:
            of_head = k0 + (row * k_row + place * k_head) * D
            numbers = tl.load(of_head + token[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0)
            logits = tl.dot(numbers.to(PRODUCT), q.to(PRODUCT), input_precision="ieee") * factor
        else:
            for k_group in tl.static_range(K_GROUPS):
                channel = _byte_of(tl.arange(0, K_GROUP_FILLED))
                inside = channel < D // K_GROUPS
                at = query[None, :] * D + (k_group * (D // K_GROUPS) + channel)[:, None]
                q = tl.load(queries + at, mask=inside[:, None], other=0)
                q = (q.to(tl.float32) * factor).to(tl.float16)
                key_words = k_group * (D // K_GROUPS // 4) + tl.arange(0, K_GROUP_FILLED // 4)
                z = _token_words(k0, kv, t_part, key_words, length, P, D, 2 if K_BITS == 3 else K_BITS, EVEN)
                z1 = _token_words(k1, kv, t_part, key_words, length, P, D, 1, EVEN) if K_BITS == 3 else z
                numbers = _token_numbers(z, z1, t_part, length, P, K_BITS, EVEN, PART, K_GROUP_FILLED)
                zero = _of_group(k_zeros, k_number, k_group) * (2.0**K_BITS / 255)
                width = tl.exp2((_of_group(k_spans, k_number, k_group) - 128) / 8 - K_BITS)
                shift = tl.sum(q.to(tl.float32), 0)[None, :] * (0.5 - zero)[:, None]
                logits += (tl.dot(numbers, q) * _CODES + shift) * width[:, None]
        if V_BITS == 8:
            x = _token_words(v0, kv, t_part, value_words, length, P, E, 8, EVEN)
            y = x
        if CENTRED:
            logits += centred
        seen = real
        if MASKED:
            seen &= tl.load(shown + token, mask=real, other=0) != 0
        logits = tl.where(seen[:, None], logits, float("-inf"))

        if V_BITS == 16:
            raised, highest = logits, logits
        else:
            # A range is a power of two: it goes into the exponent.
            exponents = v_spans / 8 - 16
            zeros = 0.5 - v_zeros * (2.0**V_BITS / 255)
            widest = tl.max(exponents, 1)  # a group that is not there has the least one
            span = tl.zeros([TILE, N], tl.float32)
            zero = tl.zeros([TILE, N], tl.float32)
            for i in tl.static_range(V_GROUPS):
                own = (group == i)[None, :]
                span = tl.where(own, _of_group(exponents, v_number, i)[:, None], span)
                zero = tl.where(own, _of_group(zeros, v_number, i)[:, None], zero)
            raised, highest = logits + span, logits + widest[:, None]
        now = tl.maximum(most, tl.max(highest, 0))
        base = tl.where(now == float("-inf"), 0.0, now)
        decay = tl.exp2(most - base)
        most = now
        p = tl.exp2(raised - base[None, :])
        if V_BITS == 16:
            total = total * decay[None, :] + p
            acc = tl.dot(tl.trans(v.to(PRODUCT)), p.to(PRODUCT), acc * decay[None, :], input_precision="ieee")
        else:
            total = total * decay[None, :] + tl.exp2(logits - base[None, :])
            p = p.to(tl.float16)
            low = low * decay[None, :] + p.to(tl.float32) * zero
            codes = _token_numbers(x, y, t_part, length, P, V_BITS, EVEN, PART, E_FILLED)
            acc = tl.dot(tl.trans(codes), p, acc * decay[None, :])

    if V_BITS != 16:
        acc = (acc * _CODES + tl.sum(low, 0)[None, :]) * (1.0 / 2**V_BITS)
    rows = tl.num_programs(2) * kv_heads * G
    totals, greatest = _found(found, rows, all_splits, E)
    at = (first_split + split).to(tl.int64) * rows + query
    own = real_column[None, :] & (group[None, :] == (e // (E // V_GROUPS))[:, None]) & (e < E)[:, None]
    tl.store(found + at[None, :] * E + e[:, None], acc, mask=own)
    # Zero. It ties what is stored here to the product, whose layout the compiler leaves alone: else it makes all
    # weights a second time in each turn of the loop, in the layout of these stores.
    nothing = tl.sum(acc, 0) * 0.0
    tl.store(totals + at, tl.sum(total, 0) + nothing, mask=n < G)
    tl.store(greatest + at, most + nothing, mask=n < G)


@triton.jit(
    do_not_specialize=["grown", "key_row", "key_head", "value_row", "value_head"],
    do_not_specialize_on_alignment=["keys", "values"],
)
def append_token(
    keys,  # [B, Hkv, D], strides key_row and key_head
    values,  # [B, Hkv, E]
    tails,  # see `attend_everywhere`
    head_map,
    grown,
    key_row,
    key_head,
    value_row,
    value_head,
    D: tl.constexpr,
    E: tl.constexpr,
    D_FILLED: tl.constexpr,
    E_FILLED: tl.constexpr,
):
    """Writes a new token behind those that are not packed. Program: (KV head, row)."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = tails + tl.load(head_map + head * 2) * _FIELDS
    place = tl.load(head_map + head * 2 + 1)
    token = tl.load(entry + 11) + grown
    d, e = tl.arange(0, D_FILLED), tl.arange(0, E_FILLED)
    to = _address(entry, 0, keys.dtype.element_ty)
    to += (row * tl.load(entry + 15) + place * tl.load(entry + 16) + token) * D
    tl.store(to + d, tl.load(keys + row * key_row + head * key_head + d, mask=d < D), mask=d < D)
    to = _address(entry, 5, values.dtype.element_ty)
    to += (row * tl.load(entry + 17) + place * tl.load(entry + 18) + token) * E
    tl.store(to + e, tl.load(values + row * value_row + head * value_head + e, mask=e < E), mask=e < E)


@triton.jit(do_not_specialize=["rotated_splits", "all_splits"], do_not_specialize_on_alignment=["out"])
def merge(
    out,  # [B * H, E]
    found,  # see `_found`
    rotation,  # float32 [E, E]
    rotated_splits,  # the first ones, whose sums are rotated
    all_splits,
    E: tl.constexpr,
    E_FILLED: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTATED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Joins what `attend_everywhere` found in all parts. Program: (row and query head, CHANNELS of the output)."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    totals, greatest = _found(found, rows, all_splits, E)
    s = tl.arange(0, SPLITS)
    most = tl.full([SPLITS], float("-inf"), tl.float32)
    for i in range(0, all_splits, SPLITS):
        most = tl.maximum(most, tl.load(greatest + (i + s) * rows + row, mask=i + s < all_splits, other=float("-inf")))
    top = tl.max(most, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([SPLITS], tl.float32)
    acc = tl.zeros([CHANNELS], tl.float32)
    for i in range(0, all_splits, SPLITS):
        at, inside = (i + s) * rows + row, i + s < all_splits
        w = tl.exp2(tl.load(greatest + at, mask=inside, other=float("-inf")) - top)
        total += w * tl.load(totals + at, mask=inside, other=0)
        if ROTATED:
            inside &= i + s >= rotated_splits
        x = tl.load(found + at.to(tl.int64)[:, None] * E + c[None, :], mask=inside[:, None] & (c < E)[None, :], other=0)
        acc += tl.sum(w[:, None] * x, 0)
    if ROTATED:
        e = tl.arange(0, E_FILLED)
        rotated = tl.zeros([E_FILLED], tl.float32)
        for i in range(0, rotated_splits, SPLITS):
            at, inside = (i + s) * rows + row, i + s < rotated_splits
            w = tl.exp2(tl.load(greatest + at, mask=inside, other=float("-inf")) - top)
            real = inside[:, None] & (e < E)[None, :]
            x = tl.load(found + at.to(tl.int64)[:, None] * E + e[None, :], mask=real, other=0)
            rotated += tl.sum(w[:, None] * x, 0)
        matrix = tl.load(rotation + c[:, None] * E + e[None, :], mask=(c < E)[:, None] & (e < E)[None, :], other=0)
        acc += tl.sum(matrix * rotated[None, :], 1)
    whole = tl.sum(total, 0)
    acc = acc / tl.where(whole == 0, 1.0, whole)
    tl.store(out + row * E + c, acc.to(out.dtype.element_ty), mask=c < E)
