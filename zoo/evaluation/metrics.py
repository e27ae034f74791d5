"""Sums from which the figures of a classifier follow."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.errors import DataError, ZooError

__all__ = ["CALIBRATION_BINS", "NOT_FINITE", "Counts"]

CALIBRATION_BINS = 15
NOT_FINITE = "The model's outputs are not finite (NaN or infinite): its weights are damaged."


class Counts:
    """Sums over batches from which accuracy, loss and calibration follow; they add up over processes.

    `confusion` is (C, C), true by predicted class. `calibration` is (15, 3): for each of 15 equally wide bins of the
    confidence, which is the greatest probability, the images in it, those answered rightly, and the sum of confidence.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        exact = torch.device("cpu") if device.type == "mps" else device  # where float64 is
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.in_top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=exact)
        self.calibration = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64, device=exact)
        self.first_damaged: str | None = None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits (B, num_classes); labels (B,), or (B, K) where images have up to K right answers, filled up with -1.

        Of several right answers, the loss takes the sum of their probabilities, and the confusion counts the one that
        was given, or the first where none was.
        """
        labels = labels[:, None] if labels.ndim == 1 else labels
        log_probabilities = logits.float().log_softmax(-1)
        answers = log_probabilities.gather(1, labels.clamp(min=0)).masked_fill(labels < 0, -math.inf)
        self.loss -= answers.to(self.loss).logsumexp(-1).sum()
        top = log_probabilities.topk(min(5, self.num_classes)).indices
        right = (top[:, :, None] == labels[:, None, :]).any(-1)  # (B, 5)
        self.in_top5 += right.any(-1).sum()
        truth = torch.where(right[:, 0], top[:, 0], labels[:, 0])
        pairs = truth * self.num_classes + top[:, 0]
        self.confusion.view(-1).index_add_(0, pairs, torch.ones_like(pairs))
        confidence = log_probabilities.gather(1, top[:, :1])[:, 0].exp().to(self.calibration)
        bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
        sums = torch.stack([torch.ones_like(confidence), right[:, 0].to(confidence), confidence], dim=1)
        self.calibration.index_add_(0, bins, sums)

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of the other processes to this one's: `add_up` returns the sum over processes of a tensor."""
        self.confusion, self.in_top5, self.loss, self.calibration = map(
            add_up, (self.confusion, self.in_top5, self.loss, self.calibration)
        )

    def metrics(self) -> dict[str, float]:
        """top1, top5 (where there are more than five classes) and loss. Raises ZooError when the loss is not finite."""
        images = int(self.confusion.sum())
        if images == 0:
            example = f" The first: {self.first_damaged}." if self.first_damaged else ""
            raise DataError(f"None of the images can be read.{example}")
        loss = float(self.loss) / images
        if not math.isfinite(loss):
            raise ZooError(NOT_FINITE)
        metrics = {"loss": loss, "top1": 100 * int(self.confusion.trace()) / images}
        return metrics | ({"top5": 100 * int(self.in_top5) / images} if self.num_classes > 5 else {})

    def calibration_error(self) -> float:
        """Expected calibration error in percent: how far confidence is from accuracy, over the bins, by their images.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, with 15 bins as there.
        """
        images, right, confidence = self.calibration.unbind(1)
        return 100 * float((right - confidence).abs().sum() / images.sum())
