"""What native code and Python agree on: C signatures, the columns of tables, sizes of buffers."""

#: the kernels and their C types; addresses are int64
SIGNATURES = {
    # ranges (address and bytes of each), their number, advice, madvise (its address): advises the
    # system -> how many ranges it took before it refused one
    "advise": "int64(int64, int64, int64, int64)",
    # segments (SEGMENT_COLUMNS, then one mask address for each store), their number, stores, pairs
    # (rows x upper triangle), votes (rows x (stores + 1); [0] is left alone), scratch (2 x stores)
    "agree": "void(int64, int64, int64, int64, int64, int64)",
    # base, tuned, mask, out, elements, counts (two int64, added to): takes tuned elements where the
    # mask has ones -> how many those are, and how many of them differ from the base
    "blend": "void(int64, int64, int64, int64, int64, int64)",
    # segments as for drive, their number (one or more), out (BOUNDS int64): the least and the most
    # of rows and of slots, the least of positions and sizes, and the most that one ends at
    "bounds": "void(int64, int64, int64)",
    # base, elements, masks (addresses), stores, cells ((stores + 1) x WAYS x bins), scratch
    # (CELLS_SCRATCH bytes)
    "cells": "void(int64, int64, int64, int64, int64, int64)",
    # old, new, bytes, out: blocks (a bit for each 64 bytes, whole words), which bytes of each that
    # has one differ (uint64; room for all of them, whole words of blocks), old and new bytes there
    # (LANES more may be written), how many blocks and bytes differ (two int64)
    "changes": f"void({', '.join(['int64'] * 8)})",
    # segments (as for agree), their number, stores, threshold, counts (one a row)
    "combine": "void(int64, int64, int64, int64, int64)",
    # base, tuned, words, parameter, mask -> changed
    "compare": "int64(int64, int64, int64, uint64, int64)",
    # frames (DECODE_COLUMNS each), their number, bytes that each must give, ZSTD_decompressDCtx,
    # its state -> position of the first frame that is wrong, or their number
    "decode": "int64(int64, int64, int64, int64, int64)",
    # runs (COPY_COLUMNS each), their number, memmove (its address)
    "copy": "void(int64, int64, int64)",
    # stream (key, high half of the counter), first mask word, elements, limit, mask, scratch
    # (DRAW_SCRATCH bytes): sets the bits of the elements whose keys are at most the limit -> their
    # number
    "draw": "int64(uint64, uint64, int64, int64, uint64, int64, int64)",
    # segments (where an address is negative it is that of a recipe, and the side is made block by
    # block), their number, slots, columns of a slot, rules (the first must be exact), masks (one
    # address a rule), counts (row-major rows x rules), hashes (rows x 4 uint64, or 0), XXH3 (its
    # address), statistics (rows x COLUMNS, or 0), scratch (SCRATCH_BYTES, zeroed)
    "drive": f"void({', '.join(['int64'] * 11)})",
    # data (PIECE bytes), table (uint32, one for each byte, or pair of bytes, the first byte the low
    # one), out (OUTPUT bytes), ROOM: Huffman-codes a piece
    "encode": "void(int64, int64, int64, int64)",
    # bits, their number, flip (XORed to each word), low bits of a gap, out: a byte or more for each
    # gap, out: low bits (7 more bytes may be written), result: bytes of both (two int64), scratch
    # (GAPS_SCRATCH bytes)
    "gaps": "void(int64, int64, uint64, int64, int64, int64, int64, int64)",
    # jobs (JOB_COLUMNS each), their number: takes the chosen elements of two arrays
    "gather": "void(int64, int64)",
    # as of a signal handler: number, siginfo, context
    "guard": "void(int32, int64, int64)",
    # data, bytes, first unit, bytes of a unit, sums (low, high) to add to, XXH3 (its address)
    "hash": "void(int64, int64, int64, int64, int64, int64)",
    # left (rows x rank), right (rank x columns), added (or 0), out, rows, columns (a multiple of
    # LANES), rank, bits of the scale; all F32: out = added + scale * (left @ right)
    "lowrank": f"void({', '.join(['int64'] * 8)})",
    # a recipe (RECIPE_FIELDS int64, moved on), out (F32), elements: values of F4 in rows of pairs,
    # which are two rows of values, the low halves first; 32 rows of values have a row of scales
    # (F32, powers of two); LANES more pairs and scales are read
    "halves": "void(int64, int64, int64)",
    # mask, elements, first column, columns of a row, row counts (from the first row), column counts
    "margins": "void(int64, int64, int64, int64, int64, int64)",
    # segments (MARCH_HEAD, then MARCH_SIDE for each side, then MARCH_PAIR for each pair), their
    # number, columns of one, slots as for drive, columns of a slot, sides, rules, masks (an address
    # for each side but the first and each rule), counts against the first (rows x steps x rules),
    # of neighbours (rows x (steps - 1)), hashes (rows x sides x 2 uint64, or 0), XXH3 (its
    # address), scratch (SCRATCH_BYTES, zeroed, MARCH_STEP bits, and SWEEP_FIELDS int64), for each
    # segment the address of a sweep, or 0 where its sides are compared pair by pair
    "march": f"void({', '.join(['int64'] * 14)})",
    # base, out, words, classes, state (DELTA_HEAD, then DELTA_COLUMNS for each class), extra bits
    # there are, scratch (LANES bytes) -> 0, or 1 where the streams do not fit the base
    "merge": "int64(int64, int64, int64, int64, int64, int64, int64)",
    # segments as for march, their number, columns of one, masks (an address for each step), steps,
    # out: numbers of steps (or 0), counts (rows x (steps + 1))
    "moves": "void(int64, int64, int64, int64, int64, int64, int64)",
    # source, out, elements, scratch (CAST_SCRATCH, zeroed): rounds floats to another dtype -> how
    # many are not what they were
    "narrow": "int64(int64, int64, int64, int64)",
    # stream and elements as for draw, two limits, out (1 + room uint64), room, scratch: out[0] is
    # the number of keys at most the first limit, then come those above it that are at most the
    # second, as far as there is room -> how many those are
    "near": "int64(uint64, uint64, int64, int64, uint64, uint64, int64, int64, int64)",
    # symbols (64 bytes after them are cleared), their number, out: pairs, out: rest (64 more may be
    # written) -> size of the rest
    "pair": "int64(int64, int64, int64, int64)",
    # table (PANEL_COLUMNS each), their number, drive (its address), scratch (BOX_SCRATCH), then as
    # for drive, but for the number of segments: copies a box, has segments compared, and so on
    "panels": f"void({', '.join(['int64'] * 14)})",
    # jobs (PATHS_COLUMNS each), their number, scratch (PATHS_SCRATCH, zeroed): adds up how
    # far elements went, and how many went onward or back
    "paths": "void(int64, int64, int64)",
    # mask, walk (PROFILE_FIELDS int64), row counts (int64), column counts (uint16, room for whole
    # strips), bands (PROFILE_BAND for each strip: vectors of bits of the two kinds of block rows
    # that are not whole yet, and the binary digits of what is not in the column counts yet), totals
    # (PROFILE_TOTALS int64): adds rows of a matrix's mask, or where there are none the digits to
    # the column counts; reads PROFILE_MARGIN bytes more
    "profile": "void(int64, int64, int64, int64, int64, int64)",
    # data, bytes (LANES more are read), blocks and masks as changes finds them, how many masks,
    # bytes that are to be there, bytes that may be there (LANES more of both are read), how many,
    # how far after the start of a page the data begin, out: a byte for each page, set where
    # something was put, scratch (PUT_SCRATCH) -> 0, 1 where neither was there, or -1 where blocks,
    # masks and bytes do not fit each other
    "put": f"int64({', '.join(['int64'] * 11)})",
    # base, tuned, words, classes, state as for merge, scratch (LANES bytes)
    "split": "void(int64, int64, int64, int64, int64, int64)",
    # as for halves: multiplies elements by the scales of their blocks
    "scale": "void(int64, int64, int64)",
    # base, tuned, bytes, bytes of a block, out: literals (RUNS_MARGIN more may be written), out:
    # sequences (SEQUENCE_BYTES each), out: RUNS_COLUMNS for each block, int64: the exclusive or as
    # sequences of zstd
    "runs": f"void({', '.join(['int64'] * 7)})",
    # jobs as for gather, their number: puts elements back to their places in the first array
    "scatter": "void(int64, int64)",
    # segments of first rows, steps (STEP_COLUMNS each), their number, out: a segment for each row
    "spread": "void(int64, int64, int64, int64)",
    # base, tuned, words, row
    "statistics": "void(int64, int64, int64, int64)",
    # source, out, box (BOX_HEAD, then BOX_DIMENSION for each outer dimension), scratch
    # (BOX_SCRATCH): copies elements from one order to another
    "strided": "void(int64, int64, int64, int64)",
    # the fields of a sweep (SWEEP_FIELDS int64)
    "sweep": "void(int64)",
    # data, words, out: population count and number of zero bytes, two int64
    "survey": "void(int64, int64, int64)",
    # base, tuned, words, every how many of them one is looked at, shift, out: for each magnitude
    # shifted to the right the number of elements and of changed ones, two int64
    "tally": "void(int64, int64, int64, int64, int64, int64)",
    # pairs, number of symbols, rest, its size, out -> how much of the rest was used, or -1 where
    # there is too little
    "unpair": "int64(int64, int64, int64, int64, int64)",
    # base, tuned (addresses of elements of 32 bits or, of a kind, of fewer, or of recipes, moved on
    # but for what is left; of a kind with two dtypes either side may be the narrower one), units,
    # the first one, mask, sums (low and high of the base, then of the tuned side) to add to:
    # compares by bits and hashes -> how many are changed
    "units": "int64(int64, int64, int64, int64, int64, int64)",
    # gap bytes, their number, low bits, how many there are, low bits of a gap, flip, bits to make,
    # out -> number of gaps, or -1 where they are not what "gaps" writes
    "ungaps": "int64(int64, int64, int64, int64, int64, uint64, int64, int64)",
    # as for halves, out of any dtype: makes floats of one that holds those there are; where scales
    # would be is scratch (CAST_SCRATCH)
    "widen": "void(int64, int64, int64)",
}

