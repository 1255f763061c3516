"""Intervals and tests against published values, and against their definitions by simulation."""

from math import comb, isnan, sqrt

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial, norm
from sklearn.metrics import f1_score, roc_auc_score

from train.evaluation import significance
from train.evaluation.calibration import calibration_error
from train.evaluation.significance import (
    Interval,
    accuracy_interval,
    ece_interval,
    f1_intervals,
    holm,
    mcnemar,
    mean_interval,
    paired_interval,
    paired_test,
    roc_auc_interval,
)


def binary(positive: np.ndarray, scores: np.ndarray) -> Interval:
    """The interval of two classes by the score of the second."""
    return roc_auc_interval(positive.astype(int), np.stack([-scores, scores], axis=1))


def right(hits: int, n: int) -> np.ndarray:
    return np.arange(n) < hits


# Wilson's interval: 81 of 263 and 15 of 148 are Newcombe's examples (Statistics in Medicine 17:857, 1998)
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes(hits: int, n: int, low: float, high: float) -> None:
    interval = accuracy_interval(right(hits, n))
    assert interval.value == hits / n
    assert interval[1:] == pytest.approx((low, high), abs=5e-5)


# Two of Fagerland, Lydersen and Laake's examples, as R's contingencytables gives them
@pytest.mark.parametrize(
    ("gained", "lost", "n", "low", "high", "p"),
    [(1, 7, 21, -0.5172, -0.0260, 0.0703), (6, 16, 161, -0.1240, -0.0054, 0.0525)],
)
def test_mcnemar_and_tango_are_the_published_ones(
    gained: int, lost: int, n: int, low: float, high: float, p: float
) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p, abs=5e-5)
    interval = paired_interval(gained, lost, n)
    assert interval == pytest.approx(((gained - lost) / n, low, high), abs=6e-5)
    mirrored = paired_interval(lost, gained, n)
    assert (-mirrored.high, -mirrored.low) == pytest.approx(interval[1:])


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (3, 3), (2, 9), (0, 6), (40, 61)])
def test_mcnemar_is_the_tail_of_a_fair_coin(gained: int, lost: int) -> None:
    m, most = gained + lost, max(gained, lost)
    tail = sum(comb(m, k) for k in range(most, m + 1)) / 2**m
    assert mcnemar(gained, lost) == pytest.approx(min(1, 2 * tail))


def test_without_discordant_images_nothing_differs_but_the_interval_has_a_width() -> None:
    assert mcnemar(0, 0) == 1
    z2 = norm.ppf(0.975) ** 2
    interval = paired_interval(0, 0, 180)
    assert interval == pytest.approx((0, -z2 / (180 + z2), z2 / (180 + z2)))


@pytest.mark.parametrize(("gained", "lost", "n"), [(10, 0, 10), (0, 10, 10), (1, 0, 1), (0, 0, 1)])
def test_extremes_have_intervals_within_minus_1_and_1(gained: int, lost: int, n: int) -> None:
    value, low, high = paired_interval(gained, lost, n)
    assert -1 <= low <= value <= high <= 1
    assert low < high


