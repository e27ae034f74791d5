"""SN-Net: stitchable networks of DeiT and Swin anchors.

Pan, Cai and Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv 2302.06586.

What makes it compact: one set of weights holds networks of many sizes. A stitch runs the first blocks of a small
pretrained network (an anchor), one linear layer on every token, and the remaining blocks of a larger anchor;
`set_stitch` chooses among them at run time. The stitching layers start as the least-squares solution between the
anchors' activations (`init_stitches`).

The anchors are timm's classes and keep timm's keys, below `anchors.*`. Where this file departs from the paper it
follows the authors' code: a stitched path of DeiT anchors leaves out the last one's final norm (`end_norm` puts it in).

TorchScript and FX see the chosen path alone; trained by several processes, each draws its own, as the authors' do.

Not here: the networks of the authors' other three checkpoints, `resnet_18_50.pth`, `resnet18_swin_ti.pth` and
`levit_192_256_release.pth`. There are no outputs of the authors' code to hold them to, and their layouts are not stated
to the last key: of LeViT's, a path averages two heads, and ResNets meet Swin in a change of layout.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.arguments import check_above_zero, check_counts, check_rates, check_widths
from zoo.layers.hub_mixin import ZooModelHubMixin
from zoo.registry import Entry, Paper, Weights, register

torch.fx.wrap("resample_abs_pos_embed")  # which compares sizes: FX is not to trace into it

__all__ = ["SNNet", "Stitch", "StitchedSwin", "StitchedViT"]


# ------------------------------------------------------------------------------------------------------------- stitches


@dataclass(frozen=True, slots=True, kw_only=True)
class Stitch:
    """One path: the anchors it runs through, and where it passes from each to the next.

    Args:
        anchors: their numbers, from small to large. A single one is that anchor alone.
        cuts: for each passage, the last block of the anchor before it and the first block of the anchor behind it.
        layers: for each passage, the number of its stitching layer.
        stage: the stage in which the passage is; None where the anchors have no stages.
    """

    anchors: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...] = ()
    layers: tuple[int, ...] = ()
    stage: int | None = None


Pairs = dict[tuple[int, int], int]  # (last block of the front, first block of the end): number of the stitching layer


def paired(depth: int, kernel_size: int, stride: int) -> Pairs:
    """Cuts between anchors of equal depth: a window slides over the blocks; those within it share a stitching layer."""
    pairs: Pairs = {}
    layer = 0
    for start in range(0, depth, stride):
        window = range(start, min(start + kernel_size, depth))
        new = [pair for pair in itertools.product(window, window) if pair not in pairs]
        pairs |= dict.fromkeys(new, layer)
        layer += bool(new)
    return pairs


def unpaired(front: int, end: int) -> Pairs:
    """Cuts between stages of unequal depth: block i of the end belongs to block i * front // end of the front.

    The stitching layers are numbered as if (0, 0) were a pair, which it is not: published weights are numbered so.
    """
    nearest = [i * front // end for i in range(end)]
    pairs = [(j, i) for j in range(front) for i in range(end) if nearest[i] == j and i > j]
    return dict(zip(pairs, nearest, strict=False))


# --------------------------------------------------------------------------------------------------------------- models


class StitchingLayer(nn.Module):
    """A linear layer on every token. (..., in_dim) -> (..., dim)"""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.transform = nn.Linear(in_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x)


class SNNet(ZooModelHubMixin, nn.Module):
    """Anchors and the stitching layers between them: all but what depends on the kind of anchors.

    A subclass makes `anchors` and `stitch_layers`, lists the `stitches`, and says what a path consists of.
    """

    selective = True  # for training: not every weight takes part in every step
    default_feature_cls = "getter"  # a path is no sequence of this module's children
    end_norm: bool  # whether a stitched path ends with its last anchor's norm

    def __init__(self, num_classes: int, sample_stitches: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.sample_stitches = sample_stitches
        self.grad_checkpointing = False
        self.anchors = nn.ModuleList()
        self.stitch_layers = nn.ModuleList()
        self.stitches: tuple[Stitch, ...] = ()

    def embed(self, anchor: int, x: Tensor) -> Tensor:
        """Images, (B, in_chans, H, W), to the input of the anchor's first block."""
        raise NotImplementedError

    def steps(self, stitch: Stitch) -> list[nn.Module]:
        """The modules of a path from embedding to final norm, in the order in which they run."""
        raise NotImplementedError

    def normalise(self, stitch: Stitch, x: Tensor) -> Tensor:
        """What stands between the last block and the head."""
        end: Any = self.anchors[stitch.anchors[-1]]
        return end.norm(x) if self.end_norm or not stitch.cuts else x

    def front_parts(self, anchor: Any) -> list[Any]:
        """Modules and parameters of an anchor that only its embedding needs."""
        return [anchor.patch_embed]

    def body(self, stitch: Stitch) -> dict[str, nn.Module]:
        """Children of an anchor with which it computes a path: what to put in its place."""
        raise NotImplementedError

    def reduction(self, block: str) -> int:
        """Pixels of the input to a token behind a block of this name, per side."""
        raise NotImplementedError

    def as_map(self, x: Tensor, height: int, width: int) -> Tensor:
        """What a block gives for images of this size as a map, (B, C, h, w)."""
        raise NotImplementedError

    @property
    def num_stitches(self) -> int:
        return len(self.stitches)

    @property
    def global_pool(self) -> str:
        """The pooling of the current path's last anchor, under the name by which it is saved."""
        end: Any = self.anchors[self.stitches[self.stitch].anchors[-1]]
        return end.global_pool

    @property
    def has_whole_anchors(self) -> bool:
        """Whether every anchor can run alone: not once a path was extracted, or pruned to."""
        return all(Stitch(anchors=(number,)) in self.stitches for number in range(len(self.anchors)))

    @torch.jit.ignore
    def stitch_config(self, stitch: int) -> Stitch:
        """The path of number `stitch`. Raises ConfigError where there is none of that number."""
        if type(stitch) is not int or not 0 <= stitch < len(self.stitches):
            raise ConfigError(f"There are stitches 0 to {len(self.stitches) - 1}, and no {stitch!r}.")
        return self.stitches[stitch]

    @torch.jit.ignore
    def set_stitch(self, stitch: int) -> None:
        """Choose the path that the model computes from here on, which is saved with it.

        Raises ConfigError for a number that there is not.
        """
        config = self.stitch_config(stitch)
        self.stitch = stitch
        if "_model_args" in self.__dict__:
            self.__dict__["_model_args"]["stitch"] = stitch
        end: Any = self.anchors[config.anchors[-1]]
        self.num_features = self.head_hidden_size = end.num_features
        names = {module: name for name, module in self.named_modules()}
        blocks: list[Any] = [step for step in self.steps(config) if hasattr(step, "mlp")]
        self.feature_info: list[dict[str, Any]] = [
            {
                "num_chs": block.mlp.fc2.out_features,
                "reduction": self.reduction(names[block]),
                "module": names[block],
            }
            for block in blocks
        ]

    @torch.jit.ignore
    def extract(self, stitch: int | None = None) -> "SNNet":
        """A copy that holds the weights of one path alone (the current one by default), as its only stitch."""
        config = self.stitch_config(self.stitch if stitch is None else stitch)
        first, last = config.anchors[0], config.anchors[-1]

        def replaced(parts: list[Any]) -> dict[int, Any]:
            """A memo with which `copy.deepcopy` leaves these out."""
            return {id(part): nn.Identity() if isinstance(part, nn.Module) else None for part in parts}

        kept = copy.copy(self)  # a shallow copy, of which what the path needs is copied in full
        kept._modules = dict(self._modules)
        running = set(self.steps(config))
        anchors: list[nn.Module] = []
        for number, anchor in enumerate(self.anchors):
            if number not in config.anchors:
                anchors.append(nn.Identity())
                continue
            idle: list[Any] = [step for step in self.steps(Stitch(anchors=(number,))) if step not in running]
            idle += self.front_parts(anchor) if number != first else []
            idle += [anchor.norm, anchor.head] if number != last else []
            anchors.append(copy.deepcopy(anchor, replaced(idle)))
        kept.anchors = nn.ModuleList(anchors)
        layers = [part for part in self.stitch_layers.modules() if isinstance(part, StitchingLayer)]
        kept.stitch_layers = copy.deepcopy(self.stitch_layers, replaced([la for la in layers if la not in running]))
        kept.stitches = (config,)
        kept.set_stitch(0)
        args: dict[str, Any] = self.__dict__.get("_model_args", {})
        number = self.stitch if stitch is None else stitch
        kept.__dict__["_model_args"] = {"extract": number, **{key: args[key] for key in args if key != "stitch"}}
        return kept

    def _set_stitches(self, stitches: Iterable[Stitch], stitch: int, extract: int | None) -> None:
        """What a subclass does last: with all paths there, choose one, or be that one alone."""
        self.stitches = tuple(stitches)
        self.set_stitch(stitch)
        if extract is not None:
            self.__dict__ = self.extract(extract).__dict__

    def path(self) -> Stitch:
        """The path of this call: the chosen one or, in training with `sample_stitches`, one drawn anew."""
        if self.training and self.sample_stitches:
            return self.stitches[int(torch.randint(len(self.stitches), ()))]
        return self.stitches[self.stitch]

    def _run(self, stitch: Stitch, x: Tensor) -> Tensor:
        x = self.embed(stitch.anchors[0], x)
        for step in self.steps(stitch):
            x = checkpoint(step, x) if self.grad_checkpointing else step(x)
        return self.normalise(stitch, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> what the last block of the path gives: tokens, (B, N, C), or a map, (B, h, w, C)."""
        return self._run(self.stitches[self.stitch], x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives -> (B, num_classes); `pre_logits` gives (B, num_features)."""
        end: Any = self.anchors[self.stitches[self.stitch].anchors[-1]]
        return end.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        stitch = self.path()
        end: Any = self.anchors[stitch.anchors[-1]]
        return end.forward_head(self._run(stitch, x))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory: recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """That of the current path's last anchor."""
        end: Any = self.anchors[self.stitches[self.stitch].anchors[-1]]
        return end.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh classifiers of another width (0: none), and another pooling, in every anchor."""
        check_counts(0, num_classes=num_classes)
        self.num_classes = num_classes
        for end in {stitch.anchors[-1] for stitch in self.stitches}:
            self.anchors[end].reset_classifier(num_classes, global_pool)  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Class tokens and position tables; norms and biases are one-dimensional and undecayed anyway."""
        kinds = ("cls_token", "pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the current path does not need up to the last of its blocks in `indices`, and the head.

        The path is the only stitch that is left, of number 0. Returns the indices of the blocks kept.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        width, ends_early = self.feature_info[last]["num_chs"], last + 1 < len(self.feature_info)
        alone = self.extract()
        self.anchors, self.stitch_layers, self.stitches = alone.anchors, alone.stitch_layers, alone.stitches
        self.set_stitch(0)
        (path,) = self.stitches
        blocks = [step for step in self.steps(path) if hasattr(step, "mlp")]
        end: Any = self.anchors[path.anchors[-1]]
        if prune_norm or ends_early:
            end.norm = nn.Identity()
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        steps = self.steps(path)
        names = {module: name for name, module in self.named_modules()}
        for step in steps[steps.index(blocks[last]) + 1 :]:
            self.set_submodule(names[step], nn.Identity())
        self.set_stitch(0)
        self.num_features = self.head_hidden_size = width
        return take

    def __prepare_scriptable__(self) -> nn.Module:
        """The current path as one of timm's models, for `torch.jit.script`: TorchScript cannot choose among modules."""
        path = self.stitches[self.stitch]
        front: Any = self.anchors[path.anchors[0]]
        end: Any = self.anchors[path.anchors[-1]]
        plain = copy.copy(front)
        norm = end.norm if self.end_norm or not path.cuts else nn.Identity()
        plain._modules = {**front._modules, **self.body(path), "norm": norm, "head": end.head}
        return plain

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps behind the blocks of the path in `indices` (the last n if a number, all if None), and the features.

        They have the width of the anchor that the block is of. `norm` normalises the last one as the path does.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"These features are maps: output_fmt must be 'NCHW', not {output_fmt!r}.")
        stitch = self.stitches[self.stitch]
        take, last = feature_take_indices(len(self.feature_info), indices)
        height, width = x.shape[2], x.shape[3]
        x = self.embed(stitch.anchors[0], x)
        intermediates = []
        block = -1
        for step in self.steps(stitch):
            x = checkpoint(step, x) if self.grad_checkpointing else step(x)
            if not hasattr(step, "mlp"):
                continue
            block += 1
            if block in take:
                final = norm and block == len(self.feature_info) - 1
                intermediates.append(self.as_map(self.normalise(stitch, x) if final else x, height, width))
            if stop_early and intermediates_only and block == last:
                break
        return intermediates if intermediates_only else (self.normalise(stitch, x), intermediates)

    @torch.no_grad()
    def init_stitches(self, batches: Iterable[Tensor]) -> None:
        """Set the stitching layers to the least-squares solution between the anchors' activations (section 3.2).

        For a passage from behind block j to before block t, W and b minimise |F W' + b - G|, F and G being all tokens
        of all images behind the one and before the other. A layer of several passages gets the mean of their solutions.
        Only sums of products are kept, in float64, so that any number of batches fits in memory.

        Args:
            batches: images, (B, in_chans, H, W), as in training: a handful of batches will do.

        Raises ConfigError without any batch, and where the anchors are no longer whole.
        """
        if not self.has_whole_anchors:
            raise ConfigError(
                "init_stitches compares whole anchors, and this model holds one path alone: call it before `extract`."
            )
        passages: dict[nn.Linear, dict[tuple[nn.Module, nn.Module], None]] = {}
        for stitch in self.stitches:
            steps = self.steps(stitch)
            for place, step in enumerate(steps):
                if isinstance(step, StitchingLayer):
                    passages.setdefault(step.transform, {})[steps[place - 1], steps[place + 1]] = None
        pairs = dict.fromkeys(pair for found in passages.values() for pair in found)
        behind: dict[nn.Module, Tensor] = {}
        before: dict[nn.Module, Tensor] = {}

        def keep_output(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            behind[module] = nn.functional.pad(output.flatten(0, -2).double(), (0, 1), value=1.0)  # 1 for the bias

        def keep_input(module: nn.Module, inputs: tuple[Tensor]) -> None:
            before[module] = inputs[0].flatten(0, -2).double()

        fronts, ends = dict.fromkeys(pair[0] for pair in pairs), dict.fromkeys(pair[1] for pair in pairs)
        hooks = [front.register_forward_hook(keep_output) for front in fronts]
        hooks += [end.register_forward_pre_hook(keep_input) for end in ends]
        grams: dict[nn.Module, Any] = dict.fromkeys(fronts, 0)
        products: dict[tuple[nn.Module, nn.Module], Any] = dict.fromkeys(pairs, 0)
        training = self.training
        try:
            self.eval()
            for images in batches:
                for number in range(len(self.anchors)):
                    x = self.embed(number, images)
                    for step in self.steps(Stitch(anchors=(number,))):
                        x = step(x)
                for front in fronts:
                    grams[front] = grams[front] + behind[front].T @ behind[front]
                for front, end in pairs:
                    products[front, end] = products[front, end] + behind[front].T @ before[end]
        finally:
            for hook in hooks:
                hook.remove()
            self.train(training)
        if not behind:
            raise ConfigError("init_stitches needs at least one batch of images.")
        inverses = {front: torch.linalg.pinv(gram, hermitian=True) for front, gram in grams.items()}
        for layer, found in passages.items():
            solution = torch.stack([inverses[front] @ products[front, end] for front, end in found]).mean(0)
            layer.weight.copy_(solution[:-1].T)
            layer.bias.copy_(solution[-1])


class StitchedViT(SNNet):
    """SN-Net of DeiT anchors of equal depth. (B, in_chans, H, W) -> (B, num_classes).

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifiers; 0 leaves them out.
        global_pool: "token" (the class token), or any other that timm's vision transformer has.
        dims: width of each anchor, from small to large.
        num_heads: attention heads of each anchor.
        depth: blocks of every anchor.
        patch_size: side of a patch in pixels.
        mlp_ratio: hidden width of the MLPs over the width.
        kernel_size: blocks in the window that slides over the anchors; any two of them can be stitched.
        stride: blocks that it slides at a time.
        nearest: stitch neighbouring anchors alone; otherwise any two, and paths through three.
        stitch: number of the path to compute, see `set_stitch`.
        extract: number of the path whose weights alone the model has, as its only stitch, see `extract`.
        sample_stitches: draw a path anew for each call in training, as the authors train.
        end_norm: whether a stitched path ends with its last anchor's norm; the authors' does not.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of every anchor, growing linearly from 0 at its first block to this.
        img_size: input height and width that the position tables are made for; at other sizes they are resized.

    Raises ConfigError for values that cannot be.
    """

    num_prefix_tokens = 1  # the class token

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        dims: Sequence[int] = (192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12),
        depth: int = 12,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        kernel_size: int = 2,
        stride: int = 1,
        nearest: bool = True,
        stitch: int = 0,
        extract: int | None = None,
        sample_stitches: bool = False,
        end_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        dims, num_heads = check_widths(dims=dims, num_heads=num_heads)
        check_counts(1, in_chans=in_chans, depth=depth, patch_size=patch_size, kernel_size=kernel_size, stride=stride)
        check_counts(0, num_classes=num_classes)
        check_above_zero(mlp_ratio=mlp_ratio)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        super().__init__(num_classes, sample_stitches)
        self.end_norm = end_norm
        self.patch_size = patch_size
        self.anchors.extend(
            VisionTransformer(
                img_size=img_size,
                patch_size=patch_size,
                in_chans=in_chans,
                num_classes=num_classes,
                global_pool=global_pool,
                fc_norm=False,  # one norm, before any pooling: a path leaves it out or not, whatever pools
                embed_dim=dim,
                depth=depth,
                num_heads=heads,
                mlp_ratio=mlp_ratio,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                dynamic_img_size=True,
            )
            for dim, heads in zip(dims, num_heads, strict=True)
        )
        pairs = paired(depth, kernel_size, stride)
        count = len(dims)
        combinations = [c for c in itertools.combinations(range(count), 2) if not nearest or c[1] == c[0] + 1]
        self.combinations = {combination: i for i, combination in enumerate(combinations)}
        self.stitch_layers.extend(
            nn.ModuleList(StitchingLayer(dims[front], dims[end]) for _ in range(max(pairs.values()) + 1))
            for front, end in combinations
        )
        stitches = [Stitch(anchors=(anchor,)) for anchor in range(count)]
        stitches += [
            Stitch(anchors=combination, cuts=(cut,), layers=(layer,))
            for combination in combinations
            for cut, layer in pairs.items()
        ]
        if not nearest:
            stitches += [
                Stitch(anchors=combination, cuts=(one, two), layers=(pairs[one], pairs[two]))
                for combination in itertools.combinations(range(count), 3)
                for one, two in itertools.product(pairs, pairs)
                if two[0] >= one[1]
            ]
        self._set_stitches(stitches, stitch, extract)

    def embed(self, anchor: int, x: Tensor) -> Tensor:
        vit: Any = self.anchors[anchor]
        x = vit.patch_embed(x)  # (B, h, w, C)
        size = [x.shape[1], x.shape[2]]
        positions = resample_abs_pos_embed(vit.pos_embed, size, list(vit.patch_embed.grid_size))
        x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1) + positions
        return vit.norm_pre(vit.patch_drop(vit.pos_drop(x)))

    def steps(self, stitch: Stitch) -> list[nn.Module]:
        steps: list[nn.Module] = []
        start = 0
        last_anchor: Any = self.anchors[stitch.anchors[-1]]
        for place, (last, first) in enumerate(stitch.cuts):
            front, end = stitch.anchors[place : place + 2]
            anchor: Any = self.anchors[front]
            layers: Any = self.stitch_layers[self.combinations[front, end]]
            steps += [*list(anchor.blocks)[start : last + 1], layers[stitch.layers[place]]]
            start = first
        return steps + list(last_anchor.blocks)[start:]

    def front_parts(self, anchor: Any) -> list[Any]:
        return [anchor.patch_embed, anchor.cls_token, anchor.pos_embed]

    def body(self, stitch: Stitch) -> dict[str, nn.Module]:
        # timm hands `blocks` masks, which a stitching layer does not take
        return {"norm_pre": nn.Sequential(*self.steps(stitch)), "blocks": nn.Sequential()}

    def reduction(self, block: str) -> int:
        return self.patch_size

    def as_map(self, x: Tensor, height: int, width: int) -> Tensor:
        return x[:, 1:].transpose(1, 2).unflatten(2, (height // self.patch_size, width // self.patch_size))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups in depth order, for layer-wise learning-rate decay: blocks of all anchors side by side."""
        return {
            "stem": r"^anchors\.\d+\.(?:cls_token|pos_embed|patch_embed)",
            "blocks": [
                (r"^anchors\.\d+\.blocks\.(\d+)", None),
                (r"^stitch_layers\.\d+\.(\d+)", None),
                (r"^anchors\.\d+\.norm", (99999,)),
            ],
        }


class StitchedSwin(SNNet):
    """SN-Net of Swin anchors, stitched within the stages but the last. (B, in_chans, H, W) -> (B, num_classes).

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifiers; 0 leaves them out.
        global_pool: "avg", or any other that timm's Swin has.
        dims: width of each anchor's first stage, from small to large; it doubles with each stage.
        depths: blocks of each stage, for each anchor.
        num_heads: attention heads of each anchor's first stage; they double with each stage.
        window_size: side of attention's windows.
        stitch: number of the path to compute, see `set_stitch`.
        extract: number of the path whose weights alone the model has, as its only stitch, see `extract`.
        sample_stitches: draw a path anew for each call in training, as the authors train.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of every anchor, growing linearly from 0 at its first block to this.
        img_size: input height and width, which are fixed.

    Raises ConfigError for values that cannot be.
    """

    end_norm = True
    output_fmt = "NHWC"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dims: Sequence[int] = (96, 96, 128),
        depths: Sequence[Sequence[int]] = ((2, 2, 6, 2), (2, 2, 18, 2), (2, 2, 18, 2)),
        num_heads: Sequence[int] = (3, 3, 4),
        window_size: int = 7,
        stitch: int = 0,
        extract: int | None = None,
        sample_stitches: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        dims, num_heads = check_widths(dims=dims, num_heads=num_heads)
        all_depths = check_widths(**{f"depths[{i}]": row for i, row in enumerate(depths)})
        check_counts(1, in_chans=in_chans, window_size=window_size)
        check_counts(0, num_classes=num_classes)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if len(all_depths) != len(dims):
            raise ConfigError(f"depths has {len(all_depths)} anchors and dims has {len(dims)}: they must be as many.")
        super().__init__(num_classes, sample_stitches)
        stages = len(all_depths[0])
        self.anchors.extend(
            SwinTransformer(
                img_size=img_size,
                in_chans=in_chans,
                num_classes=num_classes,
                global_pool=global_pool,
                embed_dim=dim,
                depths=anchor_depths,
                num_heads=tuple(heads * 2**i for i in range(stages)),
                window_size=window_size,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
            )
            for dim, anchor_depths, heads in zip(dims, all_depths, num_heads, strict=True)
        )
        stitches = [Stitch(anchors=(anchor,)) for anchor in range(len(dims))]
        for stage in range(stages - 1):
            layers = nn.ModuleList()
            for front, end in itertools.pairwise(range(len(dims))):
                before, behind = all_depths[front][stage], all_depths[end][stage]
                pairs = unpaired(before, behind)
                if before == behind:
                    pairs = {cut: layer for cut, layer in paired(before, 2, 1).items() if cut[0] < cut[1]}
                stitches += [
                    Stitch(anchors=(front, end), cuts=(cut,), layers=(layer,), stage=stage)
                    for cut, layer in pairs.items()
                ]
                widths = dims[front] * 2**stage, dims[end] * 2**stage
                layers.append(
                    nn.ModuleList(StitchingLayer(*widths) for _ in range(max(pairs.values(), default=-1) + 1))
                )
            self.stitch_layers.append(layers)
        self._set_stitches(stitches, stitch, extract)

    def embed(self, anchor: int, x: Tensor) -> Tensor:
        swin: Any = self.anchors[anchor]
        return swin.patch_embed(x)

    def steps(self, stitch: Stitch) -> list[nn.Module]:
        front: Any = self.anchors[stitch.anchors[0]]
        end: Any = self.anchors[stitch.anchors[-1]]
        if stitch.stage is None:
            return self._stages(end.layers)
        ((last, first),) = stitch.cuts
        layers: Any = self.stitch_layers[stitch.stage]
        within = list(front.layers)[stitch.stage]
        return [
            *self._stages(list(front.layers)[: stitch.stage]),
            *self._stages([within])[: last + 1 + (stitch.stage > 0)],  # the first stage alone does not merge patches
            layers[stitch.anchors[0]][stitch.layers[0]],
            *list(list(end.layers)[stitch.stage].blocks)[first:],
            *self._stages(list(end.layers)[stitch.stage + 1 :]),
        ]

    def _stages(self, stages: Iterable[Any]) -> list[nn.Module]:
        """Patch mergings and blocks, one by one."""
        parts = [part for stage in stages for part in (stage.downsample, *stage.blocks)]
        return [part for part in parts if not isinstance(part, nn.Identity)]

    def body(self, stitch: Stitch) -> dict[str, nn.Module]:
        return {"layers": nn.Sequential(*self.steps(stitch))}

    def reduction(self, block: str) -> int:
        return 4 * 2 ** int(block.split(".")[3])  # anchors.0.layers.1.blocks.0

    def as_map(self, x: Tensor, height: int, width: int) -> Tensor:
        return x.permute(0, 3, 1, 2)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups in depth order, for layer-wise learning-rate decay: blocks of all anchors side by side."""
        return {
            "stem": r"^anchors\.\d+\.patch_embed",
            "blocks": [
                (r"^anchors\.\d+\.layers\.(\d+)\.downsample", (0,)),
                (r"^anchors\.\d+\.layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^stitch_layers\.(\d+)\.\d+\.(\d+)", None),
                (r"^anchors\.\d+\.norm", (99999,)),
            ],
        }


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of ziplab/SN-Net, or one of ours, for `model`, whose position tables it is resized to.

    Of a whole network's, a model of one path gets what that path needs.
    """
    tables = {key: tensor for key, tensor in model.state_dict().items() if key.endswith(".pos_embed")}
    microsoft = any(".layers.0.downsample." in key for key in state_dict)
    converted = {_from_microsoft(key): tensor for key, tensor in state_dict.items()} if microsoft else dict(state_dict)
    converted = {key: tensor for key, tensor in converted.items() if not key.endswith(BUFFERS)}
    for key, table in tables.items():
        if key in converted and converted[key].ndim == 3 and converted[key].shape[1] != table.shape[1]:
            anchor: Any = model.get_submodule(key.rpartition(".")[0])
            converted[key] = resample_abs_pos_embed(converted[key], list(anchor.patch_embed.grid_size))
    if getattr(model, "num_stitches", None) == 1:
        own = model.state_dict()
        idle = ("anchors.", "stitch_layers.")
        converted = {key: tensor for key, tensor in converted.items() if key in own or not key.startswith(idle)}
    return converted


BUFFERS = ("relative_position_index", "attn_mask")


def _from_microsoft(key: str) -> str:
    """Microsoft's Swin merges patches at the end of a stage, timm's at the start of the next."""
    key = re.sub(r"\.layers\.(\d+)\.downsample\.", lambda match: f".layers.{int(match[1]) + 1}.downsample.", key)
    return re.sub(r"(anchors\.\d+)\.head\.(weight|bias)$", r"\1.head.fc.\2", key)


# ------------------------------------------------------------------------------------------------------------- variants

PAPER = Paper(
    title="Stitchable Neural Networks",
    authors="Pan, Cai, Zhuang",
    venue="CVPR 2023",
    arxiv="2302.06586",
)
NOTE = (
    "MACs and accuracy are those of stitch 0, the smallest anchor; parameters are of all anchors and stitching layers."
)


def _entry(name: str, args: dict[str, Any], compact: str, swin: bool = False, **fields: Any) -> None:
    anchors = len(args.get("dims", (96, 96, 128)))
    register(
        Entry(
            name=name,
            build=StitchedSwin if swin else StitchedViT,
            family="snnet",
            args=args,
            paper=PAPER,
            compact=compact,
            code_license="apache-2.0",
            code_url="https://github.com/ziplab/SN-Net",
            convert=convert,
            first_conv=tuple(f"anchors.{anchor}.patch_embed.proj" for anchor in range(anchors)),
            classifier=tuple(f"anchors.{anchor}.head{'.fc' if swin else ''}" for anchor in range(anchors)),
            fixed_input_size=swin,
            note=NOTE,
            **fields,
        )
    )


_entry(
    "snnet_deit_ti_s_b",
    {"dims": (192, 384, 768), "num_heads": (3, 6, 12)},
    "71 networks between DeiT-Ti and DeiT-B in one set of weights, chosen at run time.",
    pool_size=(14, 14),
    weights=(
        Weights(
            tag="ziplab_in1k",
            url="https://github.com/ziplab/SN-Net/releases/download/v1.0/snnet_deit.pth",
            license="apache-2.0",
            top1=70.56,
            accuracy_source="results of ziplab/SN-Net, stitch 0",
            note="Top-1 from 70.56% (stitch 0) to 81.93% (stitch 2), by stitch.",
        ),
    ),
)
_entry(
    "snnet_deit_ti_s",
    {"dims": (192, 384), "num_heads": (3, 6)},
    "36 networks between DeiT-Ti and DeiT-S in one set of weights, chosen at run time.",
    pool_size=(14, 14),
)
_entry(
    "snnet_test",
    {"dims": (32, 64), "num_heads": (2, 4), "depth": 3, "patch_size": 8, "img_size": 64},
    "A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
    pool_size=(8, 8),
)
_entry(
    "snnet_swin_ti_s_b",
    {},
    "41 networks between Swin-Ti and Swin-B in one set of weights, chosen at run time.",
    swin=True,
    weights=(
        Weights(
            tag="ziplab_in1k",
            url="https://github.com/ziplab/SN-Net/releases/download/v1.0/snnet_swin.pth",
            license="apache-2.0",
            pretrained_on="imagenet-22k",
            top1=79.46,
            accuracy_source="results of ziplab/SN-Net, stitch 0",
            note="Top-1 from 79.46% (stitch 0) to 84.21% (stitch 2), by stitch.",
        ),
    ),
)