# the driver

LANES = 64  #: elements of one mask word
BLOCK = 1 << 16  #: elements; blocks lie at multiples of it in the address space

#: columns of a segment, int64: what the driver walks
SEG_BASE, SEG_TUNED, SEG_ELEMENTS, SEG_POSITION, SEG_SLOT, SEG_UNIT, SEG_ROW = range(7)
SEG_COLUMNS = 7
BOUNDS = 6  #: numbers that say what segments reach from and to
#: columns of what leads from one row to the next, int64: rows; bytes on either side, and elements
STEP_ROWS, STEP_BASE, STEP_TUNED, STEP_POSITION = range(4)
STEP_COLUMNS = 4
#: columns of a run of bytes that is copied, int64: addresses, and how many bytes
COPY_TO, COPY_FROM, COPY_BYTES = range(3)
COPY_COLUMNS = 3
#: elements of which a side is made: those of both sides stay in the first-level cache
MADE = 1 << 11
#: columns of a dtype slot, int64: bits, what adds up statistics, and what compares and hashes whole
#: units in one pass (or 0); then (kernel, parameter) for each rule
SLOT_BITS, SLOT_STATISTICS, SLOT_UNITS, SLOT_RULES = range(4)
#: one zeroed word of the widest dtype for each side: where a tensor's ragged end is compared
SCRATCH_BYTES = 2 * LANES * 8

