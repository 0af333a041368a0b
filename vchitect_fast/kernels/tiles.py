"""How each kernel cuts its problem: frozen tables of launch configurations, one section an op, chosen by size.

Training never searches. A number here stands with where it comes from: a measurement, or "not measured". Where a table tuned on
this GPU has a row that fits (tuned.py), attention takes its choice instead. A choice depends on shapes and on that table only:
with one table, or none, the order of every sum, and with it every bit of a gradient, is the same on all GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from vchitect_fast.kernels.tuned import Choice, look_up
from vchitect_fast.plan import ATTENTION_BACKENDS

# ---- elementwise over [rows, columns] with column sums: bias_gelu, gated_weight --------------------------------------


@dataclass(frozen=True)
class SheetTile:
    """A program owns `block_columns` columns of `num_blocks` x `block_rows` rows; num_blocks counts in backward only."""

    block_rows: int
    block_columns: int
    num_blocks: int
    num_warps: int


# Not measured. 16 fp32 values a thread; one fp32 partial row for 64 rows.
BIAS_GELU_FORWARD = SheetTile(block_rows=4, block_columns=512, num_blocks=1, num_warps=4)
BIAS_GELU_BACKWARD = SheetTile(block_rows=4, block_columns=512, num_blocks=16, num_warps=4)

# Not measured. A program owns block_rows whole rows, block_columns at a time; 384 programs at 1536 rows.
GATED_WEIGHT = SheetTile(block_rows=4, block_columns=512, num_blocks=1, num_warps=4)

# ---- fp8: whole rows of any linear of a block, and tiles that are turned ----------------------------------------------

MAX_FP8_ROW = 16384  # columns: 7 D at D = 2304
FP8_TURN = SheetTile(block_rows=64, block_columns=64, num_blocks=1, num_warps=4)  # not measured


def fp8_block_rows(block_columns: int) -> int:
    """Not measured. Rows of one program: one at D = 1536, more where they are narrow."""
    return max(1, 2048 // block_columns)


FP8_GELU_ROWS = 64  # that one program of the backward sums; not measured


def fp8_gelu_warps(block_columns: int) -> int:
    """Not measured. 16 values a thread: four rows of fp32 are held at once."""
    return min(16, max(1, block_columns // 512))


def fp8_row_warps(block_columns: int) -> int:
    """Not measured. 32 fp32 values a thread; a row of 16384 in 16 warps."""
    return min(16, max(1, block_columns // 1024))


# ---- whole rows in one tile: adaln, gated_residual -------------------------------------------------------------------

MAX_ROW = 4096  # columns of one tile: more would not fit the registers of a program


@dataclass(frozen=True)
class RowTile:
    """A program owns num_blocks x block_rows rows of one sample; num_blocks counts in backward only."""

    block_rows: int
    num_blocks: int
    num_warps: int


# (largest D, tile), not measured. 8 columns of one row are a 16-byte load of a thread, so that 8 warps span 2048 columns and
# the sum over a program's rows stays inside a thread.
ROWS_FORWARD = (
    (256, RowTile(block_rows=4, num_blocks=1, num_warps=1)),
    (1024, RowTile(block_rows=4, num_blocks=1, num_warps=4)),
    (2048, RowTile(block_rows=4, num_blocks=1, num_warps=8)),
    (MAX_ROW, RowTile(block_rows=2, num_blocks=1, num_warps=16)),
)
ROWS_BACKWARD = (
    (256, RowTile(block_rows=4, num_blocks=8, num_warps=1)),
    (1024, RowTile(block_rows=4, num_blocks=8, num_warps=4)),
    (2048, RowTile(block_rows=2, num_blocks=16, num_warps=8)),
    (MAX_ROW, RowTile(block_rows=1, num_blocks=32, num_warps=16)),
)


GATED_BACKWARD = (  # four streams in and two out: one row at a time leaves registers for two programs of 8 warps
    (1024, RowTile(block_rows=2, num_blocks=16, num_warps=4)),
    (2048, RowTile(block_rows=1, num_blocks=32, num_warps=8)),
    (MAX_ROW, RowTile(block_rows=1, num_blocks=32, num_warps=16)),
)


def rows_forward(num_columns: int) -> RowTile:
    """The forward tile of both ops at this width (at most MAX_ROW)."""
    return next(tile for limit, tile in ROWS_FORWARD if num_columns <= limit)


def rows_backward(num_columns: int) -> RowTile:
    """The backward tile of adaln at this width (at most MAX_ROW)."""
    return next(tile for limit, tile in ROWS_BACKWARD if num_columns <= limit)


def gated_backward(num_columns: int) -> RowTile:
    """The backward tile of gated_residual at this width (at most MAX_ROW)."""
    return next(tile for limit, tile in GATED_BACKWARD if num_columns <= limit)


# ---- attention over the frames of each position: temporal ------------------------------------------------------------


@dataclass(frozen=True)
class PackedTile:
    """`pack` heads of one position, T frames each, fill `block` rows."""

    block: int
    pack: int
    num_warps: int


@dataclass(frozen=True)
class TiledTile:
    """A program holds `block_q` queries and `block_k` keys at a time."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def temporal(kernel: str, num_frames: int, head_dim: int, element_bytes: int) -> PackedTile | TiledTile:
    """The tile of "forward" or "backward": tuned where the row's tile holds T frames, else by T."""
    tile = _tile("temporal", kernel, element_bytes=element_bytes, T=num_frames, C=head_dim)
    if isinstance(tile, TiledTile) or (isinstance(tile, PackedTile) and tile.pack * num_frames <= tile.block):
        return tile
    by_size = temporal_forward if kernel == "forward" else temporal_backward
    return by_size(num_frames, head_dim, element_bytes)


