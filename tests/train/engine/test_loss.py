"""The criterion is torch's cross-entropy, with a teacher's and auxiliary heads' shares added."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.engine.loss import AUXILIARY_WEIGHT, Criterion
from train.models.classifier import Outputs


def example(n: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=generator), torch.randint(
        0, classes, (n,), generator=generator
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_criterion_is_torchs_cross_entropy(smoothing: float) -> None:
    logits, labels = example()
    losses = Criterion(smoothing, None)(logits, F.one_hot(labels, 3).float())
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(losses, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_torchs(smoothing: float) -> None:
    logits, labels = example()
    weight = [0.5, 1.0, 3.0]
    losses = Criterion(smoothing, weight)(logits, F.one_hot(labels, 3).float())
    expected = F.cross_entropy(
        logits, labels, torch.tensor(weight), reduction="none", label_smoothing=smoothing
    )
    assert torch.allclose(losses, expected)


def test_soft_targets_are_a_mixture_of_losses() -> None:
    logits, labels = example()
    other = (labels + 1) % 3
    targets = 0.3 * F.one_hot(labels, 3) + 0.7 * F.one_hot(other, 3)
    expected = 0.3 * F.cross_entropy(logits, labels, reduction="none")
    expected += 0.7 * F.cross_entropy(logits, other, reduction="none")
    assert torch.allclose(Criterion(0.0, None)(logits, targets), expected)


@pytest.mark.parametrize("teacher_logits", [None, torch.eye(5, 3)], ids=["labels", "teacher"])
def test_auxiliary_heads_add_their_share(teacher_logits: Tensor | None) -> None:
    logits, labels = example()
    targets = F.one_hot(labels, 3).float()
    criterion = Criterion(0.1, None, share=0.5)
    losses = criterion(Outputs(logits, (2 * logits, -logits)), targets, teacher_logits)
    extra = criterion(2 * logits, targets, teacher_logits) + criterion(-logits, targets, teacher_logits)
    assert torch.allclose(losses, criterion(logits, targets, teacher_logits) + AUXILIARY_WEIGHT * extra)


def test_the_teachers_share_of_the_loss_is_the_divergence_of_softened_answers() -> None:
    logits, labels = example()
    teacher_logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    targets = F.one_hot(labels, 3).float()
    losses = Criterion(0.0, None, share=0.25, temperature=2.0)(logits, targets, teacher_logits)
    p, q = (teacher_logits / 2).softmax(1), (logits / 2).softmax(1)
    expected = 0.75 * F.cross_entropy(logits, labels, reduction="none")
    expected += 0.25 * 4 * (p * (p / q).log()).sum(1)
    assert torch.allclose(losses, expected, atol=1e-6)
    whole = Criterion(0.0, None, share=1.0)
    assert torch.allclose(whole(logits, targets, logits), torch.zeros(5), atol=1e-6)
    assert whole(logits, targets).mean() > 0, "validation has no teacher"
