"""SimpleNet: a plain chain of 3x3 convolutions.

Hasanpour, Rouhani, Fayyaz and Sabokrou, "Lets keep it simple, Using simple architectures to outperform deeper and more
complex architectures", 2016, arXiv 1608.06037.

What makes it compact: thirteen convolutions without branches or shortcuts, whose maps shrink early and whose widths
grow late, and global max pooling in place of wide linear layers. Memory does not grow with depth: nothing waits for
a sum.

The networks are those of the authors' PyTorch code, which the published weights are for. Their ImageNet forms differ in
where the first convolutions stride: "m1" and "m2" in the names, "m3" and "m4" being without weights. Of the CIFAR forms
the published weights fit `simplenet_cifar_5m_extra_pool` alone, which has a pooling that the paper's network does not.
Files of the ImageNet forms from before 11 April 2023 hold the weights of another network, whose 1x1 convolutions padded
by one pixel, under the same keys and shapes: their names end otherwise than those in `Entry.weights`.

A layer here is what the authors' table calls one: convolution, batch norm, ReLU and dropout. The layers of one
resolution make up a stage; those of the first, the stem.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError
from zoo.layers.arguments import check_above_zero, check_counts, check_rates, per_stage
from zoo.layers.fast_form import HasFastForm
from zoo.layers.folding import fold_batch_norm
from zoo.layers.image_size import check_map
from zoo.layers.init import init_weights
from zoo.layers.staged import Head, Stage, StagedNet
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["SimpleNet"]

torch.fx.wrap("check_map")


class Layer(HasFastForm):
    """Convolution, batch norm, ReLU, dropout of whole channels. (B, in_dim, H, W) -> (B, dim, H/stride, W/stride)"""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, drop: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.bn = nn.BatchNorm2d(dim, momentum=0.05)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout2d(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(self.bn(self.conv(x))))

    def fast_form(self) -> nn.Module:
        """The batch norm in the convolution's weights."""
        return nn.Sequential(fold_batch_norm(self.conv, self.bn), nn.ReLU(inplace=True))


class Pool(nn.Module):
    """Max pooling and dropout of whole channels. (B, dim, H, W) -> (B, dim, H/2, W/2)

    `least` is the side of the smallest image that the network takes. Raises ConfigError for a map below 2x2.
    """

    def __init__(self, drop: float, least: int) -> None:
        super().__init__()
        self.needed = f"This network takes images from {least}x{least} up."
        self.pool = nn.MaxPool2d(2, 2)
        self.drop = nn.Dropout2d(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, 2, 2, self.needed)
        return self.drop(self.pool(x))


