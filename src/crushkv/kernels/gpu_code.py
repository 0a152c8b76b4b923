# mypy: disable-error-code="no-untyped-def"
"""The GPU's code, in Triton. `gpu` calls it, and says what the tensors hold.

Letters: B rows, H query heads, Hkv KV heads, G query heads a KV head, P tokens of a block, D channels of a key, E
channels of a value. Logits are in units of log2, so that `exp2` takes them.

A block's tokens are walked in tiles of TILE tokens. Planes of w bits hold 8 / w stretches of tokens, so the tiles that
lie at the same place of each stretch share their bytes: these are visited one after the other, and the bytes come from
the cache but for the first time.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(32)  # rows of a plane of channels that are multiplied at a time


@triton.jit(do_not_specialize_on_alignment=["queries"])
def query_weights(
    weights,
    offsets,
    queries,
    channels,
    units,
    middles,
    factor,
    D,
    KV_HEADS,
    G: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """What the codes of each plane's rows are multiplied with: `weights [blocks, B * H, SLOTS]`, float16.

    offsets: `[blocks, B * H]`, the product with the middles of the codes, which each logit is too large by.
    channels: `[blocks, Hkv, SLOTS]` of the slots, units: `[blocks, B, Hkv, SLOTS]` of their codes, 0 where a slot is
    empty, middles: `[blocks, Hkv, SLOTS]` of their codes. Program: (row and query head, block).
    """
    row, block = tl.program_id(0), tl.program_id(1)
    queried = tl.num_programs(0)
    slots = tl.arange(0, SLOTS)
    at = (block * KV_HEADS + row // G % KV_HEADS) * SLOTS + slots
    q = tl.load(queries + row * D + tl.load(channels + at)).to(tl.float32)
    units_at = (block * (queried // G) + row // G) * SLOTS + slots
    w = (q * tl.load(units + units_at) * factor).to(tl.float16)
    at_out = block * queried + row
    tl.store(weights + at_out * SLOTS + slots, w)
    tl.store(offsets + at_out, tl.sum(w.to(tl.float32) * tl.load(middles + at), 0))


@triton.jit(do_not_specialize=["rows", "positions"], do_not_specialize_on_alignment=["queries"])
def centre_logits(
    out,
    queries,
    first,
    second,
    of_first,
    of_second,
    table,
    table_rest,
    factor,
    rows,
    positions,
    D,
    G: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`out [B * H, positions]`: the product of each query with its head's centre, turned to each position.

    It is `z @ table.T` with `z[k] = q[first[k]] * of_first[k] + q[second[k]] * of_second[k]`. Numbers are split into
    two of float16 each, so that the product is as exact as one in float32. Program: (tile of positions, of rows).
    """
    k = tl.arange(0, K)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real, reached = row < rows, position < positions
    at = (row // G)[:, None] * K + k[None, :]
    q_row = queries + row[:, None] * D
    z = tl.load(q_row + tl.load(first + k)[None, :], mask=real[:, None], other=0).to(tl.float32)
    z *= tl.load(of_first + at, mask=real[:, None], other=0)
    q = tl.load(q_row + tl.load(second + k)[None, :], mask=real[:, None], other=0).to(tl.float32)
    z = (z + q * tl.load(of_second + at, mask=real[:, None], other=0)) * factor
    most = tl.maximum(tl.max(tl.abs(z), 1), 1e-30)
    z = z / most[:, None]
    high = z.to(tl.float16)
    rest = (z - high.to(tl.float32)).to(tl.float16)
    at_table = position[None, :] * K + k[:, None]
    t = tl.load(table + at_table, mask=reached[None, :], other=0)
    t_rest = tl.load(table_rest + at_table, mask=reached[None, :], other=0)
    product = tl.dot(high, t_rest)
    product = tl.dot(rest, t, product)
    product = tl.dot(high, t, product) * most[:, None]
    at_out = row.to(tl.int64)[:, None] * positions + position[None, :]
    tl.store(out + at_out, product, mask=real[:, None] & reached[None, :])


@triton.jit
def _plane(base, tokens, channels, shown, P, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Bytes `[TILE, channels]` of one plane `[P * WIDTH / 8, SIZE]` that hold the tokens' bits."""
    place = tokens
    if WIDTH < 8:
        place = tokens % ((P * WIDTH + 7) // 8)
    return tl.load(base + place[:, None] * SIZE + channels[None, :], mask=shown, other=0)


def _four_codes(planes: tuple[int, ...]) -> tl.constexpr:
    """PTX that makes float16 of the codes in four bytes at a time. A byte behind 0x64 is the float16 of 1024 more."""
    # Inputs are read before the first output is written, which may stand in the same register.
    lines = ["mov.b32 %x0, $2;"]
    for number, width in enumerate(planes):
        shifted, mask = f"%x{number}", 0x01010101 * ((1 << width) - 1)
        if width < 8:
            source, shift = f"${2 + 2 * number}", f"${3 + 2 * number}"
            lines += [f"and.b32 %s, {shift}, 7;", f"shr.b32 {shifted}, {source}, %s;"]
            lines += [f"and.b32 {shifted}, {shifted}, {mask:#x};"]
    if len(planes) == 2:
        lines.append("mad.lo.u32 %x0, %x0, 2, %x1;")
    lines += ["mov.b32 %m, 0x64646464;", "mov.b32 %b, 0x64006400;"]
    for number, bytes_ in enumerate(("0x4140", "0x4342")):
        lines += [f"prmt.b32 %y, %x0, %m, {bytes_};", f"sub.f16x2 ${number}, %y, %b;"]
    text = "{ .reg .b32 %x0, %x1, %s, %m, %b, %y; " + " ".join(lines) + " }"
    return tl.constexpr(text.replace("%", ""))


_FOUR_1, _FOUR_2, _FOUR_4, _FOUR_8 = (_four_codes((width,)) for width in (1, 2, 4, 8))
_FOUR_3 = _four_codes((2, 1))


@triton.jit
def _four_of_one(x, shift, WIDTH: tl.constexpr):
    """Float16 of the WIDTH bits above the shift in each byte."""
    shift = shift.to(tl.uint8)
    if WIDTH == 1:
        return tl.inline_asm_elementwise(_FOUR_1, "=r,=r,r,r", [x, shift], tl.float16, True, 4)
    if WIDTH == 2:
        return tl.inline_asm_elementwise(_FOUR_2, "=r,=r,r,r", [x, shift], tl.float16, True, 4)
    if WIDTH == 4:
        return tl.inline_asm_elementwise(_FOUR_4, "=r,=r,r,r", [x, shift], tl.float16, True, 4)
    return tl.inline_asm_elementwise(_FOUR_8, "=r,=r,r", [x], tl.float16, True, 4)


@triton.jit
def _shift(tokens, P, WIDTH: tl.constexpr):
    """Where the tokens' bits stand in their bytes, uint8 `[TILE, 1]`."""
    return (tokens // ((P * WIDTH + 7) // 8) * WIDTH).to(tl.uint8)[:, None]


@triton.jit
def _bits(x, tokens, P, WIDTH: tl.constexpr):
    """The tokens' bits of the bytes `x [TILE, channels]`."""
    if WIDTH < 8:
        shift = tokens // ((P * WIDTH + 7) // 8) * WIDTH
        x = (x >> shift.to(tl.uint8)[:, None]) & ((1 << WIDTH) - 1)
    return x


@triton.jit
def _codes(first, second, tokens, P, BITS: tl.constexpr, FOUR: tl.constexpr):
    """Codes as float16 of the bytes of their planes."""
    if FOUR:
        if BITS == 3:
            high, low = _shift(tokens, P, 2), _shift(tokens, P, 1)
            return tl.inline_asm_elementwise(_FOUR_3, "=r,=r,r,r,r,r", [first, high, second, low], tl.float16, True, 4)
        return _four_of_one(first, _shift(tokens, P, BITS), BITS)
    if BITS == 3:
        return (_bits(first, tokens, P, 2) * 2 + _bits(second, tokens, P, 1)).to(tl.float16)
    return _bits(first, tokens, P, BITS).to(tl.float16)


@triton.jit
def _channel_product(logits, plane, weights, run, t, k, BYTES, WIDTH: tl.constexpr, FOUR: tl.constexpr):
    """Adds the product of the weights `[M, slots]` with a head's rows of one plane of channels.

    run: points to the first row and the number of rows. t: bytes `[TILE]` in stretch k. The last bytes
    of a row may stand for no token. What is added up for these is left out later: a mask by tokens would be one by
    bytes, and each byte be loaded alone.
    """
    start, count = tl.load(run), tl.load(run + 1)
    at = (k % WIDTH) * BYTES + t
    shift = (k - k % WIDTH).to(tl.uint8)
    for i in range(0, count, CHUNK):
        row = i + tl.arange(0, CHUNK)
        w = tl.load(weights + row[None, :])
        bytes_ = plane + (start + row).to(tl.int64)[:, None] * (BYTES * WIDTH) + at[None, :]
        x = tl.load(bytes_, mask=(row < count)[:, None] & (t < BYTES)[None, :], other=0)
        if FOUR:  # noqa: SIM108
            codes = _four_of_one(x, shift, WIDTH)
        else:
            codes = ((x >> shift) & ((1 << WIDTH) - 1)).to(tl.float16)
        logits = tl.dot(w, codes, logits)
    return logits


@triton.jit
def _found(found, rows, all_splits, E: tl.constexpr):
    """Where two parts of what programs find begin: float32 `totals` and `greatest`, `[all_splits, B * H]`.

    The first part is `[all_splits, B * H, E]`: values, weighted by `exp2(logit - greatest)`. The totals are the sums of
    these weights, and the greatest are logits.
    """
    totals = found + all_splits.to(tl.int64) * rows * E
    return totals, totals + all_splits.to(tl.int64) * rows


# Numbers that differ from call to call or from layer to layer: none of them is worth a kernel of its own.
_VARYING = ["P", "stretch", "plane4_rows", "plane2_rows", "plane1_rows", "of_centre_length", "position_step"]
_VARYING += [
    "positions_length",
    "first_slot",
    "first_split",
    "splits",
    "all_splits",
    "shown_row",
    "shown_head",
    "first_weights",
]
_UNALIGNED = ["queries", "offsets", "runs", "of_centre", "positions", "shown", "k_zero", "k_span"]
_UNALIGNED += ["v_zero", "v_span"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def attend_block(
    found,  # float32, see `_found`
    queries,  # [B * H, D]
    weights,  # of `query_weights`
    offsets,  # of `query_weights`
    runs,  # int32 [Hkv, 3, 2], see `_channel_product`, of the planes of 4, 2 and 1 bits
    of_centre,  # float32 [B * H, of_centre_length] of `centre_logits`
    positions,  # int32 [B, Hkv, positions_length]
    shown,  # uint8, strides shown_row and shown_head, over all slots
    k0,  # keys: planes of channels, 4 bits; or the first plane of tokens; or numbers
    k1,  # 2 bits; second plane
    k2,  # 1 bit
    k_zero,  # zero, or a token's scale
    k_span,
    v0,
    v1,
    v_zero,
    v_span,
    factor,  # of logits
    P,
    stretch,  # tokens of each of STRETCHES, over ALIGNED
    plane4_rows,  # rows of all heads
    plane2_rows,
    plane1_rows,
    first_weights,  # of the block, in rows
    of_centre_length,
    position_step,  # 0 where keys do not turn
    positions_length,
    first_slot,  # of the block
    first_split,
    splits,  # that share this block
    all_splits,
    shown_row,
    shown_head,
    k_row,  # strides of numbers
    k_head,
    v_row,
    v_head,
    D: tl.constexpr,
    E: tl.constexpr,
    D_FILLED: tl.constexpr,
    E_FILLED: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    K_BITS: tl.constexpr,  # 0: widths by channel
    V_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_GROUP_FILLED: tl.constexpr,
    V_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROOM: tl.constexpr,  # slots of a plane
    CENTRED: tl.constexpr,
    MASKED: tl.constexpr,
    STRETCHES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype in which numbers are multiplied
    FOUR: tl.constexpr,  # codes are converted four at a time, which the interpreter cannot
):
    """Attention over a part of one block. Program: (part, KV head, row).

    Rows of the matrices are query heads, once for each group of a value's channels, whose weights are its own: what a
    row finds in other groups' channels is left out at the end.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    kv = row.to(tl.int64) * kv_heads + head
    m = tl.arange(0, M)
    real_row = m < G * V_GROUPS
    query = kv * G + m % G
    group = tl.where(real_row, m // G, 0)
    d, e = tl.arange(0, D_FILLED), tl.arange(0, E_FILLED)
    n = tl.arange(0, TILE)
    length = stretch * ALIGNED
    tiles = (length + TILE - 1) // TILE * STRETCHES
    first, last = tiles * split // splits, tiles * (split + 1) // splits

    if K_BITS == 0:
        weight_rows = weights + (first_weights + query)[:, None] * SLOTS
        offset = tl.load(offsets + first_weights + query)
    elif K_BITS == 16:
        q = tl.load(queries + query[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0)
    low = tl.zeros([M, TILE], tl.float32)
    total = tl.zeros([M, TILE], tl.float32)
    most = tl.full([M], float("-inf"), tl.float32)
    acc = tl.zeros([M, E_FILLED], tl.float32)
    for tile in range(first, last):
        k = tile % STRETCHES
        t = tile // STRETCHES * TILE + n
        token = k * length + t
        real = (t < length) & (token < P)
        # Values first, so that they are under way while the logits are made.
        of_value = real[:, None] & (e < E)[None, :]
        if V_BITS == 16:
            of_head = v0 + row.to(tl.int64) * v_row + head.to(tl.int64) * v_head
            v = tl.load(of_head + token[:, None] * E + e[None, :], mask=of_value, other=0)
        elif V_BITS == 3:
            x0 = _plane(v0 + kv * ((P * 2 + 7) // 8) * E, token, e, of_value, P, E, 2)
            x1 = _plane(v1 + kv * ((P + 7) // 8) * E, token, e, of_value, P, E, 1)
        else:
            x0 = _plane(v0 + kv * ((P * V_BITS + 7) // 8) * E, token, e, of_value, P, E, V_BITS)
            x1 = x0

        logits = tl.zeros([M, TILE], tl.float32)
        if K_BITS == 0:
            run = runs + head * 6
            b = row.to(tl.int64) * length
            logits = _channel_product(logits, k0 + b * plane4_rows * 4, weight_rows, run, t, k, length, 4, FOUR)
            logits = _channel_product(
                logits, k1 + b * plane2_rows * 2, weight_rows + ROOM, run + 2, t, k, length, 2, FOUR
            )
            logits = _channel_product(
                logits, k2 + b * plane1_rows, weight_rows + 2 * ROOM, run + 4, t, k, length, 1, FOUR
            )
            scale = tl.load(k_zero + kv * P + token, mask=real, other=0).to(tl.float32)
            logits = (logits - offset[:, None]) * tl.exp2((scale - 128) / 16)[None, :]
        elif K_BITS == 16:
            at = row.to(tl.int64) * k_row + head.to(tl.int64) * k_head + token[:, None] * D + d[None, :]
            numbers = tl.load(k0 + at, mask=real[:, None] & (d < D)[None, :], other=0)
            logits = tl.dot(q.to(PRODUCT), tl.trans(numbers.to(PRODUCT)), input_precision="ieee") * factor
        else:
            for g in tl.static_range(K_GROUPS):
                c = tl.arange(0, K_GROUP_FILLED)
                channel = g * (D // K_GROUPS) + c
                inside = c < D // K_GROUPS
                q = tl.load(queries + query[:, None] * D + channel[None, :], mask=inside[None, :], other=0)
                q = (q.to(tl.float32) * factor).to(tl.float16)
                of_key = real[:, None] & inside[None, :]
                if K_BITS == 3:
                    y0 = _plane(k0 + kv * ((P * 2 + 7) // 8) * D, token, channel, of_key, P, D, 2)
                    y1 = _plane(k1 + kv * ((P + 7) // 8) * D, token, channel, of_key, P, D, 1)
                else:
                    y0 = _plane(k0 + kv * ((P * K_BITS + 7) // 8) * D, token, channel, of_key, P, D, K_BITS)
                    y1 = y0
                product = tl.dot(q, tl.trans(_codes(y0, y1, token, P, K_BITS, FOUR)))
                at = (kv * P + token) * K_GROUPS + g
                width = tl.exp2((tl.load(k_span + at, mask=real, other=0).to(tl.float32) - 128) / 8 - K_BITS)
                zero = tl.load(k_zero + at, mask=real, other=0).to(tl.float32) * (2.0**K_BITS / 255)
                product += tl.sum(q.to(tl.float32), 1)[:, None] * (0.5 - zero)[None, :]
                logits += product * width[None, :]
        if CENTRED:
            position = tl.load(positions + kv * positions_length + first_slot + token, mask=real, other=0)
            at = query[:, None] * of_centre_length + (position * position_step)[None, :]
            logits += tl.load(of_centre + at, mask=real[None, :], other=0)
        seen = real
        if MASKED:
            at = row.to(tl.int64) * shown_row + head.to(tl.int64) * shown_head + first_slot + token
            seen &= tl.load(shown + at, mask=real, other=0) != 0
        logits = tl.where(seen[None, :], logits, float("-inf"))

        if V_BITS == 16:
            raised, highest = logits, logits
        else:
            # A range is a power of two: it goes into the exponent.
            at = (kv * P + token) * V_GROUPS
            span = tl.zeros([M, TILE], tl.float32)
            zero = tl.zeros([M, TILE], tl.float32)
            widest = tl.zeros([TILE], tl.float32)
            for g in tl.static_range(V_GROUPS):
                of_group = tl.load(v_span + at + g, mask=real, other=0).to(tl.float32) / 8 - 16
                span = tl.where((group == g)[:, None], of_group[None, :], span)
                widest = of_group if g == 0 else tl.maximum(widest, of_group)
                of_group = 0.5 - tl.load(v_zero + at + g, mask=real, other=0).to(tl.float32) * (2.0**V_BITS / 255)
                zero = tl.where((group == g)[:, None], of_group[None, :], zero)
            raised, highest = logits + span, logits + widest[None, :]
        now = tl.maximum(most, tl.max(highest, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        decay = tl.exp2(most - base)
        most = now
        p = tl.exp2(raised - base[:, None])
        if V_BITS == 16:
            total = total * decay[:, None] + p
            acc = tl.dot(p.to(PRODUCT), v.to(PRODUCT), acc * decay[:, None], input_precision="ieee")
        else:
            total = total * decay[:, None] + tl.exp2(logits - base[:, None])
            p = p.to(tl.float16)
            low = low * decay[:, None] + p.to(tl.float32) * zero
            acc = tl.dot(p, _codes(x0, x1, token, P, V_BITS, FOUR), acc * decay[:, None])

    if V_BITS != 16:
        acc = (acc + tl.sum(low, 1)[:, None]) * (1.0 / 2**V_BITS)
    rows = tl.num_programs(2) * kv_heads * G
    totals, greatest = _found(found, rows, all_splits, E)
    at = (first_split + split).to(tl.int64) * rows + query
    own = real_row[:, None] & (group[:, None] == (e // (E // V_GROUPS))[None, :]) & (e < E)[None, :]
    tl.store(found + at[:, None] * E + e[None, :], acc, mask=own)
    # Zero. It ties what is stored here to the product, whose layout the compiler leaves alone: else it makes all
    # weights a second time in each turn of the loop, in the layout of these stores.
    nothing = tl.sum(acc, 1) * 0.0
    tl.store(totals + at, tl.sum(total, 1) + nothing, mask=m < G)
    tl.store(greatest + at, most + nothing, mask=m < G)


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
    """Joins what `attend_block` found in all parts. Program: (row and query head, CHANNELS of the output)."""
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
