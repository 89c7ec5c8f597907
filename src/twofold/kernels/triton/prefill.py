"""Attention of many queries over one stream that is key and value at once: the forward pass, in tiles that never leave the chip.

A program has a tile of queries and walks over the keys that any of them sees. It holds, of each query, the highest logit so far, the sum of
exponentials relative to it, and the sum of values weighted so; where a higher logit comes, both sums are scaled down. A tile of keys is loaded
once and used in both products. The logarithm of each query's sum, base 2, is all that the backward pass needs besides the output.

Source: FlashAttention-2 (2307.08691), algorithm 1; that keys turn while they are read, and that one tile is key and value, is ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twofold.kernels.triton.prefill_tiles import (
    documents_at,
    key_range,
    keys_at,
    keys_of,
    logits_of,
    place_at,
    query_parts,
    visible,
    walk_over,
    write,
    zeros,
)


@triton.jit
def query_block(sizes, PLAN: tl.constexpr):
    """Which tile of queries this program has: block, query head, sequence. Where later queries see more, the last block is first."""
    blocks = tl.cdiv(sizes.num_queries, PLAN.queries)
    program = tl.program_id(0)
    block = program % blocks
    if PLAN.causal:
        block = blocks - 1 - block
    rest = program // blocks
    return block, rest % sizes.heads, rest // sizes.heads


@triton.jit
def walk(state, query, places, held, span, scale, PLAN: tl.constexpr, MASKED: tl.constexpr):
    """Take the keys of a span into the state: sums of weighted values, highest logits and sums of exponentials."""
    total, peak, norm = state
    way = walk_over(span, MASKED, PLAN.window, True)
    for step in range(0, way[1], PLAN.keys):
        first = place_at(step, way, PLAN.keys, MASKED, PLAN.window, True)
        rest, a, b, value = keys_at(held, first, not MASKED, PLAN)
        logits = logits_of(query, (rest, a, b), PLAN)
        if MASKED:
            key_places = first + tl.arange(0, PLAN.keys)[None, :]
            documents = documents_at(held, key_places, PLAN)
            seen = visible(places, (key_places, documents), held, PLAN)
            logits = tl.where(seen, logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 1) * scale)
        # A query that has seen no key yet: nothing minus nothing would be no number.
        level = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits * scale - level[:, None])
        shrink = tl.exp2(peak - level)
        norm = norm * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(held.value.dtype.element_ty), value, total, input_precision="ieee")
        peak = highest
    return total, peak, norm


@triton.jit
def forward(tensors, strides, sizes, scale, PLAN: tl.constexpr):
    """Outputs [B, H, T, D] and log2 of the sums of exponentials [B, H, T]; +inf for a query that sees no key. ``scale`` is that of base 2."""
    block, head, batch = query_block(sizes, PLAN)
    first = block * PLAN.queries
    rows_left = sizes.num_queries - first
    before = sizes.num_keys - sizes.num_queries
    row = batch.to(tl.int64)
    pointer = tensors.query + row * strides.query[0] + head.to(tl.int64) * strides.query[1]
    pointer += first.to(tl.int64) * strides.query[2]
    query = query_parts(pointer, strides.query[2], rows_left, PLAN)
    held = keys_of(tensors, strides, sizes, batch, head // sizes.group)
    rows = tl.arange(0, PLAN.queries)
    place = (before + first + rows)[:, None]
    places = (place, documents_at(held, place, PLAN))
    last = tl.minimum(before + first + PLAN.queries, sizes.num_keys) - 1
    ranges = tensors.ranges + (batch * tl.cdiv(sizes.num_queries, PLAN.queries) + block) * 2
    span = key_range(before + first, last, ranges, sizes, PLAN)

    state = (
        zeros(PLAN.queries, PLAN.columns),
        rows * 0.0 - float("inf"),
        rows * 0.0,
    )
    if not PLAN.hides:
        state = walk(state, query, places, held, span, scale, PLAN, False)
    state = walk(state, query, places, held, span, scale, PLAN, True)
    total, peak, norm = state

    sees_none = norm == 0.0
    total = total / tl.where(sees_none, 1.0, norm)[:, None]
    logarithm = tl.where(sees_none, float("inf"), peak + tl.log2(tl.where(sees_none, 1.0, norm)))
    output = tensors.output + row * strides.output[0] + head.to(tl.int64) * strides.output[1]
    output += first.to(tl.int64) * strides.output[2]
    total = total.to(tensors.output.dtype.element_ty)
    write(output, strides.output[2], rows_left, total, PLAN.queries, PLAN.columns, PLAN.head_dim)
    logarithms = tensors.logarithm + (row * sizes.heads + head) * sizes.num_queries + first
    tl.store(logarithms + rows, logarithm, mask=rows < rows_left)


@triton.jit
def ranges_of_documents(segments, ranges, strides, sizes, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Of each block of ``sizes.own`` places, the range of the ``sizes.other`` places whose documents lie between the block's lowest and highest.

    ``segments`` and ``strides`` are (own, other); other documents are never between where a row's documents are in order. [B, blocks, 2], int32.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(sizes[0], BLOCK)
    block = program % blocks
    batch = program // blocks
    places = block * BLOCK + tl.arange(0, BLOCK)
    row = batch.to(tl.int64)
    there = places < sizes[0]
    own = tl.load(segments[0] + row * strides[0] + places * strides[1], mask=there, other=0)
    anything = tl.load(segments[0] + row * strides[0] + block * BLOCK * strides[1])
    lowest = tl.min(tl.where(there, own, anything), 0)
    highest = tl.max(tl.where(there, own, anything), 0)
    begin = tl.full((CHUNK,), 2147483647, tl.int32)
    end = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, sizes[1], CHUNK):
        others = start + tl.arange(0, CHUNK)
        inside = others < sizes[1]
        documents = tl.load(segments[1] + row * strides[0] + others * strides[1], mask=inside, other=0)
        inside = inside & (documents >= lowest) & (documents <= highest)
        begin = tl.minimum(begin, tl.where(inside, others, 2147483647))
        end = tl.maximum(end, tl.where(inside, others + 1, 0))
    out = ranges + program * 2
    tl.store(out, tl.minimum(tl.min(begin, 0), sizes[1]))
    tl.store(out + 1, tl.max(end, 0))