def temporal_forward(num_frames: int, head_dim: int, element_bytes: int) -> PackedTile | TiledTile:
    """By T. Times are of a sketch of this kernel in bf16 at C = 64 on one H100; what has none is not measured.

    At C = 128 and in fp32 there are as many warps as it takes to spill nothing on sm_90. On sm_80, whose products take
    both operands from registers, tiles of 64 rows and more spill: at C = 64 up to 232 bytes a thread at T <= 64, 872 forward and 2144 backward at T = 128.
    """
    if element_bytes == 4:
        return _temporal_fp32(num_frames)
    if num_frames <= 16:
        return PackedTile(block=16, pack=1, num_warps=1)  # T=16: 0.28 ms
    if num_frames < 32 or (num_frames == 32 and head_dim > 64):
        return PackedTile(block=64, pack=2, num_warps=4)  # T=24: 0.13 ms
    if num_frames == 32:
        return PackedTile(block=32, pack=1, num_warps=1)  # 0.10 ms
    if num_frames <= 64:
        return PackedTile(block=64, pack=1, num_warps=4)  # T=40: 0.37 ms (0.48 packed in 128 rows); T=64: 0.34 ms
    if num_frames <= 128:
        return PackedTile(block=128, pack=1, num_warps=4 if head_dim == 64 else 8)  # T=80: 0.65 ms; T=128: 0.42 ms
    return TiledTile(block_q=64, block_k=64, num_warps=4, num_stages=1)


def temporal_backward(num_frames: int, head_dim: int, element_bytes: int) -> PackedTile | TiledTile:
    """As temporal_forward."""
    narrow = head_dim == 64
    if element_bytes == 4:
        return _temporal_fp32(num_frames)
    if num_frames <= 16:
        return PackedTile(block=16, pack=1, num_warps=1 if narrow else 4)  # T=16: 0.61 ms
    if num_frames <= 32:
        return PackedTile(block=64, pack=2, num_warps=4 if narrow else 8)  # T=24: 0.26 ms; T=32: 0.22 ms
    if num_frames <= 64:
        return PackedTile(block=64, pack=1, num_warps=4 if narrow else 8)  # T=40: 0.97 ms; T=64: 0.76 ms
    if num_frames <= 128 and narrow:
        return PackedTile(block=128, pack=1, num_warps=8)  # T=80: 1.47 ms; T=128: 1.10 ms
    return TiledTile(block_q=64, block_k=64, num_warps=4 if narrow else 8, num_stages=1)


def _temporal_fp32(num_frames: int) -> PackedTile | TiledTile:
    """Products in fp32 run outside the tensor cores and hold their operands in registers: small tiles, many warps."""
    if num_frames <= 16:
        return PackedTile(block=16, pack=1, num_warps=4)
    return TiledTile(block_q=16, block_k=16, num_warps=8, num_stages=1)


# ---- attention over keys that do not fit one tile: cross, spatial -----------------------------------------------------


