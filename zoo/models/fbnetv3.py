"""FBNetV3: architecture and training recipe searched together.

Dai et al., "FBNetV3: Joint Architecture-Recipe Search using Predictor Pretraining", CVPR 2021, arXiv 2006.02049.

What makes them compact: inverted residuals with squeeze-and-excitation whose widths, depths, kernels and expansions
were searched jointly with the recipe that trains them.

The model is timm's `MobileNetV3`, which timm builds as `fbnetv3_b`, `fbnetv3_d` and `fbnetv3_g` and trained itself.
Here are also a, c, e and f, and the authors' weights for all seven. The authors pad some strided convolutions less
than timm does: `published_padding` is how many pixels, by stage, and comes with the authors' weights.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import mobilenetv3
from torch import Tensor, nn

from zoo.layers.from_timm import timm_weights
from zoo.registry import Entry, Paper, Weights, register

PAPER = Paper(
    title="FBNetV3: Joint Architecture-Recipe Search using Predictor Pretraining",
    authors="Dai, Wan, Zhang, Wu, He, Wei, Chen, Tian, Yu, Vajda, Gonzalez",
    venue="CVPR 2021",
    arxiv="2006.02049",
)
CLASSIFIER = ("classifier.weight", "classifier.bias")
AUTHORS = "model_info_fbnet_v3.json of facebookresearch/mobile-vision"

# stage by stage in timm's notation: block, repeats, kernel, stride, expansion, channels, squeeze-and-excitation
SMALL = (
    ("ds_r2_k3_s1_e1_c16",),
    ("ir_r1_k5_s2_e4_c24", "ir_r3_k5_s1_e2_c24"),
    ("ir_r1_k5_s2_e5_c40_se0.25", "ir_r4_k5_s1_e3_c40_se0.25"),
    ("ir_r1_k5_s2_e5_c72", "ir_r4_k3_s1_e3_c72"),
    ("ir_r1_k3_s1_e5_c120_se0.25", "ir_r5_k5_s1_e3_c120_se0.25"),
    ("ir_r1_k3_s2_e6_c184_se0.25", "ir_r5_k5_s1_e4_c184_se0.25", "ir_r1_k5_s1_e6_c224_se0.25"),
    ("cn_r1_k1_s1_c1344",),
)
BLOCKS = {
    "a": SMALL,
    "b": SMALL,
    "c": (
        ("ds_r2_k3_s1_e1_c16",),
        ("ir_r1_k5_s2_e5_c24", "ir_r4_k3_s1_e3_c24"),
        ("ir_r1_k5_s2_e5_c48_se0.25", "ir_r4_k5_s1_e2_c48_se0.25"),
        ("ir_r1_k5_s2_e4_c88", "ir_r4_k3_s1_e3_c88"),
        ("ir_r1_k3_s1_e4_c120_se0.25", "ir_r5_k5_s1_e3_c120_se0.25"),
        ("ir_r1_k5_s2_e5_c216_se0.25", "ir_r5_k5_s1_e5_c216_se0.25", "ir_r1_k5_s1_e6_c216_se0.25"),
        ("cn_r1_k1_s1_c1296",),
    ),
    "d": (
        ("ds_r2_k3_s1_e1_c16",),
        ("ir_r1_k3_s2_e5_c24", "ir_r5_k3_s1_e2_c24"),
        ("ir_r1_k5_s2_e4_c40_se0.25", "ir_r4_k3_s1_e3_c40_se0.25"),
        ("ir_r1_k3_s2_e5_c72", "ir_r4_k3_s1_e3_c72"),
        ("ir_r1_k3_s1_e5_c128_se0.25", "ir_r6_k5_s1_e3_c128_se0.25"),
        ("ir_r1_k3_s2_e6_c208_se0.25", "ir_r5_k5_s1_e5_c208_se0.25", "ir_r1_k5_s1_e6_c240_se0.25"),
        ("cn_r1_k1_s1_c1440",),
    ),
    "e": (
        ("ds_r3_k3_s1_e1_c16",),
        ("ir_r1_k5_s2_e4_c24", "ir_r4_k5_s1_e2_c24"),
        ("ir_r1_k5_s2_e4_c48_se0.25", "ir_r4_k5_s1_e3_c48_se0.25"),
        ("ir_r1_k5_s2_e5_c80", "ir_r4_k3_s1_e3_c80"),
        ("ir_r1_k3_s1_e5_c128_se0.25", "ir_r7_k5_s1_e3_c128_se0.25"),
        ("ir_r1_k3_s2_e6_c216_se0.25", "ir_r5_k5_s1_e5_c216_se0.25", "ir_r1_k5_s1_e6_c240_se0.25"),
        ("cn_r1_k1_s1_c1440",),
    ),
    "f": (
        ("ds_r3_k3_s1_e1_c24",),
        ("ir_r1_k5_s2_e4_c32", "ir_r4_k5_s1_e2_c32"),
        ("ir_r1_k5_s2_e4_c56_se0.25", "ir_r4_k5_s1_e3_c56_se0.25"),
        ("ir_r1_k5_s2_e5_c88", "ir_r4_k3_s1_e3_c88"),
        ("ir_r1_k3_s1_e5_c144_se0.25", "ir_r8_k5_s1_e3_c144_se0.25"),
        ("ir_r1_k3_s2_e6_c248_se0.25", "ir_r6_k5_s1_e5_c248_se0.25", "ir_r1_k5_s1_e6_c272_se0.25"),
        ("cn_r1_k1_s1_c1632",),
    ),
    "g": (
        ("ds_r3_k3_s1_e1_c24",),
        ("ir_r1_k5_s2_e4_c40", "ir_r4_k5_s1_e2_c40"),
        ("ir_r1_k5_s2_e4_c56_se0.25", "ir_r4_k5_s1_e3_c56_se0.25"),
        ("ir_r1_k5_s2_e5_c104", "ir_r4_k3_s1_e3_c104"),
        ("ir_r1_k3_s1_e5_c160_se0.25", "ir_r8_k5_s1_e3_c160_se0.25"),
        ("ir_r1_k3_s2_e6_c264_se0.25", "ir_r6_k5_s1_e5_c264_se0.25", "ir_r2_k5_s1_e6_c288_se0.25"),
        ("cn_r1_k1_s1_c1728",),
    ),
}


def fbnetv3(
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    *,
    blocks: Sequence[Sequence[str]] = SMALL,
    stem_size: int = 16,
    head_size: int = 1984,
    published_padding: Sequence[Sequence[int]] = (),
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """(B, in_chans, H, W) -> (B, num_classes)

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", or "" for none (only without a classifier).
        blocks: the stages, in the notation of timm's `decode_arch_def`.
        stem_size: width of the first convolution.
        head_size: width of the layer before the classifier.
        published_padding: pairs of (stage, pixels): how many pixels pad the first depthwise convolution of that stage,
            where that is not half its kernel.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth.
    """
    parts: Any = mobilenetv3  # timm's builder and its parts
    round_channels = partial(parts.round_channels, round_limit=0.95)
    model = parts.MobileNetV3(
        parts.decode_arch_def([list(stage) for stage in blocks]),
        num_classes=num_classes,
        in_chans=in_chans,
        stem_size=stem_size,
        num_features=head_size,
        head_bias=False,
        act_layer=parts.resolve_act_layer({}, "hard_swish"),
        norm_layer=nn.BatchNorm2d,
        se_layer=partial(parts.SqueezeExcite, gate_layer="hard_sigmoid", rd_round_fn=round_channels),
        se_from_exp=False,
        round_chs_fn=round_channels,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        global_pool=global_pool,
    )
    for stage, pixels in published_padding:
        model.blocks[stage][0].conv_dw.padding = (pixels, pixels)
    return model


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of mobile_cv in timm's layout: the two hold the same tensors in the same order.

    The stem's convolution has a bias before its batch norm there, which that norm's mean takes in here.
    """
    stem = "backbone.stages.xif0_0"
    if f"{stem}.conv.weight" not in state_dict:
        return state_dict
    tensors = {key: tensor for key, tensor in state_dict.items() if not key.endswith("num_batches_tracked")}
    if (bias := tensors.pop(f"{stem}.conv.bias", None)) is not None:
        tensors[f"{stem}.bn.running_mean"] = tensors[f"{stem}.bn.running_mean"] - bias
    own = model.state_dict()
    places = [key for key in own if not key.endswith("num_batches_tracked") and not key.startswith("classifier.")]
    if len(places) + len(CLASSIFIER) != len(tensors):
        return state_dict  # another network: the names that do not fit say so
    named = dict(zip((*places, *CLASSIFIER), tensors.values(), strict=True))
    named["classifier.weight"] = named["classifier.weight"].flatten(1)  # a 1x1 convolution there
    counters = [key for key in own if key.endswith("num_batches_tracked")]
    return named | {key: torch.zeros((), dtype=torch.int64) for key in counters}


