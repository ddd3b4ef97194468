"""Rows that stay on disk: the same bits, bounded memory, and every header is checked."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.store import rows as stored_rows
from activedpo_fast.store.rows import StoredRows

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def _write(folder: Path, counts: list[int], dim: int, dtype: torch.dtype) -> list[Path]:
    """Files with random rows next to other tensors; not in the order of their names."""
    generator = torch.Generator().manual_seed(dim)
    paths = [folder / f"{len(counts) - n}.safetensors" for n in range(len(counts))]
    for path, count in zip(paths, counts, strict=True):
        save_file(
            {
                "gradients": torch.randn(count, dim, generator=generator).to(dtype),
                "logps": torch.zeros(count),
                "rows": torch.arange(count),
            },
            path,
        )
    return paths


def _loaded(paths: list[Path]) -> torch.Tensor:
    return torch.cat([load_file(path)["gradients"] for path in paths])


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64])
@pytest.mark.parametrize("rows_at_once", [4, 2**16])
def test_rows_are_those_of_the_files(
    tmp_path: Path, dtype: torch.dtype, dim: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_rows, "_ROWS_AT_ONCE", rows_at_once)
    paths = _write(tmp_path, [5, 1, 9, 3], dim, dtype)
    expected = _loaded(paths)
    rows = StoredRows.open(paths)
    assert rows.shape == (18, dim) and len(rows) == 18 and rows.ndim == 2
    assert rows.dtype == dtype and rows.is_floating_point() and rows.device.type == "cpu"
    assert rows.nbytes == expected.nbytes
    generator = torch.Generator().manual_seed(0)
    for ids in (
        torch.arange(18),
        torch.arange(17, -1, -1),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([3, 3, 0, 3, 17, 17]),
        torch.randperm(18, generator=generator),
        torch.randint(18, (50,), generator=generator),
    ):
        assert _same(rows.take(ids), expected[ids])

    order = torch.randperm(18, generator=generator)
    shuffled = StoredRows.open(paths, order=order)
    for size in (1, 4, 18, 100):
        starts, parts = zip(*shuffled.chunks(size), strict=True)
        assert list(starts) == list(range(0, 18, size))
        assert _same(torch.cat(parts), expected[order])

    ids = torch.tensor([4, 4, 16, 2])
    part = shuffled.select(ids)
    assert part.shape == (4, dim)
    assert _same(part.take(torch.tensor([3, 0, 1, 2])), expected[order[ids]][[3, 0, 1, 2]])
    assert part.descriptors.tolist() == shuffled.descriptors.tolist()


def test_more_pieces_than_one_read_takes(tmp_path: Path) -> None:
    paths = _write(tmp_path, [3000], 2, torch.float32)
    ids = torch.arange(2999, -1, -1)  # one run on disk, but every row has its own place in memory
    assert _same(StoredRows.open(paths).take(ids), _loaded(paths)[ids])


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _write(tmp_path, [20, 20], 16, torch.float32)
    real = os.preadv

    def short(descriptor: int, buffers: Any, offset: int) -> int:
        return real(descriptor, [buffers[0][:7]], offset)

    rows, ids = StoredRows.open(paths), torch.tensor([5, 4, 3, 30, 31, 32, 4])
    monkeypatch.setattr(stored_rows.os, "preadv", short)
    assert _same(rows.take(ids), _loaded(paths)[ids])


def test_neighbors_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _write(tmp_path, [20, 20], 16, torch.float32)
    real, calls = os.preadv, []

    def counted(*args: Any) -> int:
        calls.append(args)
        return real(*args)

    rows = StoredRows.open(paths)
    monkeypatch.setattr(stored_rows.os, "preadv", counted)
    rows.take(torch.tensor([9, 21, 8, 20, 7, 22, 7]))  # two runs, in two files
    assert len(calls) == 2


def test_the_arrays_have_the_addresses_of_rows(tmp_path: Path) -> None:
    paths = _write(tmp_path, [4, 6], 8, torch.bfloat16)
    order = torch.tensor([7, 0, 9, 3])
    rows, expected = StoredRows.open(paths, order=order), _loaded(paths)[order]
    assert rows.descriptors.data_ptr() == rows.descriptors.data_ptr()  # C++ is given the address
    assert rows.descriptors.dtype == rows.file_of_row.dtype == torch.int32
    assert rows.offset_of_row.dtype == torch.int64 and rows.row_bytes == 16
    for number in range(4):
        descriptor = int(rows.descriptors[rows.file_of_row[number]])
        content = os.pread(descriptor, rows.row_bytes, int(rows.offset_of_row[number]))
        row = torch.frombuffer(bytearray(content), dtype=torch.bfloat16)
        assert _same(row, expected[number])


def test_files_are_closed_when_their_last_user_is_gone(tmp_path: Path) -> None:
    def is_open(descriptor: int) -> bool:
        try:
            os.fstat(descriptor)
        except OSError:
            return False
        return True

    paths = _write(tmp_path, [4], 8, torch.float32)
    with StoredRows.open(paths) as rows:
        (descriptor,) = rows.descriptors.tolist()
        part = rows.select(torch.tensor([2]))
    with pytest.raises(ActiveDPOError, match="have been closed"):
        rows.take(torch.tensor([0]))
    assert _same(part.take(torch.tensor([0])), _loaded(paths)[2:3])
    rows.close()
    part.close()
    assert not is_open(descriptor)

    rows = StoredRows.open(paths)
    (descriptor,) = rows.descriptors.tolist()
    del rows
    gc.collect()
    assert not is_open(descriptor)


def test_pickles_and_copies_are_refused(tmp_path: Path) -> None:
    rows = StoredRows.open(_write(tmp_path, [4], 8, torch.float32))
    for make in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            make(rows)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (torch.tensor([0, 4]), "no row 4, only 4 rows"),
        (torch.tensor([-1]), "no row -1"),
        (torch.tensor([0], dtype=torch.int32), "int64"),
        (torch.tensor([[0]]), "int64"),
    ],
)
def test_bad_row_numbers_are_refused(tmp_path: Path, ids: torch.Tensor, expected: str) -> None:
    paths = _write(tmp_path, [4], 8, torch.float32)
    rows = StoredRows.open(paths)
    for use in (rows.take, rows.select, lambda order: StoredRows.open(paths, order=order)):
        with pytest.raises(ActiveDPOError, match=expected):
            use(ids)
    with pytest.raises(ActiveDPOError, match="rows_per_chunk"):
        list(rows.chunks(0))


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    paths = _write(tmp_path, [4, 4], 8, torch.float32)
    rows = StoredRows.open(paths)
    os.truncate(paths[1], paths[1].stat().st_size - 8 * 4 - 1)
    rows.take(torch.arange(4))
    with pytest.raises(ActiveDPOError, match=f"{paths[1].name} has been cut short"):
        rows.take(torch.arange(8))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(ActiveDPOError, match=f"{paths[1].name} is not a whole safetensors file"):
        StoredRows.open(paths)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    def written(name: str, tensor: torch.Tensor) -> Path:
        save_file({"gradients": tensor}, tmp_path / name)
        return tmp_path / name

    first = written("first", torch.zeros(2, 8))
    with pytest.raises(ActiveDPOError, match="second has rows of 4 float32 numbers, .*first of 8"):
        StoredRows.open([first, written("second", torch.zeros(2, 4))])
    with pytest.raises(ActiveDPOError, match="third has rows of 8 bfloat16 numbers"):
        StoredRows.open([first, written("third", torch.zeros(2, 8, dtype=torch.bfloat16))])
    with pytest.raises(ActiveDPOError, match="no tensor 'other'"):
        StoredRows.open([first], tensor="other")
    with pytest.raises(ActiveDPOError, match="no files"):
        StoredRows.open([])
    with pytest.raises(ActiveDPOError, match="none cannot be read: No such file"):
        StoredRows.open([tmp_path / "none"])
    with pytest.raises(ActiveDPOError, match="not a file"):
        StoredRows.open([tmp_path])


def _header(**fields: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32], **fields}
    text = json.dumps({"gradients": entry}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x00\x00",
        struct.pack("<Q", 0) + bytes(64),
        struct.pack("<Q", 2**63) + bytes(64),
        struct.pack("<Q", 2**64 - 1) + bytes(64),
        struct.pack("<Q", 57) + bytes(64),
        struct.pack("<Q", 2) + b"[]" + bytes(64),
        struct.pack("<Q", 4) + b"null" + bytes(64),
        struct.pack("<Q", 17) + b'{"gradients": 12}' + bytes(64),
        struct.pack("<Q", 8) + b"\xff" * 8 + bytes(64),
        struct.pack("<Q", 10**6) + b"[" * 10**6 + bytes(64),
        _header(dtype="F8_E4M3") + bytes(32),
        _header(dtype="I32") + bytes(32),
        _header(dtype=None) + bytes(32),
        _header(dtype=["F32"]) + bytes(32),
        _header(shape=[8]) + bytes(32),
        _header(shape=[2, 2, 2]) + bytes(32),
        _header(shape=[2, 5]) + bytes(32),
        _header(shape=[-2, -4]) + bytes(32),
        _header(shape=[2.0, 4]) + bytes(32),
        _header(shape=[True, 8]) + bytes(32),
        _header(shape=[8, 0], data_offsets=[0, 0]) + bytes(32),
        _header(shape=[2**62, 4], data_offsets=[0, 2**66]) + bytes(32),
        _header(shape=[10**4000, 10**4000], data_offsets=[0, 4 * 10**4000]) + bytes(32),
        _header(shape="24") + bytes(32),
        _header(data_offsets=[32, 0]) + bytes(32),
        _header(data_offsets=[-16, 16]) + bytes(32),
        _header(data_offsets=[0, 28]) + bytes(32),
        _header(data_offsets=[2**40, 2**40 + 32]) + bytes(32),
        _header(data_offsets=[0]) + bytes(32),
        _header(data_offsets={"begin": 0}) + bytes(32),
        _header(data_offsets=[1, 33]) + bytes(32),
        _header() + bytes(31),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(content)
    with pytest.raises(ActiveDPOError, match="hostile is not a whole safetensors file") as caught:
        StoredRows.open([path])
    assert len(str(caught.value)) < 400


def test_the_header_of_these_tests_is_accepted(tmp_path: Path) -> None:
    values = torch.arange(8, dtype=torch.float32).view(2, 4)
    (tmp_path / "file").write_bytes(_header() + values.numpy().tobytes())
    assert _same(StoredRows.open([tmp_path / "file"]).take(torch.arange(2)), values)


_READ_ALL = """
import sys
import torch
from benchmarks.rows.measure import peak_memory
from activedpo_fast.store.rows import StoredRows

paths = sys.argv[1:]
rows = StoredRows.open(paths)
rows = rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))

def read() -> None:
    for _, part in rows.chunks(1024):
        assert bool((part == 1).all())

print(peak_memory(read), rows.nbytes / 2**20)
"""


def test_reading_everything_takes_little_memory(tmp_path: Path) -> None:
    """400 MiB in chunks of 16 MiB, in random order, in a process that has no memory to reuse."""
    paths = [tmp_path / f"{n}.safetensors" for n in range(4)]
    part = {"gradients": torch.ones(6400, 8192, dtype=torch.bfloat16)}
    for path in paths:
        save_file(part, path)
    done = subprocess.run(
        [sys.executable, "-c", _READ_ALL, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    peak, size = done.stdout.split()
    assert float(size) == 400
    if peak == "None":
        pytest.skip("this system does not tell the peak of a process's memory")
    # Chunks, read-ahead and the allocator's overhead: about 60 to 110 MiB. All rows: over 400.
    assert float(peak) < float(size) / 2
