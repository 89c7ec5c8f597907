"""What the decode kernel reads: queries, tiles of keys, which of them a query may see, and how keys turn.

A tile is N keys, held as a tuple of pieces of some columns, each a block of its own: out of a block that is loaded no columns can be cut, and the halves of the
dimensions that turn must be told apart. Queries lie across, [columns, M]: keys are then the rows of both products, and the tensor cores read one tile, where it
lies in shared memory, for q · k and, by its transpose, for the sum of values.

Shapes: N keys of a tile, M rows: the queries of all heads and tokens that read one KV head. ``where`` is the batch row and the KV head.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """How many there are of what; the number of keys and that of the parts change while a text grows."""

    batch: object
    num_keys: object
    num_queries: object
    kv_heads: object
    group: object
    row_blocks: object
    splits: object


@triton.jit
def sizes_of(fixed, num_keys, splits):
    """All together. What is in a tuple a kernel is compiled for, as far as it is 1 or a multiple of 16, and so these two come by themselves."""
    return Sizes(fixed.batch, num_keys, fixed.num_queries, fixed.kv_heads, fixed.group, fixed.row_blocks, splits)


@triton.jit
def program(sizes, PLAN: tl.constexpr):
    """Which rows, KV head, part of the keys and batch row this program has. Programs that share a table of angles run at the same time."""
    number = tl.program_id(0)
    rows = number % sizes.row_blocks * PLAN.rows + tl.arange(0, PLAN.rows)
    number = number // sizes.row_blocks
    kv_head = number % sizes.kv_heads
    number = number // sizes.kv_heads
    return (number // sizes.splits, kv_head), rows, number % sizes.splits


@triton.jit
def places_of(rows, where, seen, sizes):
    """Where the query of each row stands [M], and the oldest and the newest of all queries; and how many keys there are."""
    length = sizes.num_keys
    if seen.lengths is not None:
        length = tl.load(seen.lengths.pointer + where[0] * seen.lengths.strides[0]).to(tl.int32)
    oldest, newest = length - sizes.num_queries, length - 1
    places = oldest + rows % sizes.num_queries
    if seen.query_places is not None:
        stride = seen.query_places.strides[0]
        places = tl.load(seen.query_places.pointer + rows % sizes.num_queries * stride).to(tl.int32)
        oldest, newest = tl.min(places, 0), tl.max(places, 0)
    return places, oldest, newest, tl.minimum(length, sizes.num_keys)


@triton.jit
def share(split, length, oldest, newest, seen, sizes, PLAN: tl.constexpr):
    """The keys [begin, end) that this program reads, of those that any query may see."""
    begin, end = length * 0, length
    if seen.key_places is None:
        if PLAN.causal:
            end = tl.minimum(end, newest + 1)
        if seen.window is not None:
            begin = tl.maximum(begin, oldest - seen.window + 1)
            end = tl.minimum(end, newest + seen.window)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), PLAN.keys)
    own = tl.cdiv(tiles, sizes.splits) * PLAN.keys
    begin = begin + split * own
    return begin, tl.minimum(end, begin + own)


@triton.jit
def keys_at(first, end, where, seen, oldest, newest, PLAN: tl.constexpr):
    """Slots of N keys from ``first`` on, where they stand, and whether any query may see them: those that none sees are not read."""
    slots = first + tl.arange(0, PLAN.keys)
    here = slots < end
    places = slots
    if seen.key_mask is not None:
        mask = seen.key_mask.pointer + where[0].to(tl.int64) * seen.key_mask.strides[0]
        here = here & (tl.load(mask + slots * seen.key_mask.strides[1], mask=here, other=0) != 0)
    if seen.key_places is not None:
        at = seen.key_places.pointer + slots * seen.key_places.strides[0]
        places = tl.load(at, mask=slots < end, other=-1).to(tl.int32)
        here = here & (places >= 0)
        if PLAN.causal:
            here = here & (places <= newest)
        if seen.window is not None:
            here = here & (places > oldest - seen.window) & (places < newest + seen.window)
    return slots, places, here


@triton.jit
def allowed(query_places, key_places, here, seen, PLAN: tl.constexpr):
    """True where a query may see a key, [N, M]."""
    behind = query_places[None, :] - key_places[:, None]
    may = here[:, None] & (behind == behind)
    if seen.lengths is not None:  # of a sequence with fewer keys than queries, the first queries stand nowhere
        may = may & (query_places >= 0)[None, :]
    if PLAN.causal:
        may = may & (behind >= 0)
    if seen.window is not None:
        may = may & (behind < seen.window) & (behind > -seen.window)
    return may


@triton.jit
def row_offsets(slots, here, stream, where, beside, PLAN: tl.constexpr):
    """Where the N keys of a KV head begin, as numbers of elements; ``stream`` has the strides of batch row or page, KV head, key, column."""
    head = where[1].to(tl.int64) * stream.strides[1]
    if PLAN.page:
        table = beside.pages.pointer + where[0].to(tl.int64) * beside.pages.strides[0]
        page = tl.load(table + slots // PLAN.page * beside.pages.strides[1], mask=here, other=0).to(tl.int64)
        offsets = head + page * stream.strides[0] + (slots % PLAN.page).to(tl.int64) * stream.strides[2]
    else:
        offsets = head + where[0].to(tl.int64) * stream.strides[0] + slots.to(tl.int64) * stream.strides[2]
    return offsets


@triton.jit
def key_offsets(slots, here, stream, where, beside, PLAN: tl.constexpr):
    """The same of keys or values."""
    return aligned(row_offsets(slots, here, stream, where, beside, PLAN), PLAN.key_multiple)


@triton.jit
def aligned(offsets, MULTIPLE: tl.constexpr):
    """Numbers that are whole multiples, written so that the compiler sees it too; of strides that are multiples of 16 it knows."""
    if MULTIPLE < 16:
        offsets = offsets // MULTIPLE * MULTIPLE
    return offsets


@triton.jit
def columns_at(stream, offsets, here, FIRST: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr):
    """Columns FIRST to FIRST + COLUMNS of rows, [rows, COLUMNS]; 0 from column LIMIT on, and where nothing is ``here``."""
    columns = FIRST + tl.arange(0, COLUMNS)
    inside = here[:, None]
    if FIRST + COLUMNS > LIMIT:
        inside = inside & (columns < LIMIT)[None, :]
    return tl.load(stream.pointer + offsets[:, None] + columns[None, :] * stream.strides[3], mask=inside, other=0.0)


@triton.jit
def read(slots, here, where, held, beside, PLAN: tl.constexpr):
    """The tile of N keys, and after it that of their values where these are not the keys: all pieces in a row."""
    PIECES: tl.constexpr = PLAN.pieces
    offsets = key_offsets(slots, here, held.key, where, beside, PLAN)
    tiles = ()
    for piece in tl.static_range(PIECES):
        found = columns_at(held.key, offsets, here, piece * PLAN.columns, PLAN.columns, PLAN.stream_dim)
        tiles = tiles + (found,)
    if held.value is not None:
        offsets = key_offsets(slots, here, held.value, where, beside, PLAN)
        tiles = tiles + (columns_at(held.value, offsets, here, 0, PLAN.value_columns, PLAN.value_dim),)
    return tiles


@triton.jit
def as_floats(codes, DTYPE: tl.constexpr):
    """All pieces in another dtype."""
    floats = ()
    for piece in tl.static_range(len(codes)):
        floats = floats + (codes[piece].to(DTYPE),)
    return floats


@triton.jit
def channel_scale(scales, where, FIRST: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr):
    """What each of some columns is multiplied by, in float32; 0 from column LIMIT on."""
    columns = FIRST + tl.arange(0, COLUMNS)
    at = scales.pointer + where[0].to(tl.int64) * scales.strides[0] + where[1].to(tl.int64) * scales.strides[1]
    return tl.load(at + columns * scales.strides[3], mask=columns < LIMIT, other=0.0).to(tl.float32)


@triton.jit
def token_scale(scales, slots, here, where, beside, PLAN: tl.constexpr):
    """What each of N keys is multiplied by, in float32."""
    return tl.load(scales.pointer + row_offsets(slots, here, scales, where, beside, PLAN), mask=here, other=0.0).to(
        tl.float32
    )


@triton.jit
def half_of(stream, offsets, here, HALF: tl.constexpr, PIECE: tl.constexpr, PLAN: tl.constexpr):
    """Of pairs of dimensions, those of a piece: the first (HALF 0) or the second of each, [rows, columns]."""
    first: tl.constexpr = HALF * PLAN.distance + PIECE * PLAN.turn_columns
    limit: tl.constexpr = PLAN.first_half_end if HALF == 0 else PLAN.second_half_end
    return columns_at(stream, offsets, here, first, PLAN.turn_columns, limit)


@triton.jit
def half_scale(scales, where, HALF: tl.constexpr, PIECE: tl.constexpr, PLAN: tl.constexpr):
    """The same of what columns are multiplied by."""
    first: tl.constexpr = HALF * PLAN.distance + PIECE * PLAN.turn_columns
    return channel_scale(scales, where, first, PLAN.turn_columns, PLAN.head_dim)


@triton.jit
def angles(table, slots, here, where, PIECE: tl.constexpr, OTHER: tl.constexpr, PLAN: tl.constexpr):
    """Cosines or sines at N keys, of a piece of the pairs, [N, columns] in float32; ``OTHER`` in columns that do not turn."""
    columns = PIECE * PLAN.turn_columns + tl.arange(0, PLAN.turn_columns)
    inside = here[:, None]
    if PIECE * PLAN.turn_columns + PLAN.turn_columns > PLAN.pairs:
        inside = inside & (columns < PLAN.pairs)[None, :]
    offsets = where[0].to(tl.int64) * table.strides[0] + slots.to(tl.int64) * table.strides[1]
    offsets = aligned(offsets, PLAN.table_multiple)[:, None] + columns[None, :] * table.strides[2]
    return tl.load(table.pointer + offsets, mask=inside, other=OTHER).to(tl.float32)


@triton.jit
def angles_of(table, slot, where, PIECE: tl.constexpr, OTHER: tl.constexpr, PLAN: tl.constexpr):
    """The same at one key, [columns]."""
    columns = PIECE * PLAN.turn_columns + tl.arange(0, PLAN.turn_columns)
    at = table.pointer + where[0].to(tl.int64) * table.strides[0] + slot * table.strides[1]
    return tl.load(at + columns * table.strides[2], mask=columns < PLAN.pairs, other=OTHER).to(tl.float32)


@triton.jit
def angles_of_steps(held, where, num_keys, DTYPE: tl.constexpr, PLAN: tl.constexpr):
    """Cosines, then sines, of 0 to N - 1 steps from a key, R(p) R(0)^-1 of the first rows p: [N, columns] for each piece of the pairs. They stay in registers."""
    TURN_PIECES: tl.constexpr = PLAN.turn_pieces
    rows = tl.arange(0, PLAN.keys)
    here = rows < num_keys
    cosines, sines = (), ()
    for piece in tl.static_range(TURN_PIECES):
        cosine = angles(held.cosine, rows, here, where, piece, 1.0, PLAN)
        sine = angles(held.sine, rows, here, where, piece, 0.0, PLAN)
        cosine_0 = angles_of(held.cosine, num_keys * 0, where, piece, 1.0, PLAN)[None, :]
        sine_0 = angles_of(held.sine, num_keys * 0, where, piece, 0.0, PLAN)[None, :]
        square = cosine_0 * cosine_0 + sine_0 * sine_0
        cosine_0, sine_0 = cosine_0 / square, sine_0 / square
        cosines = cosines + ((cosine * cosine_0 + sine * sine_0).to(DTYPE),)
        sines = sines + ((sine * cosine_0 - cosine * sine_0).to(DTYPE),)
    return cosines + sines


@triton.jit
def turned_pairs(a, b, cosine, sine, PLAN: tl.constexpr):
    """(a cos - b sin, b cos + a sin) in 16 bits, with two roundings: two numbers at a time, which takes a quarter of the instructions of float32."""
    if PLAN.is_compiled:
        if a.dtype == tl.bfloat16:
            first, second = tl.inline_asm_elementwise(
                """{
                .reg .b32 product, zero;
                mov.b32 zero, 0x80008000;
                fma.rn.bf16x2 product, $3, $5, zero;
                neg.bf16x2 product, product;
                fma.rn.bf16x2 $0, $2, $4, product;
                fma.rn.bf16x2 product, $2, $5, zero;
                fma.rn.bf16x2 $1, $3, $4, product;
                }""",
                "=&r,=&r,r,r,r,r",
                [a, b, cosine, sine],
                (tl.bfloat16, tl.bfloat16),
                True,
                2,
            )
        else:
            first, second = tl.inline_asm_elementwise(
                """{
                .reg .b32 product, zero;
                mov.b32 zero, 0x80008000;
                fma.rn.f16x2 product, $3, $5, zero;
                neg.f16x2 product, product;
                fma.rn.f16x2 $0, $2, $4, product;
                fma.rn.f16x2 product, $2, $5, zero;
                fma.rn.f16x2 $1, $3, $4, product;
                }""",
                "=&r,=&r,r,r,r,r",
                [a, b, cosine, sine],
                (tl.float16, tl.float16),
                True,
                2,
            )
    else:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        wide_cosine, wide_sine = cosine.to(tl.float32), sine.to(tl.float32)
        first = (wide_a * wide_cosine - (wide_b * wide_sine).to(a.dtype).to(tl.float32)).to(a.dtype)
        second = (wide_b * wide_cosine + (wide_a * wide_sine).to(a.dtype).to(tl.float32)).to(a.dtype)
    return first, second
