"""VoVNet and VoVNetV2: one-shot aggregation.

Lee et al., "An Energy and GPU-Computation Efficient Backbone Network for Real-Time Object Detection", CVPR Workshops
2019, arXiv 1904.09730 (V1), and Lee and Park, "CenterMask: Real-Time Anchor-Free Instance Segmentation", CVPR 2020,
arXiv 1911.06667 (V2).

What makes them compact: a module keeps the outputs of its convolutions and concatenates them once, at its end, so
inputs do not grow from layer to layer as DenseNet's do, and memory is read less often.

The model is timm's `VovNet`. timm's entries (`vovnet39a`, `ese_vovnet39b` ...) stand as they are; where the authors'
published code computes something else, there is an entry of our own:

- V2 has effective squeeze-and-excitation in every module of the published code, in a stage's last one in timm's:
  `vovnetv2_39`, `vovnetv2_57`, `vovnetv2_99`. Networks with one module to a stage agree.
- V1 has an identity mapping in every module behind a stage's first, in the published code: `vovnet39`, `vovnet57` and
  `vovnet27_slim`.
- timm registers no `vovnetv2_19`.

The published files hold V2 without a classifier (trained for detection) and V1 with one. They lie on Dropbox, where a
person fetches them: `checkpoint_path` takes them in their own layout, V2's with `num_classes=0` or with the tag in the
name (`vovnetv2_39.youngwanlee_in1k`).
"""

import re
from typing import Any

from timm.layers import EffectiveSEModule
from timm.models.vovnet import OsaBlock
from torch import Tensor, nn

from zoo.layers.from_timm import timm_builder, timm_weights
from zoo.registry import Entry, Paper, Weights, register

V1_PAPER = Paper(
    title="An Energy and GPU-Computation Efficient Backbone Network for Real-Time Object Detection",
    authors="Lee, Hwang, Lee, Bae, Park",
    venue="CVPR Workshops 2019",
    arxiv="1904.09730",
)
V2_PAPER = Paper(
    title="CenterMask: Real-Time Anchor-Free Instance Segmentation",
    authors="Lee, Park",
    venue="CVPR 2020",
    arxiv="1911.06667",
)


