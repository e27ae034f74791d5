"""What the tasks of images share: batches, evaluation by sums over them, checkpoints, and what was damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from zoo.data import DamageReport, EvaluationLoader, TrainingLoader
from zoo.errors import ConfigError, ZooError, first_line
from zoo.hub import save_pretrained
from zoo.units import shape_text

__all__ = ["ImageTask"]


class ImageTask:
    """A `zoo.training.loop.Task`, but for what it is called by and its loss.

    `sums` makes what `add_up` adds to, batch by batch: an object with `reduce` and `metrics`, as
    `zoo.evaluation.metrics.Counts`.
    """

    lower_is_better = False
    sums: Callable[[], Any]
    add_up: Callable[..., None]

    accelerator: Accelerator
    model: nn.Module
    classes: tuple[str, ...]
    train_loader: TrainingLoader
    eval_loader: EvaluationLoader
    damage: DamageReport
    memory_format: torch.memory_format

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        return self.train_loader.batches(epoch, start)

    def begin_update(self, batches: list[Any]) -> None:
        pass  # batches have as many images as each other

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        found = self.sums()
        self.add_up(
            model,
            self.eval_loader,
            found,
            device=self.accelerator.device,
            damage=self.damage,
            autocast=self.accelerator.autocast,
            memory_format=self.memory_format,
        )
        found.reduce(lambda tensor: self.accelerator.reduce(tensor, reduction="sum"))
        return found.metrics()

    def save(self, folder: Path) -> Path:
        return save_pretrained(self.model, folder, labels=list(self.classes))

    def state_dict(self) -> dict[str, Any]:
        return {}  # a batch of images follows from its number

    def load_state_dict(self, state: dict[str, Any], in_epoch: bool) -> None:
        pass

    def describe_speed(self, batches_per_second: float) -> str:
        images = batches_per_second * self.train_loader.batch_size * self.accelerator.num_processes
        return f"{images:,.0f} images/s" if images >= 10 else f"{images:.1f} images/s"

    def describe_data_problems(self) -> str:
        self.damage.names.update(dict.fromkeys(gather_object(list(self.damage.names))))
        return str(self.damage) if self.damage.names else ""

    def explain(self, error: Exception) -> ZooError | None:
        """Whether the model takes no images of this size, as where its windows do not divide them."""
        from zoo.profiling.flops import meta_twin

        cfg: Any = self.model.pretrained_cfg
        try:
            with torch.no_grad():
                meta_twin(self.model)(torch.empty(1, *cfg["input_size"], device="meta"))
        except Exception as refusal:
            if (type(refusal), first_line(refusal)) == (type(error), first_line(error)):
                kind, size = type(self.model).__name__, shape_text(cfg["input_size"])
                return ConfigError(f"{kind} takes no images of {size} (data.input_size): {first_line(error)}")
        return None
