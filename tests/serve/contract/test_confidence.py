"""The share of answers above the threshold estimates how many are right, with an interval that holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.contract.confidence import (
    MIN_IMAGES,
    Threshold,
    estimate_accuracy,
    fit_threshold,
    wilson_interval,
)


def answers(n: int, seed: int, sureness: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated answers: each is right with its own probability; lower ones with a lower `sureness`."""
    random = np.random.default_rng(seed)
    probabilities = 1 - 0.5 * random.beta(0.5, 4 - sureness, n)
    return probabilities.astype(np.float32), random.random(n) < probabilities


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1.0, width=32, allow_subnormal=False), st.booleans()),
        min_size=1,
        max_size=60,
        unique_by=lambda answer: answer[0],
    )
)
@settings(max_examples=100, deadline=None)
def test_as_many_validation_answers_lie_above_the_threshold_as_are_right(
    pairs: list[tuple[float, bool]],
) -> None:
    probabilities, right = (np.array(column) for column in zip(*pairs, strict=True))
    threshold = fit_threshold(probabilities.astype(np.float32), right)
    assert (threshold.num_images, threshold.right) == (len(pairs), right.sum())
    assert threshold.above == (probabilities > threshold.probability).sum()
    assert threshold.disagreed == ((probabilities > threshold.probability) != right).sum()
    if probabilities.min() > 1e-30:
        assert threshold.above == threshold.right


def test_equal_probabilities_stay_on_one_side_and_the_estimate_allows_for_it() -> None:
    right = np.arange(1000) < 900
    threshold = fit_threshold(np.ones(1000, np.float32), right)
    assert (threshold.right, threshold.above) == (900, 1000)
    found = estimate_accuracy(1000, 1000, threshold)
    assert found is not None
    assert found.accuracy == pytest.approx(0.9)
    assert not found.differs


def test_of_few_images_there_is_no_estimate() -> None:
    threshold = fit_threshold(*answers(1000, 0))
    assert estimate_accuracy(MIN_IMAGES - 1, MIN_IMAGES - 1, threshold) is None
    assert estimate_accuracy(MIN_IMAGES, MIN_IMAGES, threshold) is not None


@pytest.mark.parametrize(("validation", "job"), [(200, 200), (2000, 5000), (5000, 200)])
def test_the_interval_holds_the_accuracy_of_calibrated_answers(validation: int, job: int) -> None:
    """In 95 of 100 jobs: of 300, in 90 of 100 at least. The warning comes in 1 of 100: in 3 at most."""
    held = warned = 0
    for seed in range(300):
        threshold = fit_threshold(*answers(validation, 2 * seed))
        probabilities, right = answers(job, 2 * seed + 1)
        found = estimate_accuracy(int((probabilities > threshold.probability).sum()), job, threshold)
        assert found is not None
        assert 0 <= found.low <= found.accuracy <= found.high <= 1
        held += found.low <= right.mean() <= found.high
        warned += found.differs
    assert held >= 270
    assert warned <= 9


def test_less_sure_answers_lower_the_estimate_and_cause_a_warning() -> None:
    threshold = fit_threshold(*answers(2000, 0))
    probabilities, _ = answers(2000, 1, sureness=3.0)
    found = estimate_accuracy(int((probabilities > threshold.probability).sum()), 2000, threshold)
    assert found is not None
    assert found.differs
    assert found.accuracy < threshold.accuracy - 0.05


def test_a_perfect_validation_set_is_not_proof_of_perfect_answers() -> None:
    threshold = fit_threshold(np.linspace(0.9, 1, 50).astype(np.float32), np.ones(50, bool))
    assert (threshold.above, threshold.disagreed) == (50, 0)
    found = estimate_accuracy(1000, 1000, threshold)
    assert found is not None
    assert found.accuracy == 1
    assert found.low < 0.97


def test_wilsons_interval() -> None:
    low, high = wilson_interval(0.9, 100, 1.959964)  # as scipy.stats.binomtest(90, 100) has it
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert wilson_interval(1.0, 10, 1.96)[1] == 1.0


@pytest.mark.parametrize(
    "changes", [{"num_images": 0}, {"right": -1}, {"probability": 2.0}, {"above": 1.5}]
)
def test_no_threshold_of_impossible_values(changes: dict[str, float]) -> None:
    values = {"probability": 0.5, "num_images": 10, "right": 9, "above": 9, "disagreed": 2}
    Threshold(**values)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Threshold(**(values | changes))  # type: ignore[arg-type]
