"""`rank_update_` against its sum, on the CPU, tile by tile as on a GPU, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends, rank_update_
from activedpo_fast.selection.information.matrix import InformationMatrix
from tests.support.native import module_for_tests

# k near the side of a tile (64) and of the CPU's blocks (512); m near the depth (16).
SHAPES = [(1, 1), (2, 3), (63, 1), (64, 16), (65, 17), (130, 1), (200, 33), (513, 5), (1030, 40)]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tiles_(v, points, alpha):
    """The work of a GPU's threads, one after another."""
    module_for_tests().rank_update(
        v=v.data_ptr(),
        v_stride=v.stride(0),
        points=points.data_ptr(),
        points_stride=points.stride(0),
        k=len(v),
        m=len(points),
        alpha=alpha,
    )


def padded(rows, columns, device="cpu"):
    """A NaN-filled storage and the view [rows, columns] inside it."""
    storage = torch.full((rows + 2, columns + 3), torch.nan, dtype=torch.float64, device=device)
    return storage, storage[1 : rows + 1, 2 : columns + 2]


def check(update, k, m, alpha, device="cpu", keeps_above=True):
    """Compare with the sum. NaN around V, around the points and above V's diagonal must not
    spread."""
    start, points = normal(k, k, seed=1), normal(m, k, seed=2)
    storage, v = padded(k, k, device)
    v.copy_(start)
    v[torch.ones(k, k, dtype=torch.bool, device=device).triu(1)] = torch.nan
    _, room = padded(m, k, device)
    room.copy_(points)
    update(v, room, alpha)
    wanted = start + alpha * (points[:, :, None] * points[:, None, :]).sum(0)
    torch.testing.assert_close(v.cpu().tril(), wanted.tril(), rtol=1e-13, atol=1e-12)
    if keeps_above:
        assert v[torch.ones(k, k, dtype=torch.bool, device=device).triu(1)].isnan().all()
    v.zero_()
    assert storage.isnan().sum() == storage.numel() - v.numel()  # nothing was written around it


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("k, m", SHAPES)
def test_the_cpu_forms_the_sum(k, m, alpha):
    check(rank_update_, k, m, alpha, keeps_above=False)


@pytest.mark.parametrize("k, m", SHAPES)
def test_a_gpus_tiles_form_the_sum_and_touch_one_triangle(k, m):
    check(tiles_, k, m, -0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("k, m", [*SHAPES, (4099, 1), (4099, 64), (8192, 256)])
def test_the_gpu_forms_the_sum_and_touches_one_triangle(k, m):
    assert backends.choose("rank_update", "cuda") == "cuda"
    if k < 2000:
        return check(rank_update_, k, m, 0.5, device="cuda")
    points = normal(m, k).cuda()
    v = torch.full((k, k), 7.0, dtype=torch.float64, device="cuda")
    again = v.clone()
    rank_update_(v, points, 0.5)
    wanted = 7 + 0.5 * points.T @ points
    torch.testing.assert_close(v.tril(), wanted.tril(), rtol=1e-12, atol=1e-11)
    assert (v.triu(1) == torch.full_like(v, 7).triu(1)).all()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rank_update_(again, points, 0.5)
    stream.synchronize()
    assert torch.equal(v, again)  # the same bits


def test_no_points_and_no_numbers():
    v = normal(3, 3)
    before = v.clone()
    rank_update_(v, torch.empty(0, 3, dtype=torch.float64))
    assert torch.equal(v, before)
    rank_update_(torch.empty(0, 0, dtype=torch.float64), torch.empty(2, 0, dtype=torch.float64))


@pytest.mark.parametrize(
    "v, points, message",
    [
        (torch.eye(3), normal(2, 3), "v is torch.float32"),
        (normal(3, 3), normal(3), r"points is torch.float64 \(3,\)"),
        (normal(3, 4), normal(2, 4), "square"),
        (normal(3, 3).T, normal(2, 3), "rows are contiguous"),
        (normal(1, 3).expand(3, 3), normal(2, 3), "rows are contiguous"),
        (normal(3, 3), normal(2, 4), "4 wide"),
        (normal(3, 3).requires_grad_(), normal(2, 3), "requires grad"),
        (normal(3, 3), normal(2, 3).to("meta"), "on cpu and points on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(v, points, message):
    with pytest.raises(ActiveDPOError, match=message):
        rank_update_(v, points)


def test_an_explicit_information_matrix_never_reads_above_the_diagonal():
    points = torch.nn.functional.normalize(normal(90, 12), dim=1)
    exact = torch.eye(12, dtype=torch.float64) * 0.5 + points.T @ points

    def poisoned(information):
        information._base.v[torch.ones(12, 12, dtype=torch.bool).triu(1)] = torch.nan
        return information

    information = poisoned(InformationMatrix(12, lam=0.5, form="explicit"))
    for phi in points[:70]:  # 64 of them are folded in
        poisoned(information).add(phi)
    information.add_many(points[70:])
    information._fold()
    base = poisoned(information)._base
    torch.testing.assert_close(base.v.tril(), exact.tril(), rtol=1e-13, atol=1e-13)
    assert base.drift() < 1e-13
    assert base.rounding() == pytest.approx(2.0**-52 * float(exact.norm()), rel=1e-12)
    rebuilt = base.rebuilt()
    torch.testing.assert_close(
        rebuilt.root.T @ rebuilt.root @ exact,
        torch.eye(12, dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )
    torch.testing.assert_close(
        information.score(points),
        (points * torch.linalg.solve(exact, points.T).T).sum(1),
        rtol=1e-10,
        atol=0,
    )
