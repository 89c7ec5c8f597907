"""Decoding: few queries over many keys, each tile of which is read once, as keys and as values.

One program takes the queries that read one KV head and a part of the keys. Of each row it leaves the sum of values weighted by exp(logit - peak), the peak, and
the sum of the weights, and :func:`combine` adds up the parts; where there is one part, the program finishes the output itself.

Keys are the long side of both products, logits [N, M] = K q and sums [D, M] = Kᵀ w: tensor cores take 64 rows at least, of which there are as many keys as
one likes, and they read the tile where it lies in shared memory, once as it is and once transposed. The few queries are the narrow side.
Sources: Milakov and Gimelshein 2018 (1805.02867) for the running softmax; Dao et al. 2023, Flash-Decoding, for the parts.

Shapes: N keys of a tile, M rows: the queries of all heads and tokens that read one KV head.
"""

import triton
import triton.language as tl

from twofold.kernels.triton.decode_tiles import (
    allowed,
    angles,
    angles_of,
    angles_of_steps,
    as_floats,
    channel_scale,
    columns_at,
    half_of,
    half_scale,
    key_offsets,
    keys_at,
    places_of,
    program,
    read,
    share,
    sizes_of,
    token_scale,
    turned_pairs,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_keys", "splits"])
def attend(held, beside, seen, output, fixed, num_keys, splits, PLAN: tl.constexpr):
    """One part of the keys for one KV head; see :mod:`twofold.kernels.triton.decode_launch` for what each tuple holds."""
    query = held.query
    scales = fixed.scales
    sizes = sizes_of(fixed, num_keys, splits)
    DTYPE: tl.constexpr = query.pointer.dtype.element_ty
    VALUE_PIECES: tl.constexpr = PLAN.value_pieces
    where, rows, split = program(sizes, PLAN)
    places, oldest, newest, length = places_of(rows, where, seen, sizes)
    begin, end = share(split, length, oldest, newest, seen, sizes, PLAN)
    still, turning, extension = queries(query, rows, where, beside, sizes, PLAN)
    steps = ()
    if PLAN.is_steady:
        steps = angles_of_steps(held, where, sizes.num_keys, DTYPE, PLAN)
    peak = tl.full([PLAN.rows], float("-inf"), tl.float32)
    norm = tl.full([PLAN.keys, PLAN.rows], 0.0, tl.float32)
    sums = ()
    for _ in tl.static_range(VALUE_PIECES):
        sums = sums + (tl.full([PLAN.value_columns, PLAN.rows], 0.0, tl.float32),)
    # A tile that an iteration hands to the next lies in shared memory once for both products, whatever made it.
    if PLAN.carries:
        slots, key_places, here = keys_at(begin, end, where, seen, oldest, newest, PLAN)
        tiles = as_floats(read(slots, here, where, held, beside, PLAN), DTYPE)
    for first in tl.range(begin, end, PLAN.keys):
        if PLAN.carries:
            slots, key_places, here = keys_at(first + PLAN.keys, end, where, seen, oldest, newest, PLAN)
            later = read(slots, here, where, held, beside, PLAN)
        slots, key_places, here = keys_at(first, end, where, seen, oldest, newest, PLAN)
        if not PLAN.carries:
            tiles = read(slots, here, where, held, beside, PLAN)
        logits = products(tiles, still, PLAN)
        if PLAN.turn_pieces:
            logits = turned(logits, tiles, (turning, steps), (first, slots, here), where, (held, beside), PLAN)
        logits = finished(logits, extension, slots, here, rows, where, (held, beside, scales, sizes), PLAN)
        logits = tl.where(allowed(places, key_places, here, seen, PLAN), logits, float("-inf"))
        peak, shrink, weights = soften(logits, peak)
        norm = norm * shrink[None, :] + weights
        if beside.value_scales is not None:
            weights = weights * token_scale(beside.value_scales, slots, here, where, beside, PLAN)[:, None]
        weights = weights.to(DTYPE)
        sums = grown(sums, shrink, tiles, weights, PLAN)
        if PLAN.carries:
            tiles = as_floats(later, DTYPE)
    leave((sums, peak, tl.sum(norm, 0)), rows, where, split, beside, output, sizes, PLAN)


@triton.jit
def products(tiles, still, PLAN: tl.constexpr):
    """k q over the dimensions that lie still, [N, M]."""
    PIECES: tl.constexpr = PLAN.pieces
    logits = tl.full([PLAN.keys, PLAN.rows], 0.0, tl.float32)
    for piece in tl.static_range(PIECES):
        if lies_still(piece, PLAN):
            logits = tl.dot(tiles[piece], still[piece], logits)
    return logits


@triton.jit
def grown(sums, shrink, tiles, weights, PLAN: tl.constexpr):
    """sums, shrunk, and the tile's values by their weights, [D, M]."""
    VALUE_PIECES: tl.constexpr = PLAN.value_pieces
    total = ()
    for piece in tl.static_range(VALUE_PIECES):
        values = tl.trans(tiles[PLAN.first_value + piece])
        total = total + (tl.dot(values, weights, sums[piece] * shrink[None, :]),)
    return total


@triton.jit
def queries(query, rows, where, beside, sizes, PLAN: tl.constexpr):
    """Of all rows, [columns, M]: pieces for the keys as they lie, pieces for the dimensions that turn, and the part that meets the extension."""
    head = where[1] * sizes.group + rows // sizes.num_queries
    offsets = where[0].to(tl.int64) * query.strides[0] + head.to(tl.int64) * query.strides[1]
    offsets += (rows % sizes.num_queries) * query.strides[2]
    here = rows < sizes.group * sizes.num_queries
    PIECES: tl.constexpr = PLAN.pieces
    TURN_PIECES: tl.constexpr = PLAN.turn_pieces
    still, turning = (), ()
    for piece in tl.static_range(PIECES):
        found = columns_at(query, offsets, here, piece * PLAN.columns, PLAN.columns, PLAN.head_dim)
        if beside.channels is not None:
            scale = channel_scale(beside.channels, where, piece * PLAN.columns, PLAN.columns, PLAN.head_dim)
            found = (found.to(tl.float32) * scale[None, :]).to(found.dtype)
        if PLAN.again:  # what turns is multiplied apart
            column = piece * PLAN.columns + tl.arange(0, PLAN.columns)
            turns = (column < PLAN.pairs) | ((column >= PLAN.distance) & (column < PLAN.distance + PLAN.pairs))
            found = tl.where(turns[None, :], tl.zeros_like(found), found)
        still = still + (tl.trans(found),)
    for half in tl.static_range(2):
        for piece in tl.static_range(TURN_PIECES):
            found = half_of(query, offsets, here, half, piece, PLAN)
            turning = turning + (tl.trans(found),)
    extension = ()
    if PLAN.extension_columns:
        found = columns_at(
            query, offsets, here, PLAN.head_dim, PLAN.extension_columns, PLAN.head_dim + PLAN.extension_dim
        )
        extension = (tl.trans(found),)
    return still, turning, extension


@triton.constexpr_function
def lies_still(piece, plan):
    """Whether a piece of the tile meets the query as it lies: all but those that turn, or meet it in :func:`turned` alone."""
    if plan.again:
        return 2 * plan.pairs < plan.head_dim
    return not (piece < plan.turn_pieces or plan.partner <= piece < plan.partner + plan.turn_pieces)


@triton.jit
def turned(logits, tiles, turning, keys, where, given, PLAN: tl.constexpr):
    """logits + R(s * k) q over the dimensions that turn, [N, M]; the halves of each pair are pieces of the tile, or read again.

    R(p) k is multiplied by q as it is; where the turning is steady, R(p - p0) k is by R(-p0) q, p0 being the first key's place: what keys need is the same for every tile.
    """
    held, beside = given
    query, steps = turning
    first, slots, here = keys
    TURN_PIECES: tl.constexpr = PLAN.turn_pieces
    DTYPE: tl.constexpr = query[0].dtype
    for piece in tl.static_range(TURN_PIECES):
        if PLAN.again:
            offsets = key_offsets(slots, here, held.key, where, beside, PLAN)
            a = half_of(held.key, offsets, here, 0, piece, PLAN).to(DTYPE)
            b = half_of(held.key, offsets, here, 1, piece, PLAN).to(DTYPE)
        else:
            a, b = tiles[piece], tiles[piece + PLAN.partner]
        if beside.channels is not None:
            a = (a.to(tl.float32) * half_scale(beside.channels, where, 0, piece, PLAN)[None, :]).to(DTYPE)
            b = (b.to(tl.float32) * half_scale(beside.channels, where, 1, piece, PLAN)[None, :]).to(DTYPE)
        query_a, query_b = query[piece], query[piece + TURN_PIECES]
        if PLAN.is_steady:
            cosine, sine = steps[piece], steps[piece + TURN_PIECES]
            first_cosine = angles_of(held.cosine, first, where, piece, 1.0, PLAN)
            first_sine = angles_of(held.sine, first, where, piece, 0.0, PLAN)
            query_a, query_b = turned_back(query_a, query_b, first_cosine, first_sine, DTYPE)
        else:
            cosine = angles(held.cosine, slots, here, where, piece, 1.0, PLAN).to(DTYPE)
            sine = angles(held.sine, slots, here, where, piece, 0.0, PLAN).to(DTYPE)
        a, b = turned_pairs(a, b, cosine, sine, PLAN)
        logits = tl.dot(a, query_a, logits)
        logits = tl.dot(b, query_b, logits)
    return logits


@triton.jit
def turned_back(a, b, cosine, sine, DTYPE: tl.constexpr):
    """R(-p0) q of some pairs, [columns, M]; cosine and sine are those of p0, [columns]."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    first = a * cosine[:, None] + b * sine[:, None]
    return first.to(DTYPE), (b * cosine[:, None] - a * sine[:, None]).to(DTYPE)


@triton.jit
def finished(logits, extension, slots, here, rows, where, given, PLAN: tl.constexpr):
    """Logits, from products with keys as they are held: with the scale of each token, the shared key, the scale, the cap and the bias."""
    held, beside, scales, sizes = given
    if beside.key_scales is not None:
        logits = logits * token_scale(beside.key_scales, slots, here, where, beside, PLAN)[:, None]
    if PLAN.extension_columns:
        stream = held.extension
        offsets = where[0].to(tl.int64) * stream.strides[0] + slots.to(tl.int64) * stream.strides[2]
        key = columns_at(stream, offsets, here, 0, PLAN.extension_columns, PLAN.extension_dim)
        logits = tl.dot(key, extension[0], logits)
    logits = logits * scales.scale
    if scales.soft_cap is not None:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
        exponentials = tl.exp2(logits * (2 * LOG2E / scales.soft_cap))
        logits = scales.soft_cap * (1.0 - 2.0 / (1.0 + exponentials))
    if beside.bias is not None:
        bias, group, num_queries = beside.bias, sizes.group, sizes.num_queries
        head = (where[1] * group + rows // num_queries).to(tl.int64)
        at = where[0].to(tl.int64) * bias.strides[0] + head * bias.strides[1]
        at += (rows % num_queries).to(tl.int64) * bias.strides[2]
        at = at[None, :] + slots.to(tl.int64)[:, None] * bias.strides[3]
        inside = here[:, None] & (rows < group * num_queries)[None, :]
        logits += tl.load(bias.pointer + at, mask=inside, other=0.0).to(tl.float32)
    return logits


@triton.jit
def soften(logits, peak):
    """The new peak [M], what all that was summed before shrinks by [M], and exp(logits - peak) [N, M]. Before a row sees a key its peak is -inf."""
    higher = tl.maximum(peak, tl.max(logits, 0))
    level = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, tl.exp2((peak - level) * LOG2E), tl.exp2((logits - level[None, :]) * LOG2E)


@triton.jit
def leave(state, rows, where, split, beside, output, sizes, PLAN: tl.constexpr):
    """Write the output, where this is the only part, or the state of this part."""
    sums, peak, norm = state
    VALUE_PIECES: tl.constexpr = PLAN.value_pieces
    inside = rows < sizes.group * sizes.num_queries
    head, token = where[1] * sizes.group + rows // sizes.num_queries, rows % sizes.num_queries
    factor = 1.0
    if PLAN.is_whole:
        factor, norm = with_sink(peak, norm, head, inside, output.sinks)
        factor = factor / tl.where(norm == 0.0, 1.0, norm)
        offsets = where[0].to(tl.int64) * output.final.strides[0] + head.to(tl.int64) * output.final.strides[1]
        at = output.final.pointer + (offsets + token * output.final.strides[2])[None, :]
        stride = output.final.strides[3]
    else:
        heads = sizes.kv_heads * sizes.group
        part = ((where[0].to(tl.int64) * heads + head) * sizes.num_queries + token) * sizes.splits + split
        peaks, norms = peaks_and_norms(output, sizes, PLAN)
        tl.store(peaks + part, peak, mask=inside)
        tl.store(norms + part, norm, mask=inside)
        at = output.parts + (part * PLAN.value_dim)[None, :]
        stride = 1
    for piece in tl.static_range(VALUE_PIECES):
        found = sums[piece]
        if beside.value_channels is not None:
            channels = beside.value_channels
            scale = channel_scale(channels, where, piece * PLAN.value_columns, PLAN.value_columns, PLAN.value_dim)
            found = found * scale[:, None]
        if PLAN.is_whole:
            found = found * factor[None, :]
        columns = piece * PLAN.value_columns + tl.arange(0, PLAN.value_columns)
        mask = (columns < PLAN.value_dim)[:, None] & inside[None, :]
        tl.store(at + columns[:, None] * stride, found.to(at.dtype.element_ty), mask=mask)


@triton.jit
def with_sink(peak, norm, head, inside, sinks):
    """What sums are multiplied by, and the sum of weights, when a key of value 0 that everybody sees has its share."""
    factor = tl.full(peak.shape, 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks.pointer + head * sinks.strides[0], mask=inside, other=0.0).to(tl.float32)
        level = tl.maximum(peak, sink)
        level = tl.where(level == float("-inf"), 0.0, level)
        factor = tl.exp2((peak - level) * LOG2E)
        norm = norm * factor + tl.exp2((sink - level) * LOG2E)
    return factor, norm


@triton.jit
def peaks_and_norms(output, sizes, PLAN: tl.constexpr):
    """Where the peaks of all parts begin, and where their norms do: behind the sums."""
    parts = sizes.splits.to(tl.int64) * sizes.batch * sizes.kv_heads * sizes.group * sizes.num_queries
    peaks = output.parts + parts * PLAN.value_dim
    return peaks, peaks + parts


@triton.jit(do_not_specialize=["num_keys", "splits"])
def combine(output, fixed, num_keys, splits, PLAN: tl.constexpr):
    """One row of the output, from all parts of the keys."""
    sizes = sizes_of(fixed, num_keys, splits)
    number = tl.program_id(0)
    token, head = number % sizes.num_queries, number // sizes.num_queries % (sizes.kv_heads * sizes.group)
    batch = number // (sizes.num_queries * sizes.kv_heads * sizes.group)
    columns = tl.arange(0, PLAN.value_pieces * PLAN.value_columns)
    is_column = columns < PLAN.value_dim
    all_peaks, all_norms = peaks_and_norms(output, sizes, PLAN)
    peak = tl.full([1], float("-inf"), tl.float32)
    norm = tl.full([1], 0.0, tl.float32)
    total = tl.full([PLAN.value_pieces * PLAN.value_columns], 0.0, tl.float32)
    for first in tl.range(0, sizes.splits, PLAN.parts_at_a_time):
        part = first + tl.arange(0, PLAN.parts_at_a_time)
        inside = part < sizes.splits
        part = number.to(tl.int64) * sizes.splits + part
        peaks = tl.load(all_peaks + part, mask=inside, other=float("-inf"))
        norms = tl.load(all_norms + part, mask=inside, other=0.0)
        at = output.parts + part[:, None] * PLAN.value_dim + columns[None, :]
        sums = tl.load(at, mask=inside[:, None] & is_column[None, :], other=0.0)
        peak, shrink, weights = soften(peaks[:, None], peak)
        norm = norm * shrink + tl.sum(norms[:, None] * weights, 0)
        total = total * shrink + tl.sum(sums * weights, 0)
    factor, norm = with_sink(peak, norm, head + tl.arange(0, 1) * 0, tl.arange(0, 1) == 0, output.sinks)
    offsets = batch.to(tl.int64) * output.final.strides[0] + head.to(tl.int64) * output.final.strides[1]
    at = output.final.pointer + offsets + token * output.final.strides[2] + columns * output.final.strides[3]
    tl.store(at, (total * factor / tl.where(norm == 0.0, 1.0, norm)).to(at.dtype.element_ty), mask=is_column)
