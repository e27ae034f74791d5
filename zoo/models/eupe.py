"""EUPE: small encoders of images for every kind of task, distilled from several large ones.

Zhu et al., "Efficient Universal Perception Encoder", arXiv 2603.22387 (2026).

What makes them compact: one small encoder takes the place of several large ones (for language, for dense prediction,
for self-supervised features), because a large proxy learns from all of them first and teaches the small one.

The models are timm's: its `Eva` with rotary positions (a ViT of 16x16 patches with a class token, four storage tokens
and LayerScale), and its `ConvNeXt`. They are encoders: there is no classifier, `num_classes` is 0 unless you ask for a
fresh one. As in the published code the ViT's output is the class token, where timm would average the patches.

Rotary angles are computed in float32 by the published code, in timm's own way by timm: in double precision the two
differ by about 1e-8. Training's random rescaling of the positions is left out, as timm leaves it out.

Code and weights are under the FAIR Noncommercial Research License: research that is not commercial, and whoever passes
weights on must do so under that licence.
"""

import re
from typing import Any, NamedTuple

from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from zoo.layers.from_timm import timm_builder
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["Tokens", "encode"]

LICENSE = "fair-noncommercial-research-license"
PAPER = Paper(
    title="Efficient Universal Perception Encoder",
    authors="Zhu, Suri, Jose, Oquab, Szafraniec, Wen, Xiong, Labatut, Bojanowski, Krishnamoorthi, Chandra",
    venue="arXiv 2026",
    arxiv="2603.22387",
)


class Tokens(NamedTuple):
    """What an encoder says of images, normalised. `storage` is empty, (B, 0, C), where a network has none."""

    class_token: Tensor  # (B, C)
    storage: Tensor  # (B, 4, C)
    patches: Tensor  # (B, H/r * W/r, C), row by row; r is 16 (ViT) or 32 (ConvNeXt)