# many checkpoints side by side

MARCH_STEP = 1 << 14  #: elements of each side that are compared while they are in the cache
#: columns of a segment, int64
MARCH_ELEMENTS, MARCH_POSITION, MARCH_UNIT, MARCH_ROW = range(4)
MARCH_HEAD = 4
MARCH_SIDE = 2  #: of a side: its address as it is stored, bits of an element
MARCH_PAIR = 3  #: of a pair: an address of each, the slot of the dtype that they are in

#: fields of a sweep: the table of sides (address, bits) of a segment, the byte of each at which it
#: begins, words, steps, masks (an address for each step), the byte of each at which it begins,
#: counts against the first (one for each step), of neighbours (one less)
SWEEP_FIELDS = 8
#: columns of a job of paths, int64: addresses of the first side, of the one before and of a step's
#: own, all of one dtype; elements, position of the first one, the row of PATHS_STEP slots to add to
PATHS_SIDES, PATHS_ELEMENTS, PATHS_POSITION, PATHS_OUT = 0, 3, 4, 5
PATHS_COLUMNS = 6
#: slots of a row: sums of |now - before| and |now - first| (float64), then how many elements went
#: onward, how many back, and how many were left out as they are not finite (int64)
PATHS_STEP = 5
PATHS_BLOCK = 1 << 14  #: elements that are summed together; blocks lie at multiples of it
PATHS_SCRATCH = 3 * LANES * 8 + 2 * 3 * 8

