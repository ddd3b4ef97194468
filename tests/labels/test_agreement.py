"""Cohen's kappa and Krippendorff's alpha against published and hand-computed examples."""

from __future__ import annotations

import pytest

from activedpo_fast.labels.agreement import cohen_kappa, krippendorff_alpha


def _answers(counts: dict[tuple[str, str], int]) -> tuple[list[str], list[str]]:
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        # 50 grant proposals: p_o = 0.7, p_e = 0.5
        ({("y", "y"): 20, ("y", "n"): 5, ("n", "y"): 10, ("n", "n"): 15}, 0.4),
        # Same agreement, other totals: p_o = 0.6, p_e = 0.54 and 0.46
        ({("y", "y"): 45, ("y", "n"): 15, ("n", "y"): 25, ("n", "n"): 15}, 0.06 / 0.46),
        ({("y", "y"): 25, ("y", "n"): 35, ("n", "y"): 5, ("n", "n"): 35}, 0.14 / 0.54),
        # Three categories, by hand: p_o = 0.8,
        # p_e = 0.5 * 0.6 + 0.3 * 0.3 + 0.2 * 0.1 = 0.41
        (
            {("a", "a"): 50, ("b", "b"): 20, ("c", "c"): 10, ("b", "a"): 10, ("c", "b"): 10},
            (0.8 - 0.41) / 0.59,
        ),
        ({("y", "n"): 5, ("n", "y"): 5}, -1.0),
        ({("y", "y"): 3, ("n", "n"): 2}, 1.0),
    ],
)
def test_cohen_kappa(counts: dict[tuple[str, str], int], kappa: float) -> None:
    first, second = _answers(counts)
    assert cohen_kappa(first, second) == pytest.approx(kappa, abs=1e-12)
    assert cohen_kappa(second, first) == pytest.approx(kappa, abs=1e-12)


def test_cohen_kappa_that_is_not_defined() -> None:
    assert cohen_kappa([], []) is None
    assert cohen_kappa([0, 0], [0, 0]) is None
    assert cohen_kappa([0, 0], [1, 1]) == 0.0


def _by_pair(rows: list[str]) -> list[list[str]]:
    return [[answer for answer in column if answer != "."] for column in zip(*rows, strict=True)]


def test_krippendorff_alpha_of_published_examples() -> None:
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": A, two observers, binary
    assert krippendorff_alpha(_by_pair(["0100000010", "1110010000"])) == pytest.approx(
        0.095, abs=5e-4
    )
    # B, two observers, nominal
    assert krippendorff_alpha(_by_pair(["aabbdcccedda", "babbbccceddd"])) == pytest.approx(
        0.692, abs=5e-4
    )
    # C, four observers, missing values, nominal
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    assert krippendorff_alpha(_by_pair(observers)) == pytest.approx(0.743, abs=5e-4)


def test_krippendorff_alpha_by_hand() -> None:
    # Coincidences: 00 2, 01 and 10 1 each, 11 2; n = 6, n_0 = n_1 = 3.
    # alpha = 1 - 5 * 2 / (36 - 18)
    assert krippendorff_alpha([[0, 0], [0, 1], [1, 1], [0], []]) == pytest.approx(1 - 10 / 18)
    # Three answers to one pair weigh 1 / 2: 00 1, 01 1, 10 1; n = 3; alpha = 1 - 2 * 2 / (9 - 5)
    assert krippendorff_alpha([[0, 0, 1]]) == pytest.approx(0.0)


def test_krippendorff_alpha_that_is_not_defined() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[0], [1]]) is None
    assert krippendorff_alpha([[0, 0], [0, 0]]) is None