def attend_everywhere(model: nn.Module) -> None:
    """Effective squeeze-and-excitation in every module that has none, as the published V2 code has it."""
    for block in model.modules():
        if isinstance(block, OsaBlock) and block.attn is None:
            block.attn = EffectiveSEModule(block.conv_concat.conv.out_channels)
            nn.init.kaiming_normal_(block.attn.fc.weight, mode="fan_out", nonlinearity="relu")  # as timm's others


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in timm's layout.

    Takes youngwanLEE/vovnet-detectron2's and stigma0617/VoVNet.pytorch's layouts, and timm's. A V2 file holds no
    classifier and, with frozen batch norms, no counters: those stay the model's own.
    """
    if not any(key.startswith("stem.stem_1/") for key in state_dict):
        return state_dict
    converted = {_rename(key): tensor for key, tensor in state_dict.items()}
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked") and key not in converted:
            converted[key] = tensor.new_zeros((), device="cpu")
    return converted


def _rename(key: str) -> str:
    key = re.sub(r"^stem\.stem_(\d+)/", lambda match: f"stem.{int(match[1]) - 1}.", key)
    key = re.sub(
        r"^stage(\d+)\.OSA\d+_(\d+)\.",
        lambda match: f"stages.{int(match[1]) - 2}.blocks.{int(match[2]) - 1}.",
        key,
    )
    key = re.sub(r"\.layers\.(\d+)\.OSA\w+/", r".conv_mid.\1.", key)
    key = re.sub(r"\.concat\.OSA\w+/", ".conv_concat.", key)
    key = re.sub(r"\.conv_reduction\.OSA\w+/", ".conv_reduction.", key)
    key = key.replace(".ese.fc.", ".attn.fc.")
    for theirs, ours in (("dw_conv3x3", "conv_dw"), ("pw_conv1x1", "conv_pw"), ("pw_norm", "bn"), ("norm", "bn")):
        key = re.sub(rf"\.{theirs}\.(?=[^.]+$)", f".{ours}.", key)
    return re.sub(r"^classifier\.", "head.fc.", key)


# ------------------------------------------------------------------------------------------------------------- variants

NO_CLASSIFIER = "The authors' ImageNet weights are of the backbone alone (num_classes=0): no accuracy is stated."


def _v1_weights(size: int, top1: float, top5: float) -> Weights:
    return Weights(
        tag="stigma0617_in1k",
        page="https://github.com/stigma0617/VoVNet.pytorch",
        license="unstated",
        top1=top1,
        top5=top5,
        accuracy_source="README of stigma0617/VoVNet.pytorch",
        note=f"vovnet{size}_torchvision.pth, on Dropbox. The authors state no licence for code and weights.",
    )


def _v2_weights(kind: str) -> Weights:
    return Weights(
        tag="youngwanlee_in1k",
        page="https://github.com/youngwanLEE/vovnet-detectron2",
        license="cc-by-nc-4.0",
        num_classes=0,
        note=f"vovnet{kind}_detectron2.pth, on Dropbox: a backbone for detectors, which prepare images as the "
        "configuration of the detector says, blue channel first; mean and std here are ImageNet's.",
    )


def _entry(name: str, timm_name: str, paper: Paper, top1: dict[str, float], note: str = "", **fixed: Any) -> None:
    adapt, published = fixed.pop("adapt", None), fixed.pop("weights", ())
    # by default a classifier, as timm's, though the authors' weights have none
    args = {"num_classes": 1000} if any(not weights.num_classes for weights in published) else {}
    facts: dict[str, Any] = {"compact": "The outputs of a module's convolutions are concatenated once, at its end."}
    facts |= {key: fixed.pop(key) for key in ("compact", "input_size") if key in fixed}
    v1 = paper is V1_PAPER
    register(
        Entry(
            name=name,
            build=timm_builder(timm_name, adapt=adapt, **fixed),
            family="vovnet",
            args=args,
            paper=paper,
            code_license="unstated" if v1 else "cc-by-nc-4.0",
            code_url=f"https://github.com/{'stigma0617/VoVNet.pytorch' if v1 else 'youngwanLEE/vovnet-detectron2'}",
            weights=(*timm_weights(name, top1), *published) if name == timm_name else published,
            convert=convert,
            first_conv="stem.0.conv",
            classifier="head.fc",
            note=note,
            **facts,
        )
    )


for name in ("vovnet39a", "vovnet57a"):
    _entry(name, name, V1_PAPER, {}, "timm's form, without the identity mappings that the published code has.")
for kind, top1 in (("slim_dw", {}), ("slim", {}), ("dw", {"ra_in1k": 76.828})):
    _entry(
        f"ese_vovnet19b_{kind}",
        f"ese_vovnet19b_{kind}",
        V2_PAPER,
        top1,
        f"Computes what the published code does. {NO_CLASSIFIER}",
        weights=(_v2_weights(f"19_ese_{kind}"),),
    )
for name, top1 in (
    ("ese_vovnet39b", {"ra_in1k": 79.312}),
    ("ese_vovnet57b", {"ra4_e3600_r256_in1k": 82.460}),
    ("ese_vovnet99b", {}),
    ("eca_vovnet39b", {}),
):
    _entry(name, name, V2_PAPER, top1, "timm's form, with attention in the last module of a stage alone.")

WIDE = {"stage_conv_chs": [128, 160, 192, 224], "stage_out_chs": [256, 512, 768, 1024]}
SLIM = {"stage_conv_chs": [64, 80, 96, 112], "stage_out_chs": [128, 256, 384, 512]}
_entry("vovnetv2_19", "ese_vovnet19b_slim", V2_PAPER, {}, NO_CLASSIFIER, weights=(_v2_weights("19_ese"),), **WIDE)
for size in (39, 57, 99):
    published = (_v2_weights(f"{size}_ese"),)
    _entry(
        f"vovnetv2_{size}",
        f"ese_vovnet{size}b",
        V2_PAPER,
        {},
        NO_CLASSIFIER,
        weights=published,
        adapt=attend_everywhere,
    )
_entry(
    "vovnet27_slim", "vovnet39a", V1_PAPER, {}, "No file is published.", residual=True, block_per_stage=[1] * 4, **SLIM
)
for size, *accuracy in ((39, 76.77, 93.43), (57, 77.73, 93.72)):
    published = (_v1_weights(size, *accuracy),)
    _entry(f"vovnet{size}", f"vovnet{size}a", V1_PAPER, {}, weights=published, residual=True)
_entry(
    "vovnet_test",
    "ese_vovnet19b_slim",
    V2_PAPER,
    {},
    compact="A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
    stem_chs=[16, 16, 32],
    stage_conv_chs=[16, 24, 32, 40],
    stage_out_chs=[32, 48, 64, 96],
)