def encode(model: nn.Module, images: Tensor) -> Tokens:
    """Class, storage and patch tokens of `images`, (B, 3, H, W), from a model of this family."""
    encoder: Any = model
    features = encoder.forward_features(images)
    if features.ndim == 3:
        storage = encoder.num_prefix_tokens - 1
        return Tokens(features[:, 0], features[:, 1 : 1 + storage], features[:, 1 + storage :])
    pooled = encoder.forward_head(features, pre_logits=True)
    patches = encoder.head.norm(features).flatten(2).transpose(1, 2)
    return Tokens(pooled, patches[:, :0], patches)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert_vit(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published layout in timm's: timm's own filter knows it. timm's passes as it is."""
    return checkpoint_filter_fn(state_dict, model) if "storage_tokens" in state_dict else state_dict


def convert_convnext(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published layout in timm's. The last norm lies in the file twice; heads of the distillation are left out."""
    if "downsample_layers.0.0.weight" not in state_dict:
        return state_dict
    converted = {}
    for key, tensor in state_dict.items():
        if key.startswith(("norms.", "projectors.")):
            continue
        key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
        key = re.sub(r"^downsample_layers\.(\d)\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
        key = key.replace(".dwconv.", ".conv_dw.").replace(".pwconv", ".mlp.fc")
        converted[re.sub(r"^norm\.", "head.norm.", key)] = tensor
    return converted


# ------------------------------------------------------------------------------------------------------------- variants


def adapt_vit(model: nn.Module) -> None:
    """Feature maps are asked of the model itself, and images of any size are taken, as the authors' code does both."""
    model.default_feature_cls = "getter"  # type: ignore[assignment]  # its blocks one after the other give no maps
    # timm's patches refuse sizes that are no multiple of 16; without a size, their convolution leaves the rest out
    model.patch_embed.img_size = None  # type: ignore[union-attr]


def _encoder(name: str, timm_name: str, convert: Any, **fields: Any) -> None:
    vit = convert is convert_vit
    facts: dict[str, Any] = {
        "compact": "One small encoder, distilled from a proxy that learned from several large ones.",
        "input_size": (3, 256, 256),
    }
    args = {"num_classes": 0, **({"global_pool": "token"} if vit else {}), **fields.pop("args", {})}
    register(
        Entry(
            name=name,
            build=timm_builder(timm_name, adapt=adapt_vit if vit else None),
            args=args,
            family="eupe",
            paper=PAPER,
            code_license=LICENSE,
            code_url="https://github.com/facebookresearch/EUPE",
            convert=convert,
            first_conv="patch_embed.proj" if vit else "stem.0",
            classifier="head" if vit else "head.fc",
            **(facts | fields),
        )
    )


def _entry(
    name: str, timm_name: str, hub: str, convert: Any, params: float, macs: float, note: str, results: str
) -> None:
    """Register one published encoder; `params` in millions and `macs` in billions, as the authors state them."""
    side = 256 // (16 if convert is convert_vit else 32)
    layout: dict[str, Any] = {
        "license": LICENSE,
        "dataset": "lvd-1689m",
        "num_classes": 0,
        "input_size": (3, 256, 256),
        "pool_size": (side, side),
        "crop_pct": 1.0,
    }
    claims = f"The authors' results with frozen features (arXiv 2603.22387): {results}."
    terms = "Noncommercial research only; whoever passes the weights on must do so under the same licence."
    _encoder(
        name,
        timm_name,
        convert,
        reported=Reported(
            params=round(params * 1e6), macs=round(macs * 1e9), input_size=(3, 256, 256), source="arXiv 2603.22387"
        ),
        weights=(
            Weights(tag="eupe_lvd1689m", hub_id=f"timm/{timm_name}.eupe_lvd1689m", note=f"{claims} {terms}", **layout),
            Weights(
                tag="meta_lvd1689m",
                hub_id=f"facebook/EUPE-{hub}",
                filename=f"EUPE-{hub}.pt",
                note=f"The authors' own file, with the preprocessing of their README. {claims} {terms}",
                **layout | {"crop_mode": "squash", "interpolation": "bilinear"},
            ),
        ),
        note=note,
    )


VIT_NOTE = "The authors' figure for the ViTs is FLOPs, two to a MAC; theirs also count the key biases, which are zero."
CONVNEXT_NOTE = "The authors count the classifier that ConvNeXt has on ImageNet; the encoder has none."
# the paper's "GFLOPs" at 256x256; ImageNet-1k by nearest neighbours and zero-shot (%), ADE20k by a linear layer (mIoU)
for letter, size, params, flops, *results in (
    ("t", "tiny", 6, 4, 66.3, 50.5, 36.7),
    ("s", "small", 21, 12, 78.2, 69.8, 46.6),
    ("b", "base", 86, 47, 84.1, 79.7, 52.4),
):
    timm_name = f"vit_{size}_patch16_dinov3_qkvb"
    knn, zero_shot, miou = results
    claims = f"ImageNet-1k top-1 {knn}% by nearest neighbours and {zero_shot}% zero-shot, ADE20k mIoU {miou}%"
    _entry(f"eupe_vit{letter}16", timm_name, f"ViT-{letter.upper()}", convert_vit, params, flops / 2, VIT_NOTE, claims)
for size, params, macs, miou in (("tiny", 29, 5, 43.5), ("small", 50, 11, 46.8), ("base", 89, 20, 48.9)):
    hub, claims = f"ConvNeXt-{size[0].upper()}", f"ADE20k mIoU {miou}%"
    _entry(f"eupe_convnext_{size}", f"convnext_{size}", hub, convert_convnext, params, macs, CONVNEXT_NOTE, claims)
_encoder(
    "eupe_test",
    "vit_tiny_patch16_dinov3_qkvb",
    convert_vit,
    args={"embed_dim": 64, "depth": 4, "num_heads": 2},
    compact="A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
    pool_size=(4, 4),
)
