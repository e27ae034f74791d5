"""`model.push_to_hub(...)` and `Model.from_pretrained(...)`, under the names that huggingface_hub gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

import zoo
from zoo.errors import ConfigError

Model = TypeVar("Model", bound="ZooModelHubMixin")


class ZooModelHubMixin:
    """Saving, publishing and opening for a class of models: `class MyNet(ZooModelHubMixin, nn.Module)`.

    What it writes and reads is the zoo's (and timm's) layout, so that `zoo.create_model("hf-hub:owner/name")` opens it;
    the models must be made by `zoo.create_model`.
    """

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Path:
        """Write the model to a folder: `zoo.save_pretrained`, whose options and errors these are."""
        return zoo.save_pretrained(_module(self), save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> zoo.publishing.Publication:
        """Publish the model: `zoo.publish`, whose options (`private`, `create_pr` ...) and errors these are."""
        return zoo.publish(_module(self), repo_id, **options)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        force_download: bool = False,
        **options: Any,
    ) -> Model:
        """The model of a folder or of a repository on the Hub, with its weights.

        The options are those of `zoo.create_model`; `force_download` asks whether what is cached is current. Raises
        ConfigError where it is a model of another class, and what `zoo.create_model` raises.
        """
        source = str(pretrained_model_name_or_path)
        if ":" not in source:
            is_folder = isinstance(pretrained_model_name_or_path, Path) or Path(source).expanduser().is_dir()
            source = f"local-dir:{source}" if is_folder else f"hf-hub:{source}"
        if revision is not None and source.startswith("local-dir:"):
            raise ConfigError(
                f"A folder has no revisions: {source.removeprefix('local-dir:')!r} is opened without one."
            )
        if revision is not None:
            source += f"@{revision}"
        model = zoo.create_model(source, refresh=force_download, **options)
        if not isinstance(model, cls):
            raise ConfigError(f"{source} holds a {type(model).__name__}, not a {cls.__name__}.")
        return model


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{type(model).__name__} is no torch.nn.Module: it should inherit from that, too.")
    return model
