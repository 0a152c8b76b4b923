# mypy: disable-error-code="no-untyped-def"
"""The GPU's code, in Triton. `gpu` calls it, and says what the tensors hold.

Letters: B rows, H query heads, Hkv KV heads, G query heads a KV head, P tokens of a block, D channels of a key, E
channels of a value. Logits are in units of log2, so that `exp2` takes them.

A block's tokens are walked in tiles of TILE tokens. Planes of w bits hold 8 / w stretches of tokens, and tokens at the
same place of each stretch share a byte. A tile has TILE / 8 neighbours of each of 8 stretches, so that one load takes
all that is in a byte: where it names the same byte for several tokens, the bytes come from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    EXACT: tl.constexpr,
):
    """`out [B * H, positions]`: the product of each query with its head's centre, turned to each position.

    It is `z @ table.T` with `z[k] = q[first[k]] * of_first[k] + q[second[k]] * of_second[k]`. EXACT: numbers are split
    into two of float16 each, so that the product is as exact as one in float32. Program: (share of the positions, ROWS
    rows).
    """
    k = tl.arange(0, K)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < rows
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
    # What is made of the queries costs as much as a tile's product, so it serves several tiles.
    for begin in tl.range(tl.program_id(0) * TILE, positions, tl.num_programs(0) * TILE):
        position = begin + tl.arange(0, TILE)
        reached = position < positions
        at_table = position[None, :] * K + k[:, None]
        t = tl.load(table + at_table, mask=reached[None, :], other=0)
        product = tl.dot(high, t)
        if EXACT:
            t_rest = tl.load(table_rest + at_table, mask=reached[None, :], other=0)
            product = tl.dot(rest, t, tl.dot(high, t_rest, product))
        at_out = row.to(tl.int64)[:, None] * positions + position[None, :]
        tl.store(out + at_out, product * most[:, None], mask=real[:, None] & reached[None, :])


@triton.jit
def _place(token, k, t, length, P, WIDTH: tl.constexpr, SHARED: tl.constexpr):
    """Where the bytes of the tokens stand in a plane of tokens, and where their bits in the byte.

    SHARED: stretches of a tile that fill 8 bits of a token, 0 where the block does not divide into them without a rest.
    Then it takes divisions by numbers that the compiler does not know.
    """
    if SHARED > 0:
        neighbours: tl.constexpr = SHARED * WIDTH // 8
        return k % neighbours * length + t, k // neighbours * WIDTH
    bytes_long = (P * WIDTH + 7) // 8
    return token % bytes_long, token // bytes_long * WIDTH & 7


@triton.jit
def _plane(
    base, token, k, t, length, channels, shown, P, SIZE: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr
):
    """Bytes `[TILE, channels]` of one plane `[P * WIDTH / 8, SIZE]` that hold the tokens' bits."""
    place, _ = _place(token, k, t, length, P, WIDTH, SHARED)
    return tl.load(base + place[:, None] * SIZE + channels[None, :], mask=shown, other=0)


def _four_codes(planes: tuple[int, ...]) -> tl.constexpr:
    """PTX that makes float16 of the codes in four bytes at a time. A byte behind 0x64 is the float16 of 1024 more.

    Width 0: the mask is given as well, and the bytes are of `_held`. Shifts and masks are int32, so each comes in four
    registers, of which the first is taken: four of uint8 would be put together in one first.
    """
    # Inputs are read before the first output is written, which may stand in the same register.
    lines, place = [], 2
    for number, width in enumerate(planes):
        code, source = f"%x{number}", f"${place}"
        if width == 8:
            lines.append(f"mov.b32 {code}, {source};")
            continue
        shift, mask = ("$6", "$10") if width == 0 else (f"${place + 1}", f"{0x01010101 * ((1 << width) - 1):#x}")
        lines += [f"shr.b32 {code}, {source}, {shift};", f"and.b32 {code}, {code}, {mask};"]
        place += 5
    if len(planes) == 2:
        lines.append("mad.lo.u32 %x0, %x0, 2, %x1;")
    lines += ["mov.b32 %m, 0x64646464;", "mov.b32 %b, 0x64006400;"]
    for number, bytes_ in enumerate(("0x4140", "0x4342")):
        lines += [f"prmt.b32 %y, %x0, %m, {bytes_};", f"sub.f16x2 ${number}, %y, %b;"]
    text = "{ .reg .b32 %x0, %x1, %m, %b, %y; " + " ".join(lines) + " }"
    return tl.constexpr(text.replace("%", ""))


