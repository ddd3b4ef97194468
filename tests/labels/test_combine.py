"""Labels of several labelers as one: majority, and Dawid and Skene on simulated labelers."""

from __future__ import annotations

import numpy
import pytest

from activedpo_fast.labels.combine import CombinedLabel, dawid_skene, fit_dawid_skene, majority


def test_majority_names_ties_and_counts_no_skip() -> None:
    found = majority(
        [
            {"a": 0, "b": 0, "c": 1},
            {"a": 1, "b": 0},
            {"a": 1, "b": "skip"},
            {"a": "skip", "b": "skip"},
            {},
            {"a": "tie", "b": "tie", "c": 0, "d": "skip"},
            {"a": "tie", "b": 0},
        ]
    )
    assert found == [
        CombinedLabel(0, 2 / 3),
        CombinedLabel("tie", 0.5, split=True),
        CombinedLabel(1, 1.0),
        CombinedLabel("skip", 1.0),
        None,
        CombinedLabel("tie", 2 / 3),
        CombinedLabel("tie", 0.5, split=True),
    ]


CONFUSION = {
    "careful": [[0.95, 0.05], [0.05, 0.95]],
    "fair": [[0.8, 0.2], [0.25, 0.75]],
    "left": [[0.95, 0.05], [0.7, 0.3]],
    "guessing": [[0.5, 0.5], [0.5, 0.5]],
    "contrary": [[0.2, 0.8], [0.15, 0.85]],
}


def _simulated(pairs: int, seed: int) -> tuple[numpy.ndarray, list[dict[str, int | str]]]:
    random = numpy.random.default_rng(seed)
    truth = (random.random(pairs) < 0.4).astype(int)
    answers: list[dict[str, int | str]] = [{} for _ in range(pairs)]
    for name, matrix in CONFUSION.items():
        for pair in range(pairs):
            if random.random() < 0.9:  # labelers miss pairs
                answers[pair][name] = int(random.random() < matrix[truth[pair]][1])
    return truth, answers


def test_dawid_skene_finds_the_confusion_of_simulated_labelers() -> None:
    truth, answers = _simulated(4000, seed=0)
    fitted = fit_dawid_skene(answers)
    assert fitted.classes == (0, 1)
    assert fitted.posterior.dtype == numpy.float64
    numpy.testing.assert_allclose(fitted.posterior.sum(1), 1, atol=1e-12)
    numpy.testing.assert_allclose(fitted.prior, [0.6, 0.4], atol=0.03)
    for name, matrix in CONFUSION.items():
        numpy.testing.assert_allclose(fitted.confusion[name], matrix, atol=0.05, err_msg=name)


def test_dawid_skene_is_right_more_often_than_the_majority_and_as_often_as_it_says() -> None:
    truth, answers = _simulated(4000, seed=1)

    def right(labels: list) -> numpy.ndarray:
        return numpy.array([label.label for label in labels], object) == truth

    combined = dawid_skene(answers)
    assert right(combined).mean() > right(majority(answers)).mean() + 0.03
    # The weights are probabilities.
    weights = numpy.array([label.weight for label in combined])
    for low, high in ((0.5, 0.8), (0.8, 0.95), (0.95, 1.0)):
        some = (weights >= low) & (weights <= high)
        assert right(combined)[some].mean() == pytest.approx(weights[some].mean(), abs=0.05)


def test_dawid_skene_by_hand() -> None:
    """One EM step without pseudo-counts, worked out on paper."""
    answers = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}]
    fitted = fit_dawid_skene(answers, steps=1, pseudo_count=0.0)
    # Start: 1, 1/2, 0 for label 0. Prior 1/2. a answers 0 to label 0 always, to label 1 in a third;
    # b answers 0 to label 0 in two thirds, to label 1 never.
    numpy.testing.assert_allclose(fitted.prior, [0.5, 0.5])
    numpy.testing.assert_allclose(fitted.confusion["a"], [[1, 0], [1 / 3, 2 / 3]], atol=1e-9)
    numpy.testing.assert_allclose(fitted.confusion["b"], [[2 / 3, 1 / 3], [0, 1]], atol=1e-9)
    # The second pair: 1/2 * 1 * 1/3 against 1/2 * 1/3 * 1.
    numpy.testing.assert_allclose(fitted.posterior, [[1, 0], [0.5, 0.5], [0, 1]], atol=1e-9)


def test_dawid_skene_of_few_answers() -> None:
    assert dawid_skene([]) == []
    assert dawid_skene([{}, {"a": "skip"}]) == [None, CombinedLabel("skip", 1.0)]
    only = dawid_skene([{"a": 0}, {"a": 1}, {"a": "tie"}, {"b": "skip"}])
    assert [label and label.label for label in only] == [0, 1, "tie", "skip"]
    split = dawid_skene([{"a": 0, "b": 1}, {"a": 1, "b": 0}])
    assert all(label is not None and label.split and label.label == "tie" for label in split)


def test_dawid_skene_never_overrules_the_only_answer_to_a_pair() -> None:
    random = numpy.random.default_rng(0)
    labels = [[0, 1, "tie"][n] for n in random.integers(3, size=60)]
    alone = [{"a": label} for label in labels]
    assert dawid_skene(alone) == [CombinedLabel(label, 1.0) for label in labels]
    # Two labelers who share one pair, and two who share none.
    for shared in ([], [{"a": 0, "b": 0}]):
        own = [{"ab"[n % 2]: label} for n, label in enumerate(labels)]
        assert [c and c.label for c in dawid_skene([*own, *shared])][: len(own)] == labels
    # A labeler who often errs: the answer stands, and its weight says how little it is worth.
    _, answers = _simulated(2000, seed=2)
    contrary, careful = dawid_skene([*answers, {"contrary": 0}, {"careful": 0}])[-2:]
    assert contrary is not None and careful is not None
    assert (contrary.label, careful.label) == (0, 0)
    expected = 0.6 * 0.2 / (0.6 * 0.2 + 0.4 * 0.15)
    assert contrary.weight == pytest.approx(expected, abs=0.1) and careful.weight > 0.9


def test_dawid_skene_counts_equal_votes_as_often_as_they_occur() -> None:
    _, answers = _simulated(300, seed=3)
    often = fit_dawid_skene(answers)
    assert len({frozenset(votes.items()) for votes in answers}) < 150
    repeated = fit_dawid_skene([votes for votes in answers for _ in range(2)], pseudo_count=0.02)
    numpy.testing.assert_allclose(repeated.posterior[::2], often.posterior, atol=1e-6)