@pytest.mark.parametrize(("gained", "lost", "n"), [(4, 9, 60), (0, 5, 40), (30, 2, 90)])
def test_tangos_bounds_are_where_the_score_test_puts_them(gained: int, lost: int, n: int) -> None:
    """The score test from its definition, its nuisance parameter found by maximising the likelihood."""

    def z(difference: float) -> float:
        def unlikely(q: float) -> float:
            p = np.clip([q + difference, q, 1 - 2 * q - difference], 1e-300, 1)
            return -float(np.array([gained, lost, n - gained - lost]) @ np.log(p))

        bounds = (max(0.0, -difference), (1 - difference) / 2)
        q = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - n * difference) / sqrt(n * (2 * q + difference - difference**2))

    interval = paired_interval(gained, lost, n)
    assert z(interval.low) == pytest.approx(norm.ppf(0.975), abs=1e-3)
    assert z(interval.high) == pytest.approx(norm.ppf(0.025), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("difference", [0.0, -0.02, 0.1])
def test_tangos_interval_covers_95_percent_and_misses_as_often_on_either_side(difference: float) -> None:
    rng = np.random.default_rng(1)
    n, q = 400, 0.05
    tables = rng.multinomial(n, [q + difference, q, 1 - 2 * q - difference], 3000).tolist()
    intervals = [paired_interval(b, c, n) for b, c, _ in tables]
    above = np.mean([i.low > difference for i in intervals])
    below = np.mean([i.high < difference for i in intervals])
    assert 0.015 < above < 0.035
    assert 0.015 < below < 0.035


@pytest.mark.slow
def test_the_one_sided_bound_is_wrong_at_most_in_about_5_percent_of_cases() -> None:
    """What promotion rests on: `lower bound of the 90 % interval above -margin`; size by enumeration."""
    n, margin, q = 300, 0.05, 0.03  # a run that is worse by exactly the margin
    wrong = 0.0
    for gained in range(40):
        for lost in range(60):
            if paired_interval(gained, lost, n, 0.90).low > -margin:
                p = [q, q + margin, 1 - 2 * q - margin]
                wrong += multinomial.pmf([gained, lost, n - gained - lost], n, p)
    assert 0.03 < wrong < 0.06


def test_students_interval_of_a_mean_by_hand() -> None:
    interval = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert interval == pytest.approx((2.5, 2.5 - 2.0543, 2.5 + 2.0543), abs=1e-4)  # 3.1824 * 1.29099 / 2


@pytest.mark.parametrize("values", [[0.3], [0.1, np.inf], [0.1, np.nan]])
def test_no_interval_where_there_is_none(values: list[float]) -> None:
    interval = mean_interval(np.array(values))
    assert isnan(interval.low)
    assert isnan(interval.high)


def test_auc_is_scikit_learns_with_ties() -> None:
    rng = np.random.default_rng(3)
    positive = rng.random(300) < 0.3
    scores = (rng.normal(size=300) + positive).round(1)
    interval = binary(positive, scores)
    assert interval.value == pytest.approx(roc_auc_score(positive, scores))
    # DeLong's variance from the definition: each positive image against each negative one
    above, below = scores[positive][:, None], scores[~positive][None]
    wins = (above > below) + 0.5 * (above == below)
    variance = wins.mean(1).var(ddof=1) / len(wins) + wins.mean(0).var(ddof=1) / wins.shape[1]
    logits = np.log(np.array(interval) / (1 - np.array(interval)))
    slope = 1 / (interval.value * (1 - interval.value))
    assert logits[2] - logits[1] == pytest.approx(2 * 1.959964 * sqrt(variance) * slope)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_delongs_interval_covers_95_percent(shift: float) -> None:
    truth = norm.cdf(shift / sqrt(2))
    rng = np.random.default_rng(4)
    positive = np.arange(200) < 80
    inside = []
    for _ in range(1500):
        _, low, high = binary(positive, rng.normal(size=200) + shift * positive)
        inside.append(low <= truth <= high)
    assert 0.93 < np.mean(inside) < 0.97


def test_separated_classes_have_no_auc_interval() -> None:
    interval = binary(right(3, 6), np.arange(6)[::-1].astype(float))
    assert interval.value == 1
    assert isnan(interval.low)


def test_a_run_against_itself_does_not_differ() -> None:
    correct, losses = right(70, 100), np.random.default_rng(5).exponential(1, 100)
    test = paired_test(correct, correct, losses, losses)
    assert (test.num_images, test.gained, test.lost, test.p) == (100, 0, 0, 1)
    assert test.log_loss == (0, 0, 0)


def test_gained_and_lost_are_of_the_run() -> None:
    run, reference = np.array([1, 1, 1, 0, 0], bool), np.array([0, 0, 1, 1, 0], bool)
    losses = np.array([0.1, 0.2, 0.3, 0.9, 1.0]), np.array([1.1, 1.2, 0.3, 0.2, 1.0])
    test = paired_test(run, reference, *losses)
    assert (test.gained, test.lost) == (2, 1)
    assert test.accuracy.value == pytest.approx(0.2)
    assert test.log_loss.value == pytest.approx((-1 - 1 + 0.7) / 5)
    assert isinstance(test.log_loss, Interval)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def draw_answers(n: int, num_classes: int, temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and log probabilities that are calibrated at temperature 1, too sure below."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, n)
    logits = random.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1.5
    scaled = 1.5 * logits / temperature
    return labels, scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


def test_the_mean_auc_is_scikit_learns() -> None:
    labels, log_probs = draw_answers(300, 4, 1.0, 0)
    expected = roc_auc_score(labels, np.exp(log_probs), multi_class="ovr")
    interval = roc_auc_interval(labels, log_probs)
    assert interval.value == pytest.approx(roc_auc_score(np.eye(4)[labels], log_probs))
    assert roc_auc_interval(labels, np.exp(log_probs)).value == pytest.approx(expected)
    assert interval.low < interval.value < interval.high
    assert isnan(roc_auc_interval(labels, np.eye(4)[labels]).low)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_intervals_of_auc_f1_and_calibration_error_hold_the_truth_as_often_as_they_claim(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(significance, "RESAMPLES", 150)
    labels, log_probs = draw_answers(300_000, 3, temperature, 10**6)
    truth = (
        float(np.mean([binary(labels == c, log_probs[:, c]).value for c in range(3)])),
        f1_score(labels, log_probs.argmax(axis=1), average="macro"),
        calibration_error(log_probs.max(axis=1), log_probs.argmax(axis=1) == labels),
    )
    tries, held = 100, np.zeros(3)
    for seed in range(tries):
        labels, log_probs = draw_answers(250, 3, temperature, seed)
        intervals = (
            roc_auc_interval(labels, log_probs),
            f1_intervals(labels, log_probs.argmax(axis=1), 3)[-1],
            ece_interval(np.exp(log_probs.max(axis=1)), log_probs.argmax(axis=1) == labels),
        )
        held += [each.low <= value <= each.high for each, value in zip(intervals, truth, strict=True)]
    assert (held / tries >= 0.87).all(), held


def test_f1_is_scikit_learns_and_a_class_without_variation_has_no_interval() -> None:
    labels, log_probs = draw_answers(300, 4, 1.0, 0)
    predicted = log_probs.argmax(axis=1)
    predicted[labels == 0], predicted[labels != 0] = 0, np.maximum(1, predicted[labels != 0])
    *classes, mean = f1_intervals(labels, predicted, 5)  # a fifth that is not there
    expected = f1_score(labels, predicted, labels=range(5), average=None, zero_division=0.0)
    assert [interval.value for interval in classes] == pytest.approx(list(expected))
    assert mean.value == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert [isnan(interval.low) for interval in classes] == [True, False, False, False, True]


def test_f1_of_many_small_classes_is_in_its_interval() -> None:
    """Each resample lacks some of their images, so that its mean is lower."""
    labels = np.arange(1000) % 200
    predicted = np.where(np.random.default_rng(0).random(1000) < 0.8, labels, (labels + 1) % 200)
    mean = f1_intervals(labels, predicted, 200)[-1]
    assert mean.low < mean.value < mean.high