# the SIGBUS guard

#: fields of the table the handler works from, int64 each; then (start, end, faults) of each mapping
GUARD_FAULTS, GUARD_MMAP, GUARD_SIGNAL, GUARD_PREVIOUS, GUARD_PAGE, GUARD_RANGES, GUARD_FIRST = (
    range(7)
)
GUARD_COLUMNS = 3
GUARD_SET_TABLE = -1  # a "signal number" by which Python hands the table's address to the handler

# the mask encoder

PIECE = 1 << 16  #: bytes encoded at a time
STREAM = PIECE // 4  #: bytes of each of the four streams of a zstd literals section
LONGEST = 11  #: bits of the longest code that zstd allows

#: bytes of room for one stream: the longest codes, the end mark, and a word stored past the end
ROOM = STREAM * LONGEST // 8 + 16
#: bytes of the output buffer: four sizes (int64), then four streams at distances of ROOM
OUTPUT = 32 + 4 * ROOM

# masks of several stores

#: columns of a segment before its mask addresses: bytes of mask (a multiple of 64), row, address to
#: write to
SEG_SIZE, SEG_GROUP, SEG_TARGET = range(3)
SEGMENT_COLUMNS = 3
AGREE_PIECE = (
    1 << 11
)  #: bytes of each mask that are counted while they are in the first-level cache

#: columns of a frame to decode: where to, compressed bytes, their number (0: all zeros)
DECODE_COLUMNS = 3

#: the places of 64 elements (uint16), and one word of the widest dtype
CELLS_SCRATCH = 2 * LANES + 8 * LANES

# profiles of matrices

PROFILE_STRIP = 512  #: columns that are counted side by side
PROFILE_DIGITS = 8  #: of a count that is not in the column counts yet
PROFILE_BAND = (2 + PROFILE_DIGITS) * PROFILE_STRIP // 8  #: bytes
#: the first row's first bit in the mask, rows, columns, the first row's place in the matrix, and
#: how many rows the digits have
PROFILE_FIELDS = 5
#: blocks of 16 x 16 and of 128 x 128 with ones, of the block rows that are whole; fours of a row
#: with at least 1, 2, 3 and 4 ones
PROFILE_TOTALS = 6
#: bytes that may be read after those of the last row
PROFILE_MARGIN = 136

# random masks

#: the keys of the 64 elements of a mask word
DRAW_SCRATCH = LANES * 8

# packed deltas

SMALL_STEPS = 16  #: a step whose zigzag number is below this is its own symbol
SMALL_BITS = 4
LARGE_HALF = 15  #: where symbols are paired, those from here on are in the rest
#: bytes of scratch for gaps: the places of the bits of GAPS_WORDS words
GAPS_WORDS = 32
GAPS_SCRATCH = 8 * (GAPS_WORDS * 64 + 4)


def step_bits(bits: int) -> int:
    """How many bits below the leading one are in the symbol of a large step."""
    return 1 if bits == 64 else 2  # symbols have to fit a byte


#: the head of the state, int64: where extra bits are, those not yet written, how many bits those
#: are (writing) or how many bits were read
DELTA_EXTRA, DELTA_PENDING, DELTA_AT = range(3)
DELTA_HEAD = 3
#: columns of a class: the least magnitude in it, where its bits and its symbols are, bits not yet
#: written, bits written or read so far, bits there are (reading)
CLASS_LEAST, CLASS_BITS, CLASS_SYMBOLS, CLASS_PENDING, CLASS_AT, CLASS_TOTAL = range(6)
CLASS_COLUMNS = 6

# other dtypes

