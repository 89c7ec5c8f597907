"""The gradients of attention over one stream: what reaches it as key and as value is added up in one sum, and written once.

With P the softmax, O the output, dO its gradient and δ = Σ dO O per query, dS = P (dO Vᵀ - δ); dQ = α dS K, dK = α dSᵀ Q, dV = Pᵀ dO. One kernel
walks over keys for dQ, one over queries, those of all heads that read a KV head, for the stream. With K = V = n, a tile of n is the
left side of both products that it takes part in, and dn = dV + dK has one accumulator of float32; where K = R(s * n), dK has its own,
and dn = dV + s * Rᵀ dK is made when the walk has ended.

In float16 P is held as 2^e P, 2^e near 1 / α: dS, times α here and already, is then not so small that float16 cannot tell it from 0.

Source: FlashAttention-2 (2307.08691), algorithm 2; the one accumulator is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from twofold.kernels.triton.prefill import query_block
from twofold.kernels.triton.prefill_tiles import (
    documents_at,
    in_runs,
    key_range,
    keys_at,
    keys_of,
    logits_of,
    place_at,
    query_parts,
    query_range,
    tile,
    visible,
    walk_over,
    write,
    zeros,
)


class Queries(NamedTuple):
    """Where the queries of a sequence begin, and what belongs to them; ``head`` is the first of those that are read."""

    strides: object
    head: object
    query: object
    gradient: object
    level: object
    delta: object


@triton.jit
def prepare(tensors, strides, sizes, scales, PLAN: tl.constexpr):
    """What both kernels want of each query, [B, H, rows], ready: log2 of its sum less e, and α δ, δ being the sum of the output times its gradient.

    ``scales`` are α and e. Rows beyond the last query are those of one that sees nothing.
    """
    blocks = sizes.query_rows // PLAN.queries
    program = tl.program_id(0)
    first = program % blocks * PLAN.queries
    head = program // blocks % sizes.heads
    batch = program // blocks // sizes.heads
    rows_left = sizes.num_queries - first
    row = batch.to(tl.int64)
    output = tensors.output + row * strides.output[0] + head.to(tl.int64) * strides.output[1]
    output += first.to(tl.int64) * strides.output[2]
    gradient = tensors.gradient + row * strides.gradient[0] + head.to(tl.int64) * strides.gradient[1]
    gradient += first.to(tl.int64) * strides.gradient[2]
    o = tile(output, strides.output[2], rows_left, PLAN.queries, PLAN.columns, PLAN.head_dim, False)
    do = tile(gradient, strides.gradient[2], rows_left, PLAN.queries, PLAN.columns, PLAN.head_dim, False)
    rows = tl.arange(0, PLAN.queries)
    numbers = row * sizes.heads + head
    logarithm = tensors.logarithm + numbers * sizes.num_queries + first + rows
    logarithm = tl.load(logarithm, mask=rows < rows_left, other=float("inf"))
    numbers = numbers * sizes.query_rows + first + rows
    tl.store(tensors.level + numbers, logarithm - scales[1])
    tl.store(tensors.delta + numbers, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) * scales[0])


# The gradient of the queries


@triton.jit
def walk_keys(state, query, places, held, span, scales, PLAN: tl.constexpr, MASKED: tl.constexpr):
    """Take the keys of a span into the three sums of dS K. ``query`` is its parts, dO, level and delta."""
    rest_sum, a_sum, b_sum = state
    way = walk_over(span, MASKED, PLAN.window, True)
    for step in range(0, way[1], PLAN.keys):
        first = place_at(step, way, PLAN.keys, MASKED, PLAN.window, True)
        rest, a, b, value = keys_at(held, first, not MASKED, PLAN)
        weights = tl.exp2(logits_of(query, (rest, a, b), PLAN) * scales[0] - query[4][:, None])
        if MASKED:
            key_places = first + tl.arange(0, PLAN.keys)[None, :]
            documents = documents_at(held, key_places, PLAN)
            weights = tl.where(visible(places, (key_places, documents), held, PLAN), weights, 0.0)
        d_weights = tl.dot(query[3], tl.trans(value), zeros(PLAN.queries, PLAN.keys), input_precision="ieee")
        d_logits = weights * (d_weights * scales[1] - query[5][:, None])
        d_logits = d_logits.to(held.key.dtype.element_ty)
        # In this order: ptxas would carry out the products of another one by one.
        if not PLAN.turns_all:
            rest_sum = tl.dot(d_logits, rest, rest_sum, input_precision="ieee")
        if PLAN.turns:
            a_sum = tl.dot(d_logits, a, a_sum, input_precision="ieee")
            b_sum = tl.dot(d_logits, b, b_sum, input_precision="ieee")
    return rest_sum, a_sum, b_sum


@triton.jit
def query_gradient(tensors, strides, sizes, scales, PLAN: tl.constexpr):
    """dQ [B, H, T, D]. ``scales`` are that of base 2, α, and 2^-e."""
    block, head, batch = query_block(sizes, PLAN)
    first = block * PLAN.queries
    rows_left = sizes.num_queries - first
    before = sizes.num_keys - sizes.num_queries
    row = batch.to(tl.int64)
    pointer = tensors.query + row * strides.query[0] + head.to(tl.int64) * strides.query[1]
    pointer += first.to(tl.int64) * strides.query[2]
    rest, a, b = query_parts(pointer, strides.query[2], rows_left, PLAN)
    pointer = tensors.gradient + row * strides.gradient[0] + head.to(tl.int64) * strides.gradient[1]
    pointer += first.to(tl.int64) * strides.gradient[2]
    do = tile(pointer, strides.gradient[2], rows_left, PLAN.queries, PLAN.columns, PLAN.head_dim, False)
    rows = tl.arange(0, PLAN.queries)
    numbers = (row * sizes.heads + head) * sizes.query_rows + first + rows
    query = (rest, a, b, do, tl.load(tensors.level + numbers), tl.load(tensors.delta + numbers))
    held = keys_of(tensors, strides, sizes, batch, head // sizes.group)
    place = (before + first + rows)[:, None]
    places = (place, documents_at(held, place, PLAN))
    last = tl.minimum(before + first + PLAN.queries, sizes.num_keys) - 1
    ranges = tensors.ranges + (batch * tl.cdiv(sizes.num_queries, PLAN.queries) + block) * 2
    span = key_range(before + first, last, ranges, sizes, PLAN)

    state = (
        zeros(PLAN.queries, PLAN.columns),
        zeros(PLAN.queries, PLAN.pair_columns),
        zeros(PLAN.queries, PLAN.pair_columns),
    )
    if not PLAN.hides:
        state = walk_keys(state, query, places, held, span, scales, PLAN, False)
    state = walk_keys(state, query, places, held, span, scales, PLAN, True)
    write_query_gradient(state, (tensors, strides, scales[2]), (row, head, first, rows_left), PLAN)


@triton.jit
def write_query_gradient(state, given, place, PLAN: tl.constexpr):
    """The sums, times 2^-e, each to its columns."""
    tensors, strides, scale = given
    row, head, first, rows_left = place
    DTYPE: tl.constexpr = tensors.d_query.dtype.element_ty
    stride = strides.d_query[2]
    pointer = tensors.d_query + row * strides.d_query[0] + head.to(tl.int64) * strides.d_query[1]
    pointer += first.to(tl.int64) * stride
    if not PLAN.turns_all:
        rest = state[0] * scale
        columns = tl.arange(0, PLAN.columns)
        there = columns < PLAN.head_dim
        if PLAN.turns:
            in_b = (columns >= PLAN.distance) & (columns < PLAN.distance + PLAN.pairs)
            there = there & (columns >= PLAN.pairs) & ~in_b
        rows = tl.arange(0, PLAN.queries)[:, None]
        pointers = pointer + rows * stride + columns[None, :]
        tl.store(pointers, rest.to(DTYPE), mask=(rows < rows_left) & there[None, :])
    if PLAN.turns:
        a = (state[1] * scale).to(DTYPE)
        b = (state[2] * scale).to(DTYPE)
        write(pointer, stride, rows_left, a, PLAN.queries, PLAN.pair_columns, PLAN.pairs)
        write(pointer + PLAN.distance, stride, rows_left, b, PLAN.queries, PLAN.pair_columns, PLAN.pairs)


# The gradient of the stream


@triton.jit
def pairs_of(held, first, rows_left, PLAN: tl.constexpr):
    """Of each column its partner, and the cosines and signed sines with which R x = x * cosine + x[partner] * sine; 1 and 0 where nothing turns."""
    columns = tl.arange(0, PLAN.columns)
    in_a = columns < PLAN.pairs
    in_b = (columns >= PLAN.distance) & (columns < PLAN.distance + PLAN.pairs)
    partner = tl.where(in_a, columns + PLAN.distance, tl.where(in_b, columns - PLAN.distance, columns))
    angle = in_runs(tl.where(in_b, columns - PLAN.distance, columns), PLAN.run)[None, :]
    rows = tl.arange(0, PLAN.keys)[:, None]
    there = (in_a | in_b)[None, :] & (rows < rows_left)
    offset = first.to(tl.int64)
    stride = held.strides.cosine[1]
    cosine = tl.load(held.cosine + offset * stride + (rows * stride + angle), mask=there, other=1.0).to(tl.float32)
    stride = held.strides.sine[1]
    sine = tl.load(held.sine + offset * stride + (rows * stride + angle), mask=there, other=0.0).to(tl.float32)
    return in_runs(partner, PLAN.run), cosine, tl.where(in_a[None, :], -sine, sine)


@triton.jit
def key_tile(held, key, first, rows_left, PLAN: tl.constexpr):
    """R(s * k), [keys, columns], for the keys from ``first`` on; ``key`` is k."""
    result = key
    if PLAN.scales or PLAN.turns:
        columns = tl.arange(0, PLAN.columns)
        there = columns < PLAN.head_dim
        result = key.to(tl.float32)
        if PLAN.scales:
            result *= tl.load(held.key_scale + columns, mask=there, other=0.0).to(tl.float32)[None, :]
        if PLAN.turns:
            partner, cosine, sine = pairs_of(held, first, rows_left, PLAN)
            rows = tl.arange(0, PLAN.keys)[:, None]
            stride = held.strides.key[2]
            pointers = held.key + first.to(tl.int64) * stride + (rows * stride + partner[None, :])
            other = tl.load(pointers, mask=(rows < rows_left) & there[None, :], other=0.0).to(tl.float32)
            if PLAN.scales:
                other *= tl.load(held.key_scale + partner, mask=there, other=0.0).to(tl.float32)[None, :]
            result = result * cosine + other * sine
        result = result.to(held.key.dtype.element_ty)
    return result


@triton.jit
def queries_at(read, head, first, held, WHOLE: tl.constexpr, PLAN: tl.constexpr):
    """Query, dO, level and delta of the queries of a head from ``first`` on; ``read`` has the pointers of a sequence and their strides."""
    rows_left = held.sizes.num_queries - first
    row = first.to(tl.int64)
    head = head.to(tl.int64)
    stride = read.strides.query
    pointer = read.query + head * stride[1] + row * stride[2]
    query = tile(pointer, stride[2], rows_left, PLAN.queries, PLAN.columns, PLAN.head_dim, WHOLE)
    stride = read.strides.gradient
    pointer = read.gradient + head * stride[1] + row * stride[2]
    do = tile(pointer, stride[2], rows_left, PLAN.queries, PLAN.columns, PLAN.head_dim, WHOLE)
    numbers = head * held.sizes.query_rows + row + tl.arange(0, PLAN.queries)
    return query, do, tl.load(read.level + numbers), tl.load(read.delta + numbers)


@triton.jit
def walk_queries(state, keys, places, given, span, scales, PLAN: tl.constexpr, MASKED: tl.constexpr):
    """Take the queries of a span, those of all heads, into dV and dK: one sum and the same, where a key is its value. ``given`` are keys and queries."""
    d_value, d_key = state
    held, read = given
    way = walk_over(span, MASKED, PLAN.masked_early, PLAN.masked_late)
    length = way[1]
    for step in range(0, length * held.sizes.group, PLAN.queries):
        first = place_at(step % length, way, PLAN.queries, MASKED, PLAN.masked_early, PLAN.masked_late)
        query, do, level, delta = queries_at(read, read.head + step // length, first, held, not MASKED, PLAN)
        logits = tl.dot(keys[0], tl.trans(query), zeros(PLAN.keys, PLAN.queries), input_precision="ieee")
        weights = tl.exp2(logits * scales[0] - level[None, :])
        if MASKED:
            place = held.sizes.num_keys - held.sizes.num_queries + first + tl.arange(0, PLAN.queries)
            documents = documents_at(held, place, PLAN)
            seen = visible((place[None, :], documents[None, :]), places, held, PLAN)
            weights = tl.where(seen, weights, 0.0)
        d_value = tl.dot(weights.to(held.key.dtype.element_ty), do, d_value, input_precision="ieee")
        d_weights = tl.dot(keys[1], tl.trans(do), zeros(PLAN.keys, PLAN.queries), input_precision="ieee")
        d_logits = weights * (d_weights * scales[1] - delta[None, :])
        d_logits = d_logits.to(held.key.dtype.element_ty)
        if PLAN.one_sum:
            d_value = tl.dot(d_logits, query, d_value, input_precision="ieee")
        else:
            d_key = tl.dot(d_logits, query, d_key, input_precision="ieee")
    return d_value, d_key


@triton.jit
def stream_gradient(tensors, strides, sizes, scales, PLAN: tl.constexpr):
    """dn [B, G, S, D], or dK and dV where they are two. ``scales`` are that of base 2, α, and 2^-e."""
    blocks = tl.cdiv(sizes.num_keys, PLAN.keys)
    program = tl.program_id(0)
    block = program % blocks
    kv_heads = sizes.heads // sizes.group
    kv_head = program // blocks % kv_heads
    batch = program // blocks // kv_heads
    first = block * PLAN.keys
    rows_left = sizes.num_keys - first
    held = keys_of(tensors, strides, sizes, batch, kv_head)
    offset = first.to(tl.int64)
    pointer = held.key + offset * strides.key[2]
    stream = tile(pointer, strides.key[2], rows_left, PLAN.keys, PLAN.columns, PLAN.head_dim, False)
    value = stream
    if not PLAN.shares:
        pointer = held.value + offset * strides.value[2]
        value = tile(pointer, strides.value[2], rows_left, PLAN.keys, PLAN.columns, PLAN.head_dim, False)
    keys = (key_tile(held, stream, first, rows_left, PLAN), value)
    place = (first + tl.arange(0, PLAN.keys))[:, None]
    places = (place, documents_at(held, place, PLAN))
    last = tl.minimum(first + PLAN.keys, sizes.num_keys) - 1
    span = query_range(first, last, tensors.ranges + (batch * blocks + block) * 2, sizes, PLAN)
    row = batch.to(tl.int64)
    numbers = row * sizes.heads * sizes.query_rows
    read = Queries(
        strides,
        kv_head * sizes.group,
        tensors.query + row * strides.query[0],
        tensors.gradient + row * strides.gradient[0],
        tensors.level + numbers,
        tensors.delta + numbers,
    )

    state = (zeros(PLAN.keys, PLAN.columns), zeros(PLAN.keys, PLAN.columns))
    if not PLAN.hides:
        state = walk_queries(state, keys, places, (held, read), span, scales, PLAN, False)
    if PLAN.masked_early or PLAN.masked_late:
        state = walk_queries(state, keys, places, (held, read), span, scales, PLAN, True)
    d_value = state[0] * scales[2]
    d_key = state[1] * scales[2]
    if not PLAN.one_sum:
        d_key = turned_back(d_key, stream, held, tensors, (first, rows_left, program), PLAN)
        if PLAN.shares:
            d_value += d_key
    DTYPE: tl.constexpr = tensors.d_key.dtype.element_ty
    pointer = tensors.d_value + row * strides.d_value[0] + kv_head.to(tl.int64) * strides.d_value[1]
    pointer += offset * strides.d_value[2]
    d_value = d_value.to(DTYPE)
    write(pointer, strides.d_value[2], rows_left, d_value, PLAN.keys, PLAN.columns, PLAN.head_dim)
    if not PLAN.shares:
        pointer = tensors.d_key + row * strides.d_key[0] + kv_head.to(tl.int64) * strides.d_key[1]
        pointer += offset * strides.d_key[2]
        d_key = d_key.to(DTYPE)
        write(pointer, strides.d_key[2], rows_left, d_key, PLAN.keys, PLAN.columns, PLAN.head_dim)


@triton.jit
def turned_back(d_key, stream, held, tensors, place, PLAN: tl.constexpr):
    """s * Rᵀ dK; what this tile adds to the gradient of s is written to its own row of ``d_scale``."""
    first, rows_left, program = place
    columns = tl.arange(0, PLAN.columns)
    rows = tl.arange(0, PLAN.keys)[:, None]
    if PLAN.turns:
        partner, cosine, sine = pairs_of(held, first, rows_left, PLAN)
        index = rows * 0 + partner[None, :]
        d_key = d_key * cosine - tl.gather(d_key, index, 1) * sine
    if PLAN.scales:
        there = columns < PLAN.head_dim
        # A row that is not there saw no query's logarithm as its own, and may hold anything.
        share = tl.where(rows < rows_left, stream.to(tl.float32) * d_key, 0.0)
        d_scale = tensors.d_scale + program.to(tl.int64) * PLAN.head_dim + columns
        tl.store(d_scale, tl.sum(share, 0), mask=there)
        d_key *= tl.load(held.key_scale + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    return d_key
