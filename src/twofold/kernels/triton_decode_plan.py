"""What the decode kernel is compiled for: what a call computes, the sizes of its tiles, and into how many parts the keys are shared out.

A :class:`Plan` is the whole key of a compiled kernel, and depends on shapes and kinds alone, never on what a tensor holds: a call that was captured in a CUDA graph
serves every later length. Nothing here needs torch or Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

SHARED_BYTES = 227 * 1024
"""What a program may take of the shared memory of a multiprocessor of an H100 or H200; it has 1 KiB more, and so much more does each program take."""
MAX_PARTS = 256
NUMBERS_AT_A_TIME = 8192
"""Of what parts leave, the second kernel reads so many at a time: 32 for each of its 256 threads."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call computes, as far as a kernel is compiled for it. Sizes in numbers of elements; ``bits`` of a key's element.

    Rows of keys and values begin at whole multiples of ``key_multiple`` elements, those of angles of ``table_multiple``: what is known to be aligned is read
    16 bytes at a time.
    """

    head_dim: int
    value_dim: int
    rows: int
    bits: int
    shares: bool
    causal: bool
    pairs: int = 0
    distance: int = 0
    table_bits: int = 0
    is_steady: bool = False
    extension_dim: int = 0
    page: int = 0
    key_multiple: int = 16
    table_multiple: int = 16
    is_compiled: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled kernel: the call's fields, and its tiles.

    A tile is ``keys`` × ``pieces`` · ``columns``; ``rows`` of queries per program; ``turn_pieces`` of ``turn_columns`` pairs each turn, whose halves are read up to the columns
    ``first_half_end`` and ``second_half_end``, taken from pieces of the tile that lie ``partner`` pieces apart, or read ``again`` where the tile cannot be cut so; ``carries``: an iteration hands its tile to the next, see the kernel; ``is_whole``: the
    keys are not shared out. ``parts_at_a_time`` are added up; ``warps`` and ``stages`` are Triton's.
    """

    head_dim: int
    value_dim: int
    causal: bool
    pairs: int
    distance: int
    extension_dim: int
    page: int
    key_multiple: int
    table_multiple: int
    is_compiled: bool
    keys: int
    rows: int
    columns: int
    pieces: int
    value_columns: int
    value_pieces: int
    first_value: int
    turn_columns: int
    turn_pieces: int
    first_half_end: int
    second_half_end: int
    partner: int
    extension_columns: int
    again: bool
    is_steady: bool
    carries: bool
    is_whole: bool
    parts_at_a_time: int
    warps: int
    stages: int

    @property
    def stream_dim(self) -> int:
        """Columns of a key as it is held."""
        return self.head_dim


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds ``size``; products take 16 at least.

    >>> padded(80), padded(3), padded(512)
    (128, 16, 512)
    """
    return max(least, 1 << (size - 1).bit_length())


@lru_cache(maxsize=1024)
def plan_of(
    call: Call, units: int, num_keys: int, multiprocessors: int, shared_bytes: int = SHARED_BYTES
) -> tuple[Plan, int]:
    """The plan of a call with ``units`` pairs of a sequence and a KV head, over at most ``num_keys`` keys, and into how many parts these are shared out."""
    rows = rows_of(call, shared_bytes)
    columns, turn_columns, again = _pieces(call)
    tiles = tiles_of(call, rows, shared_bytes)
    turn_pieces = -(-call.pairs // turn_columns) if call.pairs else 0
    pieces = padded(call.head_dim) // columns
    half_end = call.pairs if again else turn_pieces * turn_columns
    parts = parts_of(units * -(-call.rows // rows), -(-num_keys // tiles.keys), multiprocessors * tiles.programs)
    plan = Plan(
        head_dim=call.head_dim,
        value_dim=call.value_dim,
        causal=call.causal,
        pairs=call.pairs,
        distance=call.distance,
        extension_dim=call.extension_dim,
        page=call.page,
        key_multiple=call.key_multiple,
        table_multiple=call.table_multiple,
        is_compiled=call.is_compiled,
        keys=tiles.keys,
        rows=rows,
        columns=columns,
        pieces=pieces,
        value_columns=columns if call.shares else padded(call.value_dim),
        value_pieces=pieces if call.shares else 1,
        first_value=0 if call.shares else pieces,
        turn_columns=turn_columns,
        turn_pieces=turn_pieces,
        first_half_end=half_end,
        second_half_end=min(call.distance + half_end, call.head_dim),
        partner=call.distance // columns if turn_pieces and not again else 0,
        extension_columns=padded(call.extension_dim) if call.extension_dim else 0,
        again=again,
        is_steady=_is_steady(call, rows),
        carries=call.bits == 8,
        is_whole=parts == 1,
        parts_at_a_time=NUMBERS_AT_A_TIME // padded(call.value_dim),
        warps=tiles.warps,
        stages=tiles.stages,
    )
    return plan, parts


def rows_of(call: Call, shared_bytes: int = SHARED_BYTES) -> int:
    """How many rows of queries a program takes; what is more is several programs', which read the same keys.

    There are fewer where these are wide and turn in many dimensions, and where shared memory is small: there queries and the sums of their values would fill it.
    """
    most = 64
    if call.head_dim > 256 and (call.pairs > 64 or shared_bytes < SHARED_BYTES):
        most = 32
    if call.head_dim > 128 and shared_bytes < SHARED_BYTES // 2:
        most = 16
    return min(padded(call.rows), most)


def _is_steady(call: Call, rows: int) -> bool:
    """Whether the angles of a tile stay in registers; with many rows these are for sums, and angles are read with the keys."""
    return call.is_steady and rows == 16


def _pieces(call: Call) -> tuple[int, int, bool]:
    """Columns of a piece of the tile, pairs that turn at a time, and whether these are read again.

    Where the halves of the pairs lie a whole number of pieces apart, each piece is a half of some pairs, and nothing is read twice.
    """
    columns = padded(call.head_dim)
    if not call.pairs:
        return columns, 0, False
    half = min(64, columns // 2)
    fits = call.bits == 16 or columns <= 128  # a tile that waits in registers leaves no room to hold it in pieces
    if fits and half >= 16 and call.distance % half == 0:
        return half, half, False
    return columns, min(64, padded(call.pairs)), True


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Keys of a tile, Triton's warps and stages, and how many programs a multiprocessor holds at a time."""

    keys: int
    warps: int
    stages: int
    programs: int