#: a word of 64 elements of the widest dtype for what is read, and one for what is written
CAST_SCRATCH = 2 * LANES * 8

# quantised elements by value

#: dtypes of scales, in the order by which recipes know them
SCALE_DTYPES = (
    "F32", "F8_E8M0", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
)  # fmt: skip
#: a recipe for values, int64: who makes them (the address of a kernel, or 0 where elements are what
#: is compared), who compares whole units with those of a recipe that has the same (the address of a
#: kernel, or 0), how many are still to be made, where the driver has a block of them written, bits
#: of an element where those are hashed and not the values (or 0), where elements and scales are,
#: the dtype of these, and bytes of one; columns of a matrix and its rows, rows and columns of a
#: block, scales in a row of blocks; then where the walk is: column, row, row in the block, column
#: in the block, and the positions of the row's first scale and of the block's. Recipes that lie one
#: behind the other make the values, of 32 bits, of one span; where elements are hashed, or their
#: values have other bits, one makes all of them.
(
    RECIPE_MAKER, RECIPE_UNITS, RECIPE_LEFT, RECIPE_ROOM, RECIPE_STORED,
    RECIPE_SOURCE, RECIPE_SCALES, RECIPE_DTYPE, RECIPE_BYTES,
    WALK_WIDTH, WALK_ROWS, WALK_BLOCK_ROWS, WALK_BLOCK_COLUMNS, WALK_ACROSS,
    WALK_COLUMN, WALK_ROW, WALK_IN_ROW, WALK_IN_COLUMN, WALK_FIRST, WALK_SCALE,
) = range(20)  # fmt: skip
RECIPE_FIELDS = 20

# moving chosen elements

#: columns of a job: an array and another of the same shape (addresses), the compact array of each,
#: tiles (TILE_COLUMNS each), where their places lie, number of tiles, zeros to write after them
JOB_COLUMNS = 8
#: columns of a tile: its first element, the first of its elements in the compact array, its places
#: (a distance in bytes), how many positions (uint16, from the first element on) or, negative, how
#: many words of bits
TILE_COLUMNS = 4
TILE_ELEMENTS = 1 << 16
#: bytes after the last place that may be read
PLACES_MARGIN = 64

# copying between orders

#: of the two innermost dimensions the size, and the bytes from one to the next in the source and in
#: what is written; outer dimensions; bytes from the first element to where the walk is, on both
#: sides (zeros at first). A run is a row, and has its bytes for columns. Of what is woven each row
#: is followed by one of another box in the source: how far that lies away in what is written is
#: where the step of columns would be.
(
    BOX_ROWS, BOX_ROW_SOURCE, BOX_ROW_OUT, BOX_COLUMNS, BOX_COLUMN_SOURCE, BOX_COLUMN_OUT,
    BOX_DIMENSIONS, BOX_SOURCE, BOX_OUT,
) = range(9)  # fmt: skip
BOX_HEAD = 9
#: of an outer dimension, the innermost first: size, bytes from one to the next in the source and in
#: what is written, and how many are done (zero at first)
BOX_DIMENSION = 4
#: bytes of a row and of a column of what is transposed at a time: a line of the cache
BOX_TILE = 64
#: the largest tile, whose elements have one byte
BOX_SCRATCH = BOX_TILE * BOX_TILE

# comparing what is copied

#: columns of a panel, int64: the address of a strided kernel and what it takes, or 0; the first
#: segment that is compared then, and how many
PANEL_COPIER, PANEL_SOURCE, PANEL_OUT, PANEL_BOX, PANEL_FIRST, PANEL_SEGMENTS = range(6)
PANEL_COLUMNS = 6

# what changes in a file

GROUP = LANES * LANES  #: bytes whose blocks have one word
PAGE_BITS = 12  #: what is written is whole pages of so many bytes
PUT_SCRATCH = 16 * LANES  #: both sides of 8 blocks

# exclusive or as sequences

LEAST_ZEROS = 4  #: in a row that are a sequence: one is a literal, and no match is below three
SEQUENCE_BYTES = 16
RUNS_MARGIN = 8
#: up to the end of a block: literals, bytes of sequences, changed elements, changed bytes
RUNS_COLUMNS = 4
