"""What the kernels of prefill and training share: how a tile is read, how keys turn, which pairs are visible, where a walk begins and ends.

A kernel is compiled for one Plan (see kernels/triton_prefill_plan.py) and has few parameters: tuples of pointers, strides and sizes with names. A row
of a tile is a position, a column is a dimension of the head. What is not there is read as 0 and never written. Offsets within a tile
have 32 bits, that of its first row has 64.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Keys(NamedTuple):
    """Where the keys of one sequence and KV head begin, how they lie, and what belongs to them."""

    strides: object
    sizes: object
    key: object
    value: object
    key_scale: object
    cosine: object
    sine: object
    key_mask: object
    segments: object


@triton.jit
def keys_of(tensors, strides, sizes, batch, kv_head):
    """The :class:`Keys` of a sequence and KV head."""
    row = batch.to(tl.int64)
    head = kv_head.to(tl.int64)
    return Keys(
        strides,
        sizes,
        tensors.key + row * strides.key[0] + head * strides.key[1],
        tensors.value + row * strides.value[0] + head * strides.value[1],
        tensors.key_scale,
        tensors.cosine + row * strides.cosine[0],
        tensors.sine + row * strides.sine[0],
        tensors.key_mask + row * strides.key_mask[0],
        tensors.segments + row * strides.segments[0],
    )


@triton.jit
def tile(
    pointer, stride, rows_left, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """[ROWS, COLUMNS] from where ``pointer`` stands, WIDTH columns of which are there; WHOLE: all rows, else the first ``rows_left``."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    pointers = pointer + rows * stride + columns
    if WHOLE and COLUMNS == WIDTH:
        result = tl.load(pointers)
    elif WHOLE:
        result = tl.load(pointers, mask=columns < WIDTH, other=0.0)
    elif COLUMNS == WIDTH:
        result = tl.load(pointers, mask=rows < rows_left, other=0.0)
    else:
        result = tl.load(pointers, mask=(rows < rows_left) & (columns < WIDTH), other=0.0)
    return result


@triton.jit
def write(pointer, stride, rows_left, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of :func:`tile`."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    tl.store(pointer + rows * stride + columns, values, mask=(rows < rows_left) & (columns < WIDTH))


@triton.jit
def in_runs(columns, RUN: tl.constexpr):
    """Columns that follow each other in runs of RUN, from multiples of RUN on, said so: a compiler reads such runs at once."""
    return tl.max_contiguous(tl.multiple_of(columns, RUN), RUN)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] in float32."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


# Keys that turn when they are read


@triton.jit
def turned(held, first, WHOLE: tl.constexpr, PLAN: tl.constexpr):
    """The turning columns of R(s * k) for the rows from ``first`` on: those of the first of each pair, and those of the second."""
    stride = held.strides.key[2]
    key = held.key + first.to(tl.int64) * stride
    rows_left = held.sizes.num_keys - first
    a = tile(key, stride, rows_left, PLAN.keys, PLAN.pair_columns, PLAN.pairs, WHOLE).to(tl.float32)
    b = tile(key + PLAN.distance, stride, rows_left, PLAN.keys, PLAN.pair_columns, PLAN.pairs, WHOLE).to(tl.float32)
    cosine = held.cosine + first.to(tl.int64) * held.strides.cosine[1]
    sine = held.sine + first.to(tl.int64) * held.strides.sine[1]
    c = tile(cosine, held.strides.cosine[1], rows_left, PLAN.keys, PLAN.pair_columns, PLAN.pairs, WHOLE).to(tl.float32)
    s = tile(sine, held.strides.sine[1], rows_left, PLAN.keys, PLAN.pair_columns, PLAN.pairs, WHOLE).to(tl.float32)
    if PLAN.scales:
        columns = tl.arange(0, PLAN.pair_columns)
        there = columns < PLAN.pairs
        a = a * tl.load(held.key_scale + columns, mask=there, other=0.0).to(tl.float32)[None, :]
        b = b * tl.load(held.key_scale + columns + PLAN.distance, mask=there, other=0.0).to(tl.float32)[None, :]
    DTYPE: tl.constexpr = held.key.dtype.element_ty
    return (a * c - b * s).to(DTYPE), (b * c + a * s).to(DTYPE)