_FOUR_MASKED, _FOUR_1, _FOUR_2, _FOUR_4, _FOUR_8 = (_four_codes((width,)) for width in (0, 1, 2, 4, 8))
_FOUR_3 = _four_codes((2, 1))
_ONE_INPUT = tl.constexpr("=r,=r,r")
_ONE_PLANE = tl.constexpr("=r,=r" + ",r" * 5)
_HELD_AND_MASK = tl.constexpr("=r,=r" + ",r" * 12)
_TWO_PLANES = tl.constexpr("=r,=r" + ",r" * 10)


@triton.jit
def _four_of_one(x, shift, WIDTH: tl.constexpr):
    """Float16 of the WIDTH bits above the shift in each byte."""
    if WIDTH == 1:
        return tl.inline_asm_elementwise(_FOUR_1, _ONE_PLANE, [x, shift], tl.float16, True, 4)
    if WIDTH == 2:
        return tl.inline_asm_elementwise(_FOUR_2, _ONE_PLANE, [x, shift], tl.float16, True, 4)
    if WIDTH == 4:
        return tl.inline_asm_elementwise(_FOUR_4, _ONE_PLANE, [x, shift], tl.float16, True, 4)
    return tl.inline_asm_elementwise(_FOUR_8, _ONE_INPUT, [x], tl.float16, True, 4)


@triton.jit
def _codes(first, second, token, k, t, length, P, BITS: tl.constexpr, SHARED: tl.constexpr, FOUR: tl.constexpr):
    """Codes as float16 of the bytes of their planes."""
    _, high = _place(token, k, t, length, P, 2 if BITS == 3 else BITS, SHARED)
    high = high[:, None]
    if BITS == 3:
        _, low = _place(token, k, t, length, P, 1, SHARED)
        low = low[:, None]
        if FOUR:
            return tl.inline_asm_elementwise(_FOUR_3, _TWO_PLANES, [first, high, second, low], tl.float16, True, 4)
        return ((first >> high.to(tl.uint8) & 3) * 2 + (second >> low.to(tl.uint8) & 1)).to(tl.float16)
    if FOUR:
        return _four_of_one(first, high, BITS)
    return (first >> high.to(tl.uint8) & ((1 << BITS) - 1)).to(tl.float16)