def tiles_of(call: Call, rows: int, shared_bytes: int = SHARED_BYTES) -> Tiles:
    """The sizes for a call, by what a multiprocessor has: registers for the sums, shared memory for the tiles that are on their way.

    Memory answers after about a microsecond, in which it could bring 24 KiB to each multiprocessor of an H100 and 36 to one of an H200: that much and more must be on
    its way at any time. Products of 64 keys and more are made by whole groups of warps from shared memory; those of 32 are not, and are for tiles so wide
    that fewer than three of them would fit. Registers and shared memory of each compiled kernel are looked at by ``tests/test_triton_decode.py``.
    """
    width = max(padded(call.head_dim), padded(call.value_dim), 64)
    if call.bits == 8:
        return _tiles_in_registers(call, rows, shared_bytes)
    warps = 8 if width * rows >= 512 * 32 else 4
    programs = min(
        {64: 4, 128: 3, 256: 2, 512: 1}[width],
        {16: 4, 32: 2, 64: 8 // warps}[rows],
        2 if call.pairs and width <= 128 else 4,
    )
    keys = 128 if width == 64 and call.shares and rows == 16 else 64
    while True:
        tile, kept = _bytes(call, rows, keys)
        stages = min(4, ((shared_bytes + 1024) // programs - 1024 - kept) // tile)
        if stages >= (3 if keys > 32 else 2) or keys == 16:
            return Tiles(keys=keys, warps=warps, stages=max(1, stages), programs=programs)
        if programs > 1:
            programs -= 1
        else:
            keys //= 2


def _tiles_in_registers(call: Call, rows: int, shared_bytes: int) -> Tiles:
    """The same for 8-bit numbers: while a tile is multiplied, in 16 bits, the next one waits in registers as it came."""
    width = max(padded(call.head_dim), padded(call.value_dim), 64)
    keys, warps, programs = 64, 4, 2
    if width == 512:
        keys, warps, programs = (32, 4, 2) if rows == 16 else (32, 8, 1)
    elif rows == 64:
        warps, programs = 8, 1
    elif rows == 16:
        keys, programs = 128 if width == 64 else 64, 3 if width <= 128 and not call.pairs else 2
    tile, kept = _bytes(call, rows, keys)
    while tile + kept > shared_bytes and keys > 16:
        keys //= 2
        tile, kept = _bytes(call, rows, keys)
    programs = max(1, min(programs, (shared_bytes + 1024) // (tile + kept + 1024)))
    return Tiles(keys=keys, warps=warps, stages=2, programs=programs)


def _bytes(call: Call, rows: int, keys: int) -> tuple[int, int]:
    """Shared memory for a tile that is on its way, in 16 bits, and for what stays: queries, weights, and room to bring sums into order."""
    _, turn_columns, again = _pieces(call)
    extension = padded(call.extension_dim) if call.extension_dim else 0
    turning = 2 * (-(-call.pairs // turn_columns) * turn_columns) if call.pairs else 0
    numbers = padded(call.head_dim) + (0 if call.shares else padded(call.value_dim)) + extension
    numbers += turning * again + (0 if _is_steady(call, rows) else turning * call.table_bits // 16)
    query = padded(call.head_dim) + turning + extension
    return 2 * keys * numbers, 2 * rows * (query + keys) + 4096


def parts_of(units: int, tiles: int, programs: int) -> int:
    """Into how many parts the keys of each unit are shared out, where ``programs`` run at a time.

    The time is that of the programs that run one after another in a place, each of as many tiles as a part has, and of one more to fill the pipeline and to leave
    the sums. Of equal times the fewest parts are taken: they are added up afterwards.
    """

    def time(parts: int) -> int:
        return -(-units * parts // programs) * (-(-tiles // parts) + 1)

    return min(range(1, max(1, min(tiles, MAX_PARTS)) + 1), key=time)