@triton.jit
def query_parts(pointer, stride, rows_left, PLAN: tl.constexpr):
    """What meets the keys: the columns of a query that do not turn (all of them, where none do), and those of both halves of the pairs."""
    whole = tile(pointer, stride, rows_left, PLAN.queries, PLAN.columns, PLAN.head_dim, False)
    rest = whole
    a = whole
    b = whole
    if PLAN.turns:
        a = tile(pointer, stride, rows_left, PLAN.queries, PLAN.pair_columns, PLAN.pairs, False)
        b = tile(pointer + PLAN.distance, stride, rows_left, PLAN.queries, PLAN.pair_columns, PLAN.pairs, False)
    if PLAN.turns and not PLAN.turns_all:
        columns = tl.arange(0, PLAN.columns)
        in_b = (columns >= PLAN.distance) & (columns < PLAN.distance + PLAN.pairs)
        rest = tl.where(((columns < PLAN.pairs) | in_b)[None, :], 0.0, rest)
    return rest, a, b


@triton.jit
def keys_at(held, first, WHOLE: tl.constexpr, PLAN: tl.constexpr):
    """What queries meet, as :func:`query_parts` has it, and the values, of the keys from ``first`` on. One tile is loaded where it is both."""
    rows_left = held.sizes.num_keys - first
    stride = held.strides.value[2]
    pointer = held.value + first.to(tl.int64) * stride
    value = tile(pointer, stride, rows_left, PLAN.keys, PLAN.columns, PLAN.head_dim, WHOLE)
    rest = value
    if not PLAN.shares and not PLAN.turns_all:
        stride = held.strides.key[2]
        pointer = held.key + first.to(tl.int64) * stride
        rest = tile(pointer, stride, rows_left, PLAN.keys, PLAN.columns, PLAN.head_dim, WHOLE)
    if PLAN.scales and not PLAN.turns_all:
        columns = tl.arange(0, PLAN.columns)
        scale = tl.load(held.key_scale + columns, mask=columns < PLAN.head_dim, other=0.0).to(tl.float32)
        rest = (rest.to(tl.float32) * scale[None, :]).to(pointer.dtype.element_ty)
    a = rest
    b = rest
    if PLAN.turns:
        a, b = turned(held, first, WHOLE, PLAN)
    return rest, a, b, value


@triton.jit
def logits_of(query, key, PLAN: tl.constexpr):
    """q R(s * k), [queries, keys], not yet scaled."""
    logits = zeros(PLAN.queries, PLAN.keys)
    if PLAN.turns:
        logits = tl.dot(query[1], tl.trans(key[1]), logits, input_precision="ieee")
        logits = tl.dot(query[2], tl.trans(key[2]), logits, input_precision="ieee")
    if not PLAN.turns_all:
        logits = tl.dot(query[0], tl.trans(key[0]), logits, input_precision="ieee")
    return logits


# Which pairs are visible


@triton.jit
def documents_at(held, places, PLAN: tl.constexpr):
    """The numbers of the documents at ``places``; the places themselves where nothing is packed."""
    if PLAN.segments:
        result = tl.load(held.segments + places * held.strides.segments[1], mask=places < held.sizes.num_keys, other=0)
    else:
        result = places
    return result


@triton.jit
def visible(queries, keys, held, PLAN: tl.constexpr):
    """True where a query may see a key; ``queries`` and ``keys`` are places and documents, that broadcast to the tile."""
    behind = queries[0] - keys[0]
    seen = (keys[0] < held.sizes.num_keys) & (queries[0] >= 0)
    if PLAN.causal:
        seen = seen & (behind >= 0)
    if PLAN.window:
        seen = seen & (behind < held.sizes.window_tokens)
        if not PLAN.causal:
            seen = seen & (behind > -held.sizes.window_tokens)
    if PLAN.key_mask:
        there = keys[0] < held.sizes.num_keys
        seen = seen & (tl.load(held.key_mask + keys[0] * held.strides.key_mask[1], mask=there, other=0) != 0)
    if PLAN.segments:
        seen = seen & (queries[1] == keys[1])
    return seen