# ------------------------------------------------------------------------------------------------------------- variants


def _entry(name: str, args: dict[str, Any], **fields: Any) -> None:
    facts: dict[str, Any] = {
        "compact": "Inverted residuals with squeeze-and-excitation, searched together with their training recipe."
    }
    register(
        Entry(
            name=name,
            build=fbnetv3,
            family="fbnetv3",
            args=args,
            paper=PAPER,
            code_license="cc-by-nc-4.0",
            code_url="https://github.com/facebookresearch/mobile-vision",
            convert=convert,
            first_conv="conv_stem",
            classifier="classifier",
            **(facts | fields),
        )
    )


# variant: stem, padding of the authors, their job, size, resize, MACs (M) at that size, top-1, top-5 (%)
for variant, stem_size, padding, job, size, resize, macs, top1, top5 in (
    ("a", 16, ((3, 1), (5, 0)), "f235707940", 224, 242, 356.60, 79.574, 94.712),
    ("b", 16, ((3, 1), (5, 0)), "f233607847", 248, 266, 461.55, 80.206, 94.944),
    ("c", 16, ((3, 1), (5, 1)), "f234529537", 248, 272, 556.97, 80.826, 95.286),
    ("d", 24, (), "f231225742", 248, 277, 644.42, 81.042, 95.436),
    ("e", 24, ((3, 1),), "f230158956", 264, 291, 762.05, 81.254, 95.488),
    ("f", 24, ((5, 0),), "f230161092", 272, 296, 1181.64, 82.062, 95.874),
    ("g", 32, (), "f226438997", 320, 325, 2129.66, 82.794, 96.300),
):
    name = f"fbnetv3_{variant}"
    timms = (
        timm_weights(name, {"ra2_in1k": {"b": 78.184, "d": 78.658, "g": 81.246}[variant]}) if variant in "bdg" else ()
    )
    side = -(-size // 32) - bool(padding)
    published = Weights(
        tag="meta_in1k",
        url=f"https://dl.fbaipublicfiles.com/fbnet/models/20201201/GtOtfw/FBNetV3_{variant.upper()}_{job}/model.pth",
        license="cc-by-nc-4.0",
        top1=top1,
        top5=top5,
        accuracy_source=AUTHORS,
        input_size=(3, size, size),
        pool_size=(side, side),
        crop_pct=size / resize,
        interpolation="bilinear",
        args={"published_padding": padding} if timms and padding else {},
        note="Noncommercial: code and weights are under CC BY-NC 4.0.",
    )
    args: dict[str, Any] = {"blocks": BLOCKS[variant], "stem_size": stem_size}
    _entry(
        name,
        args if timms else {**args, "published_padding": padding},
        weights=(*timms, published),
        input_size=(timms or (published,))[0].input_size,
        note=(
            f"The authors state {macs:g}M MACs at {size}x{size}, counting more than convolutions and linear layers."
            + (" timm's weights pad two convolutions more than the authors' do." if timms and padding else "")
        ),
    )
_entry(
    "fbnetv3_test",
    {
        "blocks": (
            ("ds_r1_k3_s1_e1_c8",),
            ("ir_r1_k5_s2_e4_c16",),
            ("ir_r1_k5_s2_e4_c24_se0.25",),
            ("ir_r1_k5_s2_e4_c32",),
            ("ir_r1_k3_s1_e4_c40_se0.25",),
            ("ir_r1_k5_s2_e4_c48_se0.25",),
            ("cn_r1_k1_s1_c96",),
        ),
        "head_size": 128,
    },
    compact="A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
)