@triton.jit
def _held(x):
    """Int32 of the shape of the bytes x, for a loop to carry: each first one of four has four bytes.

    The others are never written and never read. Bytes would be taken apart and put together in each turn.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $4;", "=r,=r,=r,=r,r", [x], tl.int32, True, 4)


@triton.jit
def _chunk_loads(
    planes4,
    planes2,
    planes1,
    weights,
    chunk,
    row,
    inside,
    k,
    t,
    BYTES,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    FOUR: tl.constexpr,
):
    """The bytes `[CHUNK, TILE]` of some rows of a plane of channels, and the weights `[M, CHUNK]` of their codes.

    chunk: points to first row, number of rows, width of the plane, place of the weights, and rows of the plane over all
    heads. inside: `[TILE]`, whether a byte is one of the rows'. Its last bits may stand for no token. What is added up
    for these is left out later: a mask by tokens would be one by bytes, and each byte be loaded alone.
    """
    start, count, width = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    i = tl.arange(0, CHUNK)
    w = tl.load(weights + (tl.load(chunk + 3) + i)[None, :])
    # Planes are chosen by number: a pointer cannot be, and what is known of its alignment would be lost.
    plane = tl.where(width == 4, planes4.to(tl.int64), planes2.to(tl.int64))
    plane = tl.where(width == 1, planes1.to(tl.int64), plane) - planes4.to(tl.int64)
    plane += (row * tl.load(chunk + 4) + start).to(tl.int64) * (width * BYTES)
    bytes_ = planes4 + tl.multiple_of(plane, ALIGNED)
    at = i[:, None] * (width * BYTES) + ((k & (width - 1)) * BYTES + t)[None, :]
    x = tl.load(bytes_ + at, mask=(i < count)[:, None] & inside[None, :], other=0)
    if FOUR:
        x = _held(x)
    return x, w


@triton.jit
def _chunk_codes(x, chunk, k, FOUR: tl.constexpr):
    """Codes as float16 of the bytes of `_chunk_loads`."""
    width = tl.load(chunk + 2)
    shift = (k - (k & (width - 1)))[None, :]
    mask = (1 << width) - 1
    if FOUR:
        return tl.inline_asm_elementwise(
            _FOUR_MASKED, _HELD_AND_MASK, [x, shift, mask * 0x01010101], tl.float16, True, 4
        )
    return ((x >> shift.to(tl.uint8)) & mask.to(tl.uint8)).to(tl.float16)


@triton.jit
def _found(found, rows, all_splits, E: tl.constexpr):
    """Where two parts of what programs find begin: float32 `totals` and `greatest`, `[all_splits, B * H]`.

    The first part is `[all_splits, B * H, E]`: values, weighted by `exp2(logit - greatest)`. The totals are the sums of
    these weights, and the greatest are logits.
    """
    totals = found + all_splits.to(tl.int64) * rows * E
    return totals, totals + all_splits.to(tl.int64) * rows


# Numbers that differ from call to call or from layer to layer: none of them is worth a kernel of its own.
_VARYING = ["P", "stretch", "most_chunks", "of_centre_length", "position_step"]
_VARYING += [
    "positions_length",
    "first_slot",
    "first_split",
    "splits",
    "all_splits",
    "shown_row",
    "shown_head",
    "first_weights",
    "all_heads",
]
_UNALIGNED = ["queries", "offsets", "of_centre", "positions", "shown", "k_zero", "k_span"]
_UNALIGNED += ["v_zero", "v_span"]

FIELDS = (
    *("k0", "k1", "k2", "k_zero", "k_span", "v0", "v1", "v_zero", "v_span", "positions", "chunks"),  # addresses
    *("most_chunks", "P", "stretch", "first_slot", "positions_length", "heads", "k_row", "k_head", "v_row", "v_head"),
)
"""What differs between heads that hold different numbers of tokens: a row of `table` for each group of heads."""
_FIELDS = tl.constexpr(len(FIELDS))


@triton.jit
def _address(entry, FIELD: tl.constexpr, like):
    """A pointer to tensors, which begin at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(entry + FIELD).to(like.dtype), 16)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def attend_block(
    found,  # float32, see `_found`
    queries,  # [B * H, D]
    weights,  # of `query_weights`
    offsets,  # of `query_weights`
    chunks,  # int32 [Hkv, most_chunks, 8], see `_chunk_loads`, and their number
    of_centre,  # float32 [B * H, of_centre_length] of `centre_logits`
    positions,  # int32 [B, Hkv, positions_length]
    shown,  # uint8, strides shown_row and shown_head, over all slots
    table,  # int64 [groups of heads, FIELDS]
    head_map,  # int32 [Hkv, 2], group and place in it of each head; or the heads [Hkv] that are attended to
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
    most_chunks,
    first_weights,  # of the block, in rows
    of_centre_length,
    position_step,  # 0 where keys do not turn
    positions_length,
    first_slot,  # of the block
    first_split,
    all_heads,
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
    CHUNK: tl.constexpr,  # rows of a plane of channels that are multiplied at a time
    CENTRED: tl.constexpr,
    MASKED: tl.constexpr,
    STRETCHES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype in which numbers are multiplied
    EVEN: tl.constexpr,  # P is a multiple of STRETCHES
    FOUR: tl.constexpr,  # codes are converted four at a time, which the interpreter cannot
    JOINT: tl.constexpr,
):
    """Attention over a part of one block. Program: (part, KV head, row).

    JOINT, where heads hold different numbers of tokens: 1, the block of each group of heads is somewhere else, and
    `table` says where; 2, what is given belongs to some of `all_heads`.

    Rows of the matrices are query heads, once for each group of a value's channels, whose weights are its own: what a
    row finds in other groups' channels is left out at the end.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    kv = row.to(tl.int64) * kv_heads + head
    queried = kv  # the same KV head among all
    if JOINT == 1:
        entry = table + tl.load(head_map + head * 2).to(tl.int64) * _FIELDS
        head = tl.load(head_map + head * 2 + 1)
        k0, k1, k2 = _address(entry, 0, k0), _address(entry, 1, k1), _address(entry, 2, k2)
        k_zero, k_span = _address(entry, 3, k_zero), _address(entry, 4, k_span)
        v0, v1 = _address(entry, 5, v0), _address(entry, 6, v1)
        v_zero, v_span = _address(entry, 7, v_zero), _address(entry, 8, v_span)
        positions, chunks = _address(entry, 9, positions), _address(entry, 10, chunks)
        most_chunks, P = tl.load(entry + 11).to(tl.int32), tl.load(entry + 12).to(tl.int32)
        stretch, first_slot = tl.load(entry + 13).to(tl.int32), tl.load(entry + 14).to(tl.int32)
        positions_length = tl.load(entry + 15).to(tl.int32)
        kv = row.to(tl.int64) * tl.load(entry + 16) + head
        k_row, k_head = tl.load(entry + 17), tl.load(entry + 18)
        v_row, v_head = tl.load(entry + 19), tl.load(entry + 20)
    if JOINT == 2:
        kv_heads = all_heads
        queried = row.to(tl.int64) * all_heads + tl.load(head_map + head)
    m = tl.arange(0, M)
    real_row = m < G * V_GROUPS
    query = queried * G + m % G
    group = tl.where(real_row, m // G, 0)
    d, e = tl.arange(0, D_FILLED), tl.arange(0, E_FILLED)
    SHARED: tl.constexpr = STRETCHES if EVEN else 0
    PART: tl.constexpr = TILE // STRETCHES
    k, part = tl.arange(0, TILE) // PART, tl.arange(0, TILE) % PART
    length = stretch * ALIGNED
    # Four bytes that are converted together have one shift: they have to stand in one stretch, and be loaded together.
    FOUR_KEYS: tl.constexpr = FOUR and ALIGNED % 4 == 0 and PART % 4 == 0
    tiles = (length + PART - 1) // PART
    first, last = tiles * split // splits, tiles * (split + 1) // splits

    if K_BITS == 0:
        weight_rows = weights + (first_weights + query)[:, None] * SLOTS
        offset = tl.load(offsets + first_weights + query)
        own_chunks = chunks + head * most_chunks * 8
        count = tl.load(own_chunks + 5)
        t = first * PART + part
        x, w = _chunk_loads(
            k0, k1, k2, weight_rows, own_chunks, row, t < length, k, t, length, ALIGNED, CHUNK, FOUR_KEYS
        )
    elif K_BITS == 16:
        q = tl.load(queries + query[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0)
    low = tl.zeros([M, TILE], tl.float32)
    total = tl.zeros([M, TILE], tl.float32)
    most = tl.full([M], float("-inf"), tl.float32)
    acc = tl.zeros([M, E_FILLED], tl.float32)
    for tile in range(first, last):
        t = tile * PART + part
        token = k * length + t
        real = (t < length) & (token < P)
        # Values first, so that they are under way while the logits are made.
        of_value = real[:, None] & (e < E)[None, :]
        if V_BITS == 16:
            of_head = v0 + row.to(tl.int64) * v_row + head.to(tl.int64) * v_head
            v = tl.load(of_head + token[:, None] * E + e[None, :], mask=of_value, other=0)
        elif V_BITS == 3:
            x0 = _plane(v0 + kv * ((P * 2 + 7) // 8) * E, token, k, t, length, e, of_value, P, E, 2, SHARED)
            x1 = _plane(v1 + kv * ((P + 7) // 8) * E, token, k, t, length, e, of_value, P, E, 1, SHARED)
        else:
            x0 = _plane(v0 + kv * ((P * V_BITS + 7) // 8) * E, token, k, t, length, e, of_value, P, E, V_BITS, SHARED)
            x1 = x0

        if CENTRED:
            position = tl.load(positions + kv * positions_length + first_slot + token, mask=real, other=0)
            at = query[:, None] * of_centre_length + (position * position_step)[None, :]
            centred = tl.load(of_centre + at, mask=real[None, :], other=0)

        logits = tl.zeros([M, TILE], tl.float32)
        if K_BITS == 0:
            scale = tl.load(k_zero + kv * P + token, mask=real, other=0).to(tl.float32)
            for c in range(count):
                # What comes next is under way while this is multiplied.
                last_one = c + 1 == count
                chunk = own_chunks + c * 8
                following = tl.where(last_one, 0, c + 1) * 8
                t_next = t + tl.where(last_one, PART, 0)
                x_next, w_next = _chunk_loads(
                    k0,
                    k1,
                    k2,
                    weight_rows,
                    own_chunks + following,
                    row,
                    t_next < length,
                    k,
                    t_next,
                    length,
                    ALIGNED,
                    CHUNK,
                    FOUR_KEYS,
                )
                logits = tl.dot(w, _chunk_codes(x, chunk, k, FOUR_KEYS), logits)
                x, w = x_next, w_next
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
                    y0 = _plane(k0 + kv * ((P * 2 + 7) // 8) * D, token, k, t, length, channel, of_key, P, D, 2, SHARED)
                    y1 = _plane(k1 + kv * ((P + 7) // 8) * D, token, k, t, length, channel, of_key, P, D, 1, SHARED)
                else:
                    y0 = _plane(
                        k0 + kv * ((P * K_BITS + 7) // 8) * D,
                        token,
                        k,
                        t,
                        length,
                        channel,
                        of_key,
                        P,
                        D,
                        K_BITS,
                        SHARED,
                    )
                    y1 = y0
                product = tl.dot(q, tl.trans(_codes(y0, y1, token, k, t, length, P, K_BITS, SHARED, FOUR)))
                at = (kv * P + token) * K_GROUPS + g
                width = tl.exp2((tl.load(k_span + at, mask=real, other=0).to(tl.float32) - 128) / 8 - K_BITS)
                zero = tl.load(k_zero + at, mask=real, other=0).to(tl.float32) * (2.0**K_BITS / 255)
                product += tl.sum(q.to(tl.float32), 1)[:, None] * (0.5 - zero)[None, :]
                logits += product * width[None, :]
        if CENTRED:
            logits += centred
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
            acc = tl.dot(p, _codes(x0, x1, token, k, t, length, P, V_BITS, SHARED, FOUR), acc * decay[:, None])

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
