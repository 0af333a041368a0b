"""How each kernel cuts its problem: frozen tables of launch configurations, one section an op, chosen by size alone.

Training never searches. A number here stands with where it comes from: a measurement, or "not measured". A choice depends on
shapes only, never on the device, so the order of every sum, and with it every bit of a gradient, is the same on all GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

# ---- elementwise over [rows, columns] with column sums: bias_gelu ----------------------------------------------------


@dataclass(frozen=True)
class SheetTile:
    """A program owns `block_columns` columns of `num_blocks` x `block_rows` rows; num_blocks counts in backward only."""

    block_rows: int
    block_columns: int
    num_blocks: int
    num_warps: int


# Not measured. 16 fp32 values a thread; one partial row of 4 bytes for 32 rows of 2 + 2 + 2.
BIAS_GELU_FORWARD = SheetTile(block_rows=4, block_columns=512, num_blocks=1, num_warps=4)
BIAS_GELU_BACKWARD = SheetTile(block_rows=4, block_columns=512, num_blocks=8, num_warps=4)