class SimpleNet(StagedNet):
    """A chain of convolutions. (B, in_chans, H, W) -> (B, num_classes)

    The defaults are those of simplenetv1_5m_m2. Any number of stages works.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "max", "avg", "avgmax" (their mean), or "" for none (only without a classifier).
        dims: widths of the layers, a sequence for the stem and for each stage; behind a pooling a stage may have none.
        width_factor: what `dims` are multiplied by, rounded.
        stem_stride: of the first convolution.
        downsamples: what halves the map at the start of a stage: "conv" (its first layer strides) or "pool", one for
            all stages or one for each.
        pointwise: which layers have 1x1 kernels, counted from 0 at the first of the stem; all others have 3x3 ones.
        drop_rates: dropout behind each layer and pooling, in their order; what it does not reach has none.
        drop_rate: dropout before the classifier.

    Raises ConfigError for values that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "max",
        *,
        dims: Sequence[Sequence[int]] = ((64,), (128, 128), (128, 128, 128), (256, 256, 256, 512), (2048, 256, 256)),
        width_factor: float = 1.0,
        stem_stride: int = 2,
        downsamples: str | Sequence[str] = ("conv", "conv", "pool", "pool"),
        pointwise: Sequence[int] = (10, 11),
        drop_rates: Sequence[float] = (),
        drop_rate: float = 0.0,
    ) -> None:
        widths = _scaled(dims, width_factor)
        check_counts(1, stem_stride=stem_stride)
        check_rates(drop_rate=drop_rate, **{f"drop_rates[{i}]": rate for i, rate in enumerate(drop_rates)})
        kinds = per_stage("downsamples", downsamples, len(widths) - 1)
        for i, (kind, stage) in enumerate(zip(kinds, widths[1:], strict=True)):
            if kind not in ("conv", "pool"):
                raise ConfigError(f"downsamples must be 'conv' or 'pool', not {kind!r}.")
            if kind == "conv" and not stage:
                raise ConfigError(
                    f"dims: stage {i} has no layer that could stride: give it one, or downsample by pool."
                )
        layers = sum(map(len, widths))
        if not all(type(i) is int and 0 <= i < layers for i in pointwise):
            raise ConfigError(f"pointwise holds numbers of layers, 0 to {layers - 1}, and not {tuple(pointwise)!r}.")
        if len(drop_rates) > layers + kinds.count("pool"):
            raise ConfigError(
                f"drop_rates has {len(drop_rates)} rates for {layers} layers and {kinds.count('pool')} poolings."
            )
        outputs = [widths[0][-1]]
        for stage in widths[1:]:
            outputs.append(stage[-1] if stage else outputs[-1])
        reductions = tuple(stem_stride * 2**i for i in range(1, len(widths)))
        super().__init__(tuple(outputs[1:]), reductions, in_chans, num_classes)

        least = 1
        for kind in reversed(kinds):  # a convolution makes one row of one, a pooling needs two
            least = 2 * least - (kind == "conv")
        least = (least - 1) * stem_stride + 1
        rates = iter((*drop_rates, *[0.0] * (2 * layers + len(kinds))))
        number, dim = 0, in_chans

        def chain(widths: Sequence[int], stride: int) -> list[nn.Module]:
            nonlocal number, dim
            made: list[nn.Module] = []
            for width in widths:
                kernel_size = 1 if number in pointwise else 3
                made.append(Layer(dim, width, kernel_size, 1 if made else stride, next(rates)))
                number, dim = number + 1, width
            return made

        self.stem = nn.Sequential(*chain(widths[0], stem_stride))
        self.stages = nn.Sequential()
        for kind, stage in zip(kinds, widths[1:], strict=True):
            downsample = Pool(next(rates), least) if kind == "pool" else nn.Identity()
            self.stages.append(Stage(downsample, chain(stage, 2 if kind == "conv" else 1)))
        self.head = Head(dim, num_classes, global_pool, drop_rate=drop_rate)
        init_weights(self)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does."""
        module.reset_parameters()  # type: ignore[operator]
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight, gain=2**0.5)