@triton.jit
def key_range(first, last, ranges, sizes, PLAN: tl.constexpr):
    """Of the queries at places ``first`` to ``last``, inclusive: the keys that any of them sees, and those that all see; see :func:`span_of`."""
    begin = 0
    end = sizes.num_keys
    whole = 0
    broken = sizes.num_keys
    if PLAN.causal:
        end = tl.minimum(end, last + 1)
        broken = tl.minimum(broken, first + 1)
    if PLAN.window:
        begin = tl.maximum(begin, first - sizes.window_tokens + 1)
        whole = tl.maximum(whole, last - sizes.window_tokens + 1)
        if not PLAN.causal:
            end = tl.minimum(end, last + sizes.window_tokens)
            broken = tl.minimum(broken, first + sizes.window_tokens)
    if PLAN.segments:
        begin = tl.maximum(begin, tl.load(ranges))
        end = tl.minimum(end, tl.load(ranges + 1))
    return span_of(begin, end, whole, broken, PLAN.keys, PLAN.hides)


@triton.jit
def query_range(first, last, ranges, sizes, PLAN: tl.constexpr):
    """The same for keys at places ``first`` to ``last``, inclusive: the queries that see any of them, and those that see all, counted from the first query."""
    before = sizes.num_keys - sizes.num_queries
    begin = 0
    end = sizes.num_queries
    whole = 0
    broken = sizes.num_queries
    if PLAN.causal:
        begin = tl.maximum(begin, first - before)
        whole = tl.maximum(whole, last - before)
    if PLAN.window:
        end = tl.minimum(end, last - before + sizes.window_tokens)
        broken = tl.minimum(broken, first - before + sizes.window_tokens)
        if not PLAN.causal:
            begin = tl.maximum(begin, first - before - sizes.window_tokens + 1)
            whole = tl.maximum(whole, last - before - sizes.window_tokens + 1)
    if PLAN.segments:
        begin = tl.maximum(begin, tl.load(ranges))
        end = tl.minimum(end, tl.load(ranges + 1))
    return span_of(begin, end, whole, broken, PLAN.queries, PLAN.hides)


class Span(NamedTuple):
    """Places to walk over: those of ``begin`` to ``whole`` and of ``broken`` to ``end`` with a mask, those of ``whole`` to ``broken`` without."""

    begin: object
    whole: object
    broken: object
    end: object


@triton.jit
def span_of(begin, end, whole, broken, BLOCK: tl.constexpr, HIDES: tl.constexpr):
    """Places [begin, end), and among them those [whole, broken) that need no mask, none where anything may be hidden: whole tiles, to the end of the last."""
    begin = begin // BLOCK * BLOCK
    end = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK) * BLOCK
    if HIDES:
        whole = begin
        broken = begin
    else:
        whole = tl.minimum(tl.maximum(tl.cdiv(whole, BLOCK) * BLOCK, begin), end)
        broken = tl.maximum(broken // BLOCK * BLOCK, whole)
    return Span(begin, whole, broken, end)


@triton.jit
def walk_over(span, MASKED: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr):
    """Where a walk begins, how far it goes, and what it leaves out on the way: after how many places, and how many.

    EARLY and LATE: whether there can be masked tiles before and after those without a mask. Both are one walk: of three loops, ptxas would carry out
    products one after another, and not as they come.
    """
    first = span.broken
    length = span.end - span.broken
    turn = 0
    jump = 0
    if not MASKED:
        first = span.whole
        length = span.broken - span.whole
    elif EARLY:
        first = span.begin
        length = span.whole - span.begin
        if LATE:
            turn = length
            jump = span.broken - span.whole
            length += span.end - span.broken
    return first, length, turn, jump


@triton.jit
def place_at(step, way, BLOCK: tl.constexpr, MASKED: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr):
    """Where a tile of a walk begins, ``step`` places from the walk's beginning."""
    place = way[0] + step
    if MASKED and EARLY and LATE:
        place += tl.where(step < way[2], 0, way[3])
    return tl.multiple_of(place, BLOCK)