@dataclass(frozen=True)
class FlashTile:
    """A program holds block_queries queries and streams blocks of keys; of dk and dv it is the other way round."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int

    def blocks(self) -> dict[str, int]:
        """As constexprs."""
        return {"BLOCK_M": self.block_queries, "BLOCK_N": self.block_keys}

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return self.blocks() | {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Not measured. Large tiles that ptxas fits without spills on sm_90 (aot.py); a forward of 4 warps leaves two programs an SM.
FLASH_TILES = {  # by kernel and head dim, 16-bit
    ("forward", 64): FlashTile(128, 64, num_warps=4, num_stages=3),
    ("forward", 128): FlashTile(128, 64, num_warps=8, num_stages=3),
    ("dq", 64): FlashTile(64, 64, num_warps=4, num_stages=3),
    ("dq", 128): FlashTile(64, 64, num_warps=4, num_stages=2),
    ("dkv", 64): FlashTile(64, 128, num_warps=8, num_stages=2),
    ("dkv", 128): FlashTile(32, 128, num_warps=8, num_stages=2),
}
# Not measured. fp32 multiplies outside the tensor cores with its operands in registers: no spills at C = 64, some at
# C = 128.
FLASH_TILES_FP32 = {
    "forward": FlashTile(16, 16, num_warps=8, num_stages=1),
    "dq": FlashTile(16, 16, num_warps=8, num_stages=1),
    "dkv": FlashTile(16, 16, num_warps=8, num_stages=1),
}
CROSS_PROGRAMS = 1056  # of cross dk, dv, at least: 8 for each of the 132 SMs of an H100; not measured


def flash(op: str, kernel: str, head_dim: int, element_bytes: int, **sizes: int) -> FlashTile:
    """The tile of a kernel ("forward", "dq" or "dkv") of spatial (sizes S, N) or cross (R = T (S + N), N): tuned, or by C."""
    tile = _tile(op, kernel, element_bytes=element_bytes, **sizes, C=head_dim)
    return tile if isinstance(tile, FlashTile) else flash_by_size(kernel, head_dim, element_bytes)


def flash_by_size(kernel: str, head_dim: int, element_bytes: int) -> FlashTile:
    """What `flash` takes without a tuned row."""
    return FLASH_TILES_FP32[kernel] if element_bytes == 4 else FLASH_TILES[kernel, head_dim]


def cross_chunks(num_programs: int, num_blocks: int) -> int:
    """Into how many chunks num_blocks blocks of queries are cut, where every chunk takes num_programs programs."""
    return min(num_blocks, -(-CROSS_PROGRAMS // num_programs))


# ---- tuned choices ----------------------------------------------------------------------------------------------------

Tile = FlashTile | PackedTile | TiledTile
TUNED: dict[str, dict[str, tuple[type[Tile], ...]]] = {  # op -> kernel -> the tiles that it takes
    "spatial": dict.fromkeys(("forward", "dq", "dkv"), (FlashTile,)),
    "cross": dict.fromkeys(("forward", "dq", "dkv"), (FlashTile,)),
    "temporal": dict.fromkeys(("forward", "backward"), (PackedTile, TiledTile)),
}
BACKEND = "backend"  # the kernel name of a row that chooses among the backends of attention.py


def check_choice(op: str, kernel: str, choice: Choice) -> None:
    """ValueError unless a row of this op and kernel may hold the choice."""
    if kernel == BACKEND and op in ATTENTION_BACKENDS:
        if choice.keys() != {BACKEND} or choice[BACKEND] not in ATTENTION_BACKENDS[op]:
            raise ValueError(f"backend of {op} {choice!r}")
    elif _made(op, kernel, choice) is None or any(type(size) is not int or size < 1 for size in choice.values()):
        raise ValueError(f"tile of {op} {kernel} {choice!r}")


def _made(op: str, kernel: str, choice: Choice) -> Tile | None:
    """The tile with these fields, where the kernel takes one."""
    for kind in TUNED.get(op, {}).get(kernel, ()):
        if {field.name for field in fields(kind)} == choice.keys():
            return kind(**choice)  # type: ignore[arg-type]
    return None


def _tile(op: str, kernel: str, *, element_bytes: int, **sizes: int) -> Tile | None:
    """The tuned tile, None without one."""
    choice = look_up(op, kernel, element_bytes=element_bytes, **sizes)
    return None if choice is None else _made(op, kernel, choice)
