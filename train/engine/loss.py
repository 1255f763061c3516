"""The training loss: cross-entropy with label smoothing, class weights and a teacher, as set."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.classifier import Outputs

AUXILIARY_WEIGHT = 0.3  # arXiv 1409.4842, section 5


class Criterion(nn.Module):
    """Loss of each sample, float32 [N].

    With a teacher's logits, `share` of it is the divergence from the teacher's softened probabilities
    (arXiv 1503.02531).
    """

    weight: Tensor | None

    def __init__(
        self,
        label_smoothing: float,
        weight: list[float] | None = None,
        share: float = 0.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.label_smoothing, self.share, self.temperature = label_smoothing, share, temperature
        self.register_buffer("weight", None if weight is None else torch.tensor(weight))

    def forward(
        self, output: Tensor | Outputs, targets: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        """`targets` are probabilities; they and `teacher_logits` are float32 [N, num_classes]."""
        if isinstance(output, Outputs):
            loss: Tensor = self(output.logits, targets, teacher_logits)
            for auxiliary in output.auxiliary:
                loss = loss + AUXILIARY_WEIGHT * self(auxiliary, targets, teacher_logits)
            return loss
        loss = F.cross_entropy(
            output, targets, self.weight, reduction="none", label_smoothing=self.label_smoothing
        )
        if teacher_logits is None:
            return loss
        student, teacher = ((x / self.temperature).log_softmax(1) for x in (output, teacher_logits))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return (1 - self.share) * loss + self.share * self.temperature**2 * divergence
