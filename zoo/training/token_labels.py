"""Learning from labels of tokens: each token of the last map is classified, and held to what a teacher saw there.

Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv 2104.10858. The
teacher's maps are made beforehand (`zoo token-labels`, `zoo.data.token_labels`): it costs nothing while training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target, rand_bbox
from torch import Tensor, nn

from zoo.data.token_labels import token_labels
from zoo.data.transforms import LabelMaps
from zoo.errors import ConfigError
from zoo.training.learner import Learner

__all__ = ["TokenClassifier", "TokenLabeling", "TokenLearner", "draw_box"]


class TokenClassifier(Protocol):
    """What a model has that learns from labels of tokens."""

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens that it classifies in an image of `height` x `width`.

        Raises ConfigError where it classifies none.
        """

    def forward_tokens(self, x: Tensor, exchanged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the image, (B, num_classes), and of each token, row by row, (B, h * w, num_classes).

        Where `exchanged` (h, w), bool, is true, what the stem made of an image gives place to what it made of the
        mirrored one in the batch: i takes from B - 1 - i.
        """


class TokenLearner(Learner):
    """A `TokenClassifier` whose forward pass is `forward_tokens`: the one call that several processes share."""

    def forward(self, images: Tensor, exchanged: Tensor | None) -> tuple[Tensor, Tensor]:
        return cast(TokenClassifier, self.model).forward_tokens(images, exchanged)


class TokenLabeling:
    """The loss of an image's class and of its tokens' labels. `learner` is what is optimised, with `model` in it.

    `size` is the images' height and width; `criterion` compares logits (B, num_classes) with shares of classes of the
    same shape; `smoothing` is that of the image's class; `alpha` is that of MixToken, 0 for none. Raises ConfigError
    for a model that classifies no tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        num_classes: int,
        *,
        criterion: Callable[[Tensor, Tensor], Tensor],
        smoothing: float = 0.0,
        weight: float = 0.5,
        alpha: float = 0.0,
    ) -> None:
        if not (hasattr(model, "forward_tokens") and hasattr(model, "token_grid")):
            raise ConfigError(
                "data.token_labels needs a model that classifies its tokens, such as rmt_s_token_label: "
                f"{type(model).__name__} has no forward_tokens."
            )
        try:
            self.grid = cast(TokenClassifier, model).token_grid(*size)
        except ConfigError as error:
            raise ConfigError(f"data.token_labels: {error}") from None
        self.num_classes, self.criterion, self.smoothing = num_classes, criterion, smoothing
        self.weight, self.alpha = weight, alpha
        self.learner = TokenLearner(model)

    def loss(self, learner: nn.Module, images: Tensor, labels: Tensor, maps: LabelMaps, mix: bool = True) -> Tensor:
        """`criterion(image, label) + weight * (cross-entropy of the tokens, mean over them)` (section 3).

        For images (B, C, H, W), labels (B,) and maps, all on one device. With `mix`, MixToken exchanges a box: tokens
        and their labels alike, the label of the image in proportion to the box's area. The label of the image is its
        class, as the paper has it, and not what the teacher saw in the crop; it is smoothed, the tokens' are not.
        """
        exchanged = draw_box(self.grid, self.alpha) if mix and self.alpha else None
        own = 1.0 if exchanged is None else 1.0 - exchanged.float().mean().item()
        targets = token_labels(maps, self.num_classes, self.grid)
        if exchanged is not None:
            exchanged = exchanged.to(images.device, non_blocking=True)
            targets = targets.flip(0).where(exchanged[:, :, None], targets)
        image, tokens = learner(images, exchanged)
        of_tokens = F.cross_entropy(tokens.float().flatten(0, 1), targets.flatten(0, 2))
        label = mixup_target(labels, self.num_classes, own, self.smoothing)
        return self.criterion(image, label) + self.weight * of_tokens


def draw_box(grid: tuple[int, int], alpha: float) -> Tensor:
    """A box as CutMix draws it (arXiv 1905.04899): (h, w), bool, true inside. From NumPy's random numbers."""
    top, bottom, left, right = rand_bbox(grid, np.random.beta(alpha, alpha))
    box = torch.zeros(grid, dtype=torch.bool)
    box[top:bottom, left:right] = True
    return box