def _scaled(dims: Sequence[Sequence[int]], factor: float) -> list[tuple[int, ...]]:
    check_above_zero(width_factor=factor)
    nested = not isinstance(dims, str) and isinstance(dims, Sequence)
    if not nested or len(dims) < 2 or not all(isinstance(stage, list | tuple) for stage in dims) or not dims[0]:
        raise ConfigError(
            f"dims holds widths of the stem's layers, and of each stage's, such as ((64,), (128, 128)), not {dims!r}."
        )
    for stage in dims:
        if not all(type(width) is int and round(width * factor) > 0 for width in stage):
            raise ConfigError(f"dims must be whole numbers above zero, also when scaled, and not {tuple(stage)!r}.")
    return [tuple(round(width * factor) for width in stage) for stage in dims]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in the zoo's layout.

    The authors number their modules, dropout among them, so that the numbers differ from file to file; the order of the
    convolutions does not. Raises CheckpointError for a file with another number of them.
    """
    if not any(key.startswith("features.") for key in state_dict):
        return state_dict
    numbers: dict[int, dict[str, Tensor]] = {}
    converted = {}
    for key, tensor in state_dict.items():
        if found := re.fullmatch(r"features\.(\d+)\.(\w+)", key):
            numbers.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            converted[re.sub(r"^classifier\.", "head.fc.", key)] = tensor
    parts = [numbers[number] for number in sorted(numbers)]
    names = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    if len(parts) != 2 * len(names):
        raise CheckpointError(
            f"The checkpoint has {len(parts)} convolutions and batch norms, the model {2 * len(names)}: "
            "it is of another SimpleNet."
        )
    for i, part in enumerate(parts):
        kind = "bn" if i % 2 else "conv"
        converted |= {f"{names[i // 2]}.{kind}.{key}": tensor for key, tensor in part.items()}
    return converted


# ------------------------------------------------------------------------------------------------------------- variants

REPOSITORY = "https://github.com/Coderx7/SimpleNet_Pytorch"
README = "README of Coderx7/SimpleNet_Pytorch"
PAPER = Paper(
    title="Lets keep it simple, Using simple architectures to outperform deeper and more complex architectures",
    authors="Hasanpour, Rouhani, Fayyaz, Sabokrou",
    venue="arXiv 2016",
    arxiv="1608.06037",
)
COMPACT = "A plain chain of 3x3 convolutions, narrow where maps are large."

WIDTHS = {
    "5m": (64, 128, 128, 128, 128, 128, 256, 256, 256, 512, 2048, 256, 256),
    "9m": (128, 192, 192, 192, 192, 192, 320, 320, 320, 640, 2560, 320, 320),
}
STRIDED = {"m1": (1, 2), "m2": (1, 3), "m3": (1, 4), "m4": (2, 4)}  # layers where the stem and the first stage end


def _dims(widths: tuple[int, ...], mode: str) -> tuple[tuple[int, ...], ...]:
    first, second = STRIDED[mode]
    return widths[:first], widths[first:second], widths[second:6], widths[6:10], widths[10:]


def _weights(name: str, ending: str, top1: float, top5: float) -> Weights:
    return Weights(
        tag="coderx7_in1k",
        license="mit",
        url=f"{REPOSITORY}/releases/download/v1.0.0/{name}-{ending}.pth",
        top1=top1,
        top5=top5,
        accuracy_source=README,
        note="Files of other names, from before 11 April 2023, hold weights of another network of the same shapes.",
    )


# how names end of the authors' files whose network padded its 1x1 convolutions
OLD_ENDINGS = ("a7ec600b", "62617ea1", "8427bf60", "da714eb5", "cc6b3ad1", "c35297bf", "8c98a0a5", "6b01be1e")
OUTDATED = dict.fromkeys(
    OLD_ENDINGS,
    "it is from before 11 April 2023, of a network whose 1x1 convolutions padded by a pixel: this one has the same "
    "shapes and gives other outputs. The authors' present file is of the network that is here",
)

# name, network, width factor, mode, (millions of parameters, G of the table) and (ending, top-1, top-5) of the weights
for name, widths, factor, mode, costs, published in (
    ("small_m1_05", "5m", 0.5, "m1", (1.51, 0.34), ("be804903", 61.122, 82.988)),
    ("small_m2_05", "5m", 0.5, "m2", (1.51, 0.43), ("ca4b3e2b", 61.67, 83.488)),
    ("small_m1_075", "5m", 0.75, "m1", (3.29, 0.76), ("098acbff", 67.784, 87.718)),
    ("small_m2_075", "5m", 0.75, "m2", (3.29, 0.96), ("609ff4da", 68.506, 88.15)),
    ("5m_m1", "5m", 1.0, "m1", (5.75, 1.35), ("36c4ca4d", 71.548, 89.94)),
    ("5m_m2", "5m", 1.0, "m2", (5.75, 1.69), ("9bd6bb36", 72.03, 90.324)),
    ("5m_m3", "5m", 1.0, "m3", None, None),
    ("5m_m4", "5m", 1.0, "m4", None, None),
    ("9m_m1", "9m", 1.0, "m1", (9.51, 2.78), ("524f9972", 73.792, 91.486)),
    ("9m_m2", "9m", 1.0, "m2", (9.51, 3.56), ("59e8733b", 74.23, 91.748)),
):
    register(
        Entry(
            name=f"simplenetv1_{name}",
            build=SimpleNet,
            family="simplenet",
            args={"dims": _dims(WIDTHS[widths], mode), "width_factor": factor},
            paper=PAPER,
            compact=COMPACT,
            code_license="mit",
            code_url=REPOSITORY,
            reported=costs
            and Reported(
                params=round(costs[0] * 1e6), macs=round(costs[1] * 1e9), input_size=(3, 224, 224), source=README
            ),
            weights=(_weights(f"simplenetv1_{name}", *published),) if published else (),
            convert=convert,
            first_conv="stem.0.conv",
            classifier="head.fc",
            note="The authors' figure is fvcore's total, norms included." if costs else "",
            outdated_files=OUTDATED,
        )
    )

SNAPSHOTS = f"{REPOSITORY}/tree/master/cifar/snapshots/simplenetv1"
CIFAR_NOTE = (
    "Beside its weights the file holds a pickled object of the authors' own code, so that reading it would run code: "
    "where you trust it, open it once with their repository at hand and save its state_dict alone."
)


def _cifar_weights(classes: int, accuracy: float, folder: str) -> Weights:
    return Weights(
        tag=f"coderx7_cifar{classes}" + ("_201805" if "before" in folder else ""),
        license="mit",
        page=f"{SNAPSHOTS}/{folder}",
        dataset=f"cifar-{classes}",
        top1=accuracy,
        accuracy_source=README,
        num_classes=classes,
        input_size=(3, 32, 32),
        crop_pct=1.0,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255) if classes == 10 else (129.3 / 255, 124.1 / 255, 112.4 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255) if classes == 10 else (68.2 / 255, 65.4 / 255, 70.4 / 255),
        note=CIFAR_NOTE,
    )


for name, dims, weights in (
    ("310k", ((64, 32, 32, 32), (32, 32, 64), (64, 64), (128, 256, 64), (64,)), ()),
    ("460k", ((32, 32, 32, 64), (64, 64, 64), (64, 64), (96, 96, 96), (100,)), ()),
    ("5m", ((64, 128, 128, 128), (128, 128, 256), (256, 256), (512, 2048, 256), (256,)), ()),
    (
        "5m_extra_pool",
        ((64, 128, 128, 128), (128, 128, 256), (256, 256), (512,), (2048, 256), (256,)),
        (
            _cifar_weights(10, 95.51, "CIFAR10/95.51"),
            _cifar_weights(10, 95.32, "CIFAR10/95.32(before_fixing__init_bug)"),
            _cifar_weights(100, 78.37, "CIFAR100/78.37"),
            _cifar_weights(100, 77.83, "CIFAR100/77.83_(before_fixing_init_bug)"),
        ),
    ),
):
    register(
        Entry(
            name=f"simplenet_cifar_{name}",
            build=SimpleNet,
            family="simplenet",
            args={"dims": dims, "stem_stride": 1, "downsamples": "pool", "num_classes": 10},
            paper=PAPER,
            compact=COMPACT,
            code_license="mit",
            code_url=REPOSITORY,
            weights=weights,
            convert=convert,
            input_size=(3, 32, 32),
            pool_size=(32 // 2 ** (len(dims) - 1),) * 2,
            first_conv="stem.0.conv",
            classifier="head.fc",
            note="The name is the authors'; it has 386 thousand parameters." if name == "460k" else "",
        )
    )
register(
    Entry(
        name="simplenet_test",
        build=SimpleNet,
        family="simplenet",
        args={"dims": ((16,), (16, 32), (32, 32), (32, 48), (96, 64)), "pointwise": (7, 8)},
        paper=PAPER,
        compact="A tiny one for tests and trials, not of the paper.",
        code_license="mit",
        code_url=REPOSITORY,
        convert=convert,
        input_size=(3, 64, 64),
        first_conv="stem.0.conv",
        classifier="head.fc",
    )
)
