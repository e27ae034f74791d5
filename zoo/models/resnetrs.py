"""ResNet-RS: ResNets retrained and rescaled.

Bello et al., "Revisiting ResNets: Improved Training and Scaling Strategies", NeurIPS 2021, arXiv 2103.07579.

What makes them compact: training and scaling, not the architecture, carry most of what later networks gained, and
ResNets scaled by depth and image size (rather than width) are faster than EfficientNets of equal accuracy.

The model is timm's `ResNet`, which has the deep stem, the convolution in place of max pooling, the average-pooled
shortcuts and the squeeze-and-excitation of the paper's section 3; the weights are the authors', as timm ported them.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.errors import ConfigError
from zoo.layers.from_timm import timm_builder, timm_weights
from zoo.registry import Entry, Paper, register

PAPER = Paper(
    title="Revisiting ResNets: Improved Training and Scaling Strategies",
    authors="Bello, Fedus, Du, Cubuk, Srinivas, Lin, Shlens, Zoph",
    venue="NeurIPS 2021",
    arxiv="2103.07579",
)


def _builder(timm_name: str) -> Callable[..., nn.Module]:
    build = timm_builder(timm_name)

    @functools.wraps(build)
    def checked(*args: Any, **arguments: Any) -> nn.Module:
        for key in ("layers", "channels"):
            if key in arguments and len(arguments[key]) != 4:
                raise ConfigError(f"A ResNet-RS has four stages: {key}={arguments[key]!r} has {len(arguments[key])}.")
        return build(*args, **arguments)

    return checked


def _entry(name: str, timm_name: str, **fields: Any) -> None:
    facts: dict[str, Any] = {
        "compact": "A ResNet that is scaled by depth and image size, with squeeze-and-excitation, and trained anew."
    }
    register(
        Entry(
            name=name,
            build=_builder(timm_name),
            family="resnetrs",
            paper=PAPER,
            code_license="apache-2.0",
            code_url="https://github.com/tensorflow/tpu/tree/master/models/official/resnet/resnet_rs",
            first_conv="conv1.0",
            classifier="fc",
            **(facts | fields),
        )
    )


# layers: top-1 (%) at the size that the weights were trained at
for layers, top1 in {50: 77.858, 101: 80.706, 152: 82.900, 200: 83.884, 270: 83.596, 350: 84.304, 420: 84.240}.items():
    name = f"resnetrs{layers}"
    weights = timm_weights(name, {"tf_in1k": top1})
    _entry(
        name,
        name,
        weights=weights,
        input_size=weights[0].input_size,
        note="timm trained these weights later than the others." if layers == 200 else "",
    )
_entry(
    "resnetrs_test",
    "resnetrs50",
    args={"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)},
    compact="A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
)
