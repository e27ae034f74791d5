"""FBNetV3: architecture and training recipe searched together.

Dai et al., "FBNetV3: Joint Architecture-Recipe Search using Predictor Pretraining", CVPR 2021, arXiv 2006.02049.

What makes them compact: inverted residuals with squeeze-and-excitation whose widths, depths, kernels and expansions
were searched jointly with the recipe that trains them.

The model is timm's `MobileNetV3`, which timm builds as `fbnetv3_b`, `fbnetv3_d` and `fbnetv3_g` and trained itself.
Here are also a, c, e and f, and the authors' weights for all seven. The authors pad some strided convolutions less
than timm does: `published_padding` is how many pixels, by stage, and comes with the authors' weights.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import mobilenetv3
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean
from zoo.layers.from_timm import timm_weights
from zoo.registry import Entry, Paper, Weights, register

PAPER = Paper(
    title="FBNetV3: Joint Architecture-Recipe Search using Predictor Pretraining",
    authors="Dai, Wan, Zhang, Wu, He, Wei, Chen, Tian, Yu, Vajda, Gonzalez",
    venue="CVPR 2021",
    arxiv="2006.02049",
)
POOLS = ("avg", "max", "avgmax", "")
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
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        blocks: the stages, in the notation of timm's `decode_arch_def`.
        stem_size: width of the first convolution.
        head_size: width of the layer before the classifier.
        published_padding: pairs of (stage, pixels): how many pixels pad the first depthwise convolution of that stage,
            where that is not half its kernel.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth.

    Raises ConfigError for stages that the notation does not have, and for a padding or pooling that cannot be.
    """
    if global_pool not in POOLS:
        near = did_you_mean(str(global_pool), POOLS)
        raise ConfigError(f'There is no global_pool {global_pool!r}.{near} There are: "avg", "max", "avgmax", "".')
    parts: Any = mobilenetv3  # timm's builder and its parts
    round_channels = partial(parts.round_channels, round_limit=0.95)
    try:
        stages = parts.decode_arch_def([[stage] if isinstance(stage, str) else list(stage) for stage in blocks])
        if not stages or not all(stages):
            raise ValueError("there is an empty stage, or none")
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"blocks={blocks!r} cannot be read ({error!r}): a stage is a sequence of lines such as "
            '"ir_r3_k5_s1_e2_c24_se0.25" (block, repeats, kernel, stride, expansion, channels).'
        ) from error
    for pair in published_padding:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(number) is int for number in pair)
        if not whole or not (0 <= pair[0] < len(stages) and pair[1] >= 0):
            raise ConfigError(
                f"published_padding has {pair!r}: it takes pairs of a stage, 0 to {len(stages) - 1}, and how many "
                "pixels pad its first depthwise convolution, such as (3, 1)."
            )
    model = parts.MobileNetV3(
        stages,
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
        if not hasattr(model.blocks[stage][0], "conv_dw"):
            raise ConfigError(f"published_padding names stage {stage}, which has no depthwise convolution to pad.")
        model.blocks[stage][0].conv_dw.padding = (pixels, pixels)
    return model


# ---------------------------------------------------------------------------------------------------------- checkpoints


STEM = "backbone.stages.xif0_0"
STAGE = re.compile(r"backbone\.stages\.xif(\d)_(\d+)\.(.+)")
SQUEEZE = {"se.se.0.conv": "se.conv_reduce", "se.se.1": "se.conv_expand"}
EXPANDED = {"pw.conv": "conv_pw", "pw.bn": "bn1", "dw.conv": "conv_dw", "dw.bn": "bn2"} | SQUEEZE
EXPANDED |= {"pwl.conv": "conv_pwl", "pwl.bn": "bn3"}
SEPARABLE = {"dw.conv": "conv_dw", "dw.bn": "bn1", "pwl.conv": "conv_pw", "pwl.bn": "bn2"} | SQUEEZE
LAST = {"pw.conv": "blocks.6.0.conv", "pw.bn": "blocks.6.0.bn1", "pwl.conv": "conv_head"}


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of mobile_cv in timm's layout.

    The stem's convolution has a bias before its batch norm there, which that norm's mean takes in here.
    """
    if f"{STEM}.conv.weight" not in state_dict:
        return state_dict
    tensors = dict(state_dict)
    if (bias := tensors.pop(f"{STEM}.conv.bias", None)) is not None:
        tensors[f"{STEM}.bn.running_mean"] = tensors[f"{STEM}.bn.running_mean"] - bias
    places = [match for match in map(STAGE.fullmatch, tensors) if match]
    expanded = {(match[1], match[2]) for match in places if match[3].startswith("pw.")}
    # the authors count timm's fourth and fifth stage as one: squeeze-and-excitation begins with the fifth
    squeezed = [int(match[2]) for match in places if match[1] == "4" and match[3].startswith("se.")]
    converted = {}
    for key, tensor in tensors.items():
        converted[_rename(key, expanded, min(squeezed, default=0))] = tensor
    if "classifier.weight" in converted:
        converted["classifier.weight"] = converted["classifier.weight"].flatten(1)  # a 1x1 convolution there
    for key in [key for key in converted if key.endswith(".running_mean")]:  # the counters are not published
        converted.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.zeros((), dtype=torch.int64))
    return converted


def _rename(key: str, expanded: set[tuple[str, str]], fifth: int) -> str:
    """timm's name of one tensor; `fifth` is the number, in the authors' fourth stage, of timm's fifth's first block."""
    key = re.sub(r"^head\.conv\.", "classifier.", key)
    match = STAGE.fullmatch(key)
    if match is None:
        return key
    part, _, leaf = match[3].rpartition(".")
    stage, block = int(match[1]), int(match[2])
    if stage == 0:
        return {"conv": "conv_stem", "bn": "bn1"}.get(part, f"{STEM}.{part}") + f".{leaf}"
    if stage == 6:
        return f"{LAST.get(part, part)}.{leaf}"
    names = EXPANDED if (match[1], match[2]) in expanded else SEPARABLE
    ours = stage if stage == 5 else stage - 1
    if stage == 4 and block >= fifth:
        ours, block = 4, block - fifth
    return f"blocks.{ours}.{block}.{names.get(part, part)}.{leaf}"


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
