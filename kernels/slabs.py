"""How a projection by random signs is cut: into slabs of a gradient, and tiles of each kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from activedpo_fast.kernels.launching import cdiv


@dataclass(frozen=True)
class Tile:
    """A configuration of `project_slab_kernel`: number of rows, and of positions at a time."""

    rows: int
    warps: int
    stages: int
    block: int = 128

    def shared(self, pieces: int) -> int:
        """Return the maximum bytes of shared memory it needs: numbers and random bits."""
        return 2 * self.stages * pieces * self.rows * self.block + 16 * self.block


# For two and three pieces. All except the last need at most 99 KiB of shared memory, which every
# GPU from sm_80 on has.
TILES = {2: (Tile(32, 4, 3), Tile(64, 8, 3), Tile(128, 8, 2)),
         3: (Tile(32, 4, 3), Tile(64, 8, 2), Tile(128, 8, 2))}
GRADIENT_TILES = ((16, 128), (128, 16), (64, 64))  # of form_slab_kernel: wide, tall, square


def tile_for(rows: int, pieces: int, shared: int) -> Tile:
    """Return the tile for a number of rows, on a GPU with `shared` bytes of shared memory."""
    fitting = [tile for tile in TILES[pieces] if tile.shared(pieces) <= shared]
    return next((tile for tile in fitting if tile.rows >= rows), fitting[-1])


def gradient_tile_for(rows: int, columns: int) -> tuple[int, int]:
    """Return the tile of a [rows, columns] gradient, whose short side is a LoRA rank."""
    wide, tall, square = GRADIENT_TILES
    if min(rows, columns) > 16:
        return square
    return wide if rows <= columns else tall


@dataclass(frozen=True)
class Part:
    """The part of a gradient in a slab, starting at row `top` and column `begin`."""

    top: int
    height: int
    begin: int
    width: int  # may extend beyond the gradient
    whole: bool  # whole rows, flattened and then padded to whole blocks; else each row is padded


def parts(rows: int, columns: int, positions: int, block: int) -> Iterator[Part]:
    """Split a gradient into parts of at most `positions` numbers, padded to blocks.

    Parts have many rows if possible, because tokens are read again for every part. All parts start
    at multiples of 16.
    """
    most = max(16, min(256, positions // block // 16 * 16))
    if min(rows, most) * columns <= positions:
        height = rows if rows * columns <= positions else _even(rows, positions // columns, 16)
        for top in range(0, rows, height):
            yield Part(top, min(height, rows - top), 0, columns, True)
        return
    height = rows if rows <= most else _even(rows, most, 16)
    width = _even(columns, positions // height, block)
    for top in range(0, rows, height):
        for begin in range(0, columns, width):
            yield Part(top, min(height, rows - top), begin, width, False)


def _even(length: int, most: int, multiple: int) -> int:
    """Return a part size that splits `length` evenly: a multiple of `multiple`, at most `most`."""
    count = cdiv(length, most // multiple * multiple)
    rounded: int = cdiv(cdiv(length, count), multiple) * multiple
    return rounded
