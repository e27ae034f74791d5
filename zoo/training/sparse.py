"""Sparse training: weights held at zero by masks, which may move as the model learns.

A mask says of every weight of a layer whether it is kept (True) or zero. Masks begin at a density for each layer
(uniform, Erdos-Renyi, SNIP); every so many updates those that are smallest leave, and as many appear elsewhere: SET,
RigL and SLaK differ in when and where (`zoo.training.sparse_methods`). The number of weights that a layer keeps is
exact after every update. Where channels die out (Chase), it is that of the model: what finds no room in a layer's
living channels appears in other layers, and where these are all dense, no more is kept.

In a training loop of one's own:

    sparse = SparseTraining(model, SparsityConfig(method="rigl", density=0.2).rule(), updates=1000)
    sparse.start()
    sparse.attach(optimizer)
    for update, batch in enumerate(batches, 1):
        loss_of(model, batch).backward()
        sparse.step(update, optimizer.step)
        optimizer.zero_grad()

What scales or clips gradients belongs into the step, over what the optimizer holds, since `optimizer_state: compact`
hands it the kept weights alone:

    def step():
        scaler.unscale_(optimizer)
        clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        return scaler.get_scale() >= scale

Weights that appear start at zero, and so does what the optimizer remembers of them. Adam would then take far too long
steps: it corrects its averages for their beginning at zero by the number of all updates, so that after k of them a
weight of steady gradient moves by (1 - beta1**k) / sqrt(1 - beta2**k) of the learning rate, up to 6.6 times of it
(betas 0.9, 0.999); RMSprop, which corrects nothing, by 10 times of it (alpha 0.99). Here the correction counts a
weight's own updates (`optimizer_state` active or compact; `CORRECTIONS` says for which optimizers), and `regrow_warmup`
shortens its first steps besides: the cold start of Xiao et al. 2026 (SMET), arXiv 2606.00888, whose abstract states the
remedies; the formulas are ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from zoo.errors import CheckpointError, ConfigError, some
from zoo.layers.arguments import check_counts
from zoo.layers.wrappers import copied, unwrapped
from zoo.sparsity import (
    ChannelGroup,
    channel_counts,
    channel_groups,
    channel_positions,
    check_masks,
    counts,
    densities,
    n_m_mask,
    retire_channels,
    shrink,
    sparse_parameters,
    weakest_channels,
)
from zoo.sparsity.densities import apportion, layers_left_out, outputs_first, plain_name
from zoo.sparsity.masks import MASKS
from zoo.training.sparse_methods import SparsityRule

__all__ = ["MASKS", "SparseTraining", "largest", "prune_rate", "snip_scores"]

# whose updates of a weight depend on that weight alone, so that the others need not be there
ELEMENTWISE = (
    *("SGD", "SGDW", "Adam", "AdamW", "AdamWLegacy", "NAdam", "NAdamW", "RAdam", "Adamax", "Lion", "AdaBelief"),
    *("RMSprop", "RMSpropTF"),
)

# what an optimizer of timm's remembers of a weight that takes its first step, where that is not zero: of the gradient
BEGINNINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "Adan": ("neg_pre_grad", torch.neg),
    "Adopt": ("exp_avg_sq", torch.square),
    "RMSpropTF": ("square_avg", torch.ones_like),
}
# under which optimizers remember an average of the gradients
MOMENTA = ("exp_avg", "momentum_buffer", "momentum")

UNKNOWN_WARMUP = 100  # updates: `regrow_warmup` with optimizers that CORRECTIONS does not know, and no Adam

# what masks, and the number of weights that each keeps, were made by: the rest of a rule may change on the way
FIXED = ("density", "layers", "distribution", "masks", "dense_from", "pattern", "initial_density", "dead_channels")


class SparseTraining:
    """The masks of a model that is being trained.

    Args:
        model: its chosen weights are multiplied with their masks after every step, in place.
        rule: what `SparsityConfig.rule` gives.
        updates: of the whole run, by which `start` and `stop` are measured.
        updates_per_epoch: for an `update_interval` of an epoch.
        seed: of random masks. They depend on it, the update and the layer's name alone: not on the device, the number
            of processes, or other random numbers.
        agree: overwrites tensors with those of the first process, where there are several.
        input_size: (channels, height, width) of the images by which channels that may die out are found; by default
            what the model's `pretrained_cfg` says.

    `masks` holds the masks by the names of the weights; chosen layers without one keep all weights. Raises ConfigError
    where no layer is chosen, all chosen are frozen, and masks would never move, or a density not fall step by step,
    although the rule says so, or where they would move at every update in place of the optimizer's step.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: SparsityRule,
        *,
        updates: int,
        updates_per_epoch: int = 1,
        seed: int = 0,
        agree: Callable[[list[Tensor]], None] = lambda tensors: None,
        input_size: tuple[int, int, int] | None = None,
    ) -> None:
        if not isinstance(rule, SparsityRule):
            raise ConfigError(f"rule is what SparsityConfig(...).rule() gives, and not {type(rule).__name__}.")
        check_counts(1, updates=updates, updates_per_epoch=updates_per_epoch)
        self.model, self.rule, self.seed, self.agree, self.input_size = model, rule, seed, agree, input_size
        chosen = sparse_parameters(model, rule.layers)
        self.parameters = {name: parameter for name, parameter in chosen.items() if parameter.requires_grad}
        if not self.parameters:
            raise ConfigError("sparsity.layers chooses frozen weights alone: unfreeze some, or choose others.")
        modules = {plain_name(name): module for name, module in unwrapped(model).named_modules()}
        self.owners = {name: modules[name.rpartition(".")[0]] for name in self.parameters}
        by_epoch = rule.update_interval == "epoch"
        self.interval = updates_per_epoch if by_epoch else int(rule.update_interval)
        self.offset = int(by_epoch)  # with the first update of the next one, so that an epoch's end has learned
        self.begin, self.end = round(rule.start * updates), round(rule.stop * updates)
        self.falls = rule.initial_density is not None
        self.has_aim = self.falls or bool(rule.dead_channels)  # that is reached at the end, though no interval is
        self.moves = self.falls or rule.growth != "none"
        self.updates = updates
        latest = self.end if self.has_aim else min(self.end, updates - 1)
        first = max(-(-(self.begin - self.offset) // self.interval), 1) * self.interval + self.offset
        if self.moves and first > latest:
            what = "The density would fall all at once" if self.falls else "Masks would never move"
            raise ConfigError(
                f"{what}: sparsity.update_interval is {self.interval} updates, and masks may move from update "
                f"{self.begin} to {latest} of {updates}. Lower it"
                + ("." if self.falls else ", or set sparsity.growth to none.")
            )
        if rule.update_instead_of_step and self.moves and self.interval == 1:
            raise ConfigError(
                "Where masks move, sparsity.update_instead_of_step leaves the optimizer's step out: with "
                "sparsity.update_interval 1 nothing is learned. Raise the interval, or set it to false."
            )
        self.masks: dict[str, Tensor] = {}
        self.kept: dict[str, int] = {}  # weights that each mask keeps
        self.final: dict[str, int] = {}  # and that it keeps in the end
        self.steps = 0  # of the optimizer
        self.born: dict[str, Tensor] = {}  # the step at which a weight appeared; 0: it was there from the start
        self.optimizers: dict[str, torch.optim.Optimizer] = {}  # that hold the masked weights
        self.groups: dict[str, dict[str, Any]] = {}
        self.values: dict[str, nn.Parameter] = {}  # compact: the kept weights alone, in the optimizer's hands
        self.written: dict[str, tuple[int, int]] = {}  # and what `_writing` said when the whole was last the same
        self.channels: dict[str, ChannelGroup] = {}  # those that may die out
        self.retired: dict[str, list[int]] = {}  # those that did

    # ----------------------------------------------------------------------------------------------------------- start

    def start(self, saliency: Callable[[list[str]], Mapping[str, Tensor]] | None = None) -> None:
        """Make the first masks and apply them.

        `saliency` gives the scores of `snip_scores` for weights of these names, where the rule asks for them. Raises
        ConfigError where nothing becomes sparse, and after `attach`.
        """
        if self.optimizers:
            raise ConfigError("start() comes before attach(): make a SparseTraining anew to begin again.")
        rule, shapes = self.rule, self._shapes()
        scores: Mapping[str, Tensor] = {}
        if "snip" in (rule.distribution, rule.masks):
            if saliency is None:
                raise ConfigError("SNIP needs a batch to score weights with, and none was given.")
            scores = saliency(list(shapes))
            for name, shape in shapes.items():
                if getattr(scores.get(name), "shape", None) != shape:
                    raise ConfigError(f"saliency must give scores of {name}, a tensor of its shape {tuple(shape)}.")
        if rule.n_m is not None:
            masks = {name: self._n_m(name, self._choice(name, scores)) for name in shapes}
            self.final = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        elif rule.masks == "weights":
            masks = {name: parameter.detach() != 0 for name, parameter in self.parameters.items()}
            self.final = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        else:
            if rule.density is None:
                raise ConfigError("The rule needs a density: the share of weights to keep, such as 0.2.")
            if rule.distribution == "snip":
                total = sum(score.numel() for score in scores.values())
                self.final = largest(scores, round(rule.density * total))
            else:
                self.final = counts(shapes, densities(shapes, rule.density, rule.distribution))
            now = self.targets(0)
            masks = {name: _best(self._choice(name, scores), None, now[name]) for name in shapes}
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        with_zeros = [name for name, kept in self.final.items() if kept < sizes[name]]
        self.final = {name: kept for name, kept in self.final.items() if kept < rule.dense_from * sizes[name]}
        self.masks = {name: masks[name] for name in self.final}
        if rule.dead_channels:
            self._find_channels()
        if not self.masks:
            if with_zeros:
                cause = f"all are denser than sparsity.dense_from ({rule.dense_from:g}): raise it."
            elif rule.n_m is not None:
                cause = f"none has more inputs than sparsity.pattern {rule.pattern} keeps: choose other layers."
            else:
                cause = "the weights have no zeros." if rule.masks == "weights" else "lower sparsity.density."
            raise ConfigError(f"No layer would have a weight at zero: {cause}")
        self.agree(list(self.masks.values()))
        self._count()
        self.apply()

    def _n_m(self, name: str, scores: Tensor) -> Tensor:
        """The highest of every so many along a layer's inputs."""
        assert self.rule.n_m is not None
        module = self.owners[name]
        return outputs_first(n_m_mask(outputs_first(scores, module), *self.rule.n_m), module).contiguous()

    def _count(self) -> None:
        self.kept = {name: int(mask.count_nonzero()) for name, mask in self.masks.items()}

    def _find_channels(self) -> None:
        """The groups of channels that may die out, each of whose layers gets a mask. Raises ConfigError for none."""
        groups = channel_groups(self.model, self.input_size)
        if not groups:
            raise ConfigError(
                f"sparsity.dead_channels: {type(self.model).__name__} has no channels that can go: leave it out."
            )
        self.channels = {name: group for name, group in groups.items() if self._may_lose(group)}
        if not self.channels:
            raise ConfigError(
                "sparsity.dead_channels: all channels that can go touch frozen weights or layers that sparsity.layers "
                "does not choose. Choose or unfreeze the layers before and after them, or leave it out."
            )
        for name in (part.tensor for group in self.channels.values() for part in group.slices if part.role != "own"):
            if name not in self.masks:
                self.masks[name] = torch.ones_like(self.parameters[name], dtype=torch.bool)
                self.final[name] = self.parameters[name].numel()

    def _may_lose(self, group: ChannelGroup) -> bool:
        """Whether the layers that make and read a group's channels are chosen, and nothing of theirs is frozen."""
        every = unwrapped(self.model).named_parameters(remove_duplicate=False)
        frozen = {plain_name(name) for name, p in every if not p.requires_grad}
        return all(
            part.tensor not in frozen if part.role == "own" else part.tensor in self.parameters for part in group.slices
        )

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def _choice(self, name: str, scores: Mapping[str, Tensor]) -> Tensor:
        """By which the first mask keeps the highest."""
        match self.rule.masks:
            case "magnitude":
                return self.parameters[name].detach().abs()
            case "snip":
                return scores[name]
            case _:
                return self._random(name, 0)

    def _random(self, name: str, update: int) -> Tensor:
        parameter = self.parameters[name]
        return torch.rand(parameter.shape, generator=self._generator(name, update)).to(parameter.device)

    def _generator(self, name: str, update: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{update}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Take charge of what optimizers, made over the model's parameters, remember; of all, before their first step.

        Where they go on from a checkpoint, their `load_state_dict` comes after this. Raises ConfigError for optimizers
        that cannot do what the rule says or hold not all of the masked weights, or some twice, and where there are no
        masks yet.
        """
        if not self.masks:
            raise ConfigError("There are no masks yet: start() or load_state_dict() comes before attach().")
        if self.optimizers:
            raise ConfigError("attach() was called before: give it all optimizers at once.")
        held: dict[str, torch.optim.Optimizer] = {}
        names = {id(self.parameters[name]): name for name in self.masks}
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise ConfigError(f"attach() takes optimizers of torch, not {type(optimizer).__name__}.")
            for name in filter(None, (names.get(id(p)) for group in optimizer.param_groups for p in group["params"])):
                if held.setdefault(name, optimizer) is not optimizer:
                    raise ConfigError(f"Two optimizers hold {name}.")
        missing = [name for name in self.masks if name not in held]
        if len(missing) == len(self.masks):
            raise ConfigError("The optimizer holds none of the weights that are masked: is it another model's?")
        if missing and self.moves:
            raise ConfigError(
                f"No optimizer holds {missing[0]}, whose mask would move without its weights' learning: give attach() "
                "all optimizers at once, or choose sparsity.layers, or freeze what is not to learn."
            )
        for optimizer in optimizers:
            self._check_optimizer(optimizer, names)
        for optimizer in optimizers:
            self._attach(optimizer, names)

    def _attach(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        base = _base(optimizer)
        if _known(base) in BEGINNINGS:
            base.register_step_pre_hook(self._begin)
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                name = names.get(id(parameter))
                if name is None:
                    continue
                self.groups[name], self.optimizers[name] = group, base
                if self.rule.optimizer_state == "compact":
                    self.values[name] = nn.Parameter(parameter.detach().new_empty(0))
                    self._hold(name, self.values[name])
                    group["params"][i] = self.values[name]

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        """Raises ConfigError where it cannot do with masked weights what the rule says."""
        kind = type(optimizer).__name__
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    continue
                self._check_group(kind, group)
                if self.rule.optimizer_state == "compact" and _base(optimizer).state.get(parameter):
                    raise ConfigError(
                        f"{kind} remembers something of {name}: with sparsity.optimizer_state compact, attach() comes "
                        "before its first step, and before its load_state_dict()."
                    )

    def _check_group(self, kind: str, group: Mapping[str, Any]) -> None:
        if self.rule.optimizer_state == "compact" and kind not in ELEMENTWISE:
            raise ConfigError(
                f"sparsity.optimizer_state compact is for optimizers known to treat each weight by itself, and {kind} "
                "is none of them: take adamw or sgd, or optimizer_state active."
            )
        if group.get("caution") and self.rule.optimizer_state == "active":
            raise ConfigError(
                f"{kind} with caution divides by a mean over the whole tensor, of which weights at zero are part: "
                "its steps would be too long. Take sparsity.optimizer_state dense, or compact where it can be."
            )
        if self.rule.growth == "momentum" and not ("betas" in group or group.get("momentum")):
            raise ConfigError(f"sparsity.growth momentum: {kind} keeps none. Choose another optimizer or growth.")

    def _state(self, name: str) -> dict[str, Any]:
        """What the optimizer remembers of a weight."""
        return self.optimizers[name].state.get(self._held(name), {}) if name in self.optimizers else {}

    # ------------------------------------------------------------------------------------------------------------ steps

    def step(self, update: int, step: Callable[[], object]) -> None:
        """One update: `step()`, masks applied, and masks moved where the time has come.

        `update` counts from 1. Gradients are there, those of all processes and accumulated batches together. `step`
        may clip them; it answers False where it did nothing, as mixed precision does when gradients overflow. With
        `update_instead_of_step`, as of RigL, it is not called where masks move. Raises ConfigError where there are no
        masks yet, or for an `update` below 1.
        """
        check_counts(1, update=update)
        if not self.masks:
            raise ConfigError("There are no masks yet: start() or load_state_dict() comes before step().")
        due = self.is_due(update)
        scores = self._gradients() if due and self.rule.growth == "gradient" else {}
        self._confine_gradients()
        self._take_changes()
        if not (due and self.rule.update_instead_of_step):
            before = {name: self._held(name).detach().clone() for name in self.masks if self._is_rescaled(name)}
            if step() is not False:
                self.steps += 1
                self._rescale(before)
                if self.rule.growth == "momentum" and self.steps == 1:
                    for name in self.masks:  # now, and not where masks first move
                        self._momentum(name)
            self._write()
        if due:
            self.move(update, scores)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the weights that masks leave out to zero, as after others were loaded."""
        self._take_changes()
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for name, mask in self.masks.items():
            if name in self.values:
                self.parameters[name].masked_scatter_(mask, self.values[name].detach())
                self.written[name] = _writing(self.parameters[name])
            else:
                self.parameters[name].masked_fill_(~mask, 0)

    @torch.no_grad()
    def _take_changes(self) -> None:
        """Compact: what others wrote into the weights, as by loading some."""
        for name, held in self.values.items():
            if _writing(self.parameters[name]) != self.written[name]:
                self.parameters[name].masked_fill_(~self.masks[name], 0)
                self._hold(name, held)

    def _hold(self, name: str, held: nn.Parameter) -> None:
        """Compact: the kept weights as they are, in the optimizer's hands."""
        parameter = self.parameters[name]
        held.data = parameter.detach()[self.masks[name]]
        self.written[name] = _writing(parameter)

    def average(self, ema: ModelEmaV3, update: int) -> None:
        """Update an average of the model so that it has the same zeros.

        A weight that appeared has no past to average: the average takes it as it is.
        """
        averages = {plain_name(name): average for name, average in unwrapped(ema.module).named_parameters()}
        fresh = {name: mask & (averages[name].detach() == 0) for name, mask in self.masks.items()}
        ema.update(self.model, step=update)
        with torch.no_grad():
            for name, mask in self.masks.items():
                average = averages[name]
                newest = torch.where(fresh[name], self.parameters[name].to(average), average)
                average.copy_(newest.masked_fill_(~mask, 0))

    def _held(self, name: str) -> nn.Parameter:
        """The parameter in the optimizer's hands."""
        return self.values.get(name, self.parameters[name])

    def _gradients(self) -> dict[str, Tensor]:
        gradients = {name: self.parameters[name].grad for name in self.masks}
        return {
            name: torch.zeros_like(self.parameters[name]) if gradient is None else gradient.detach().abs().clone()
            for name, gradient in gradients.items()
        }

    def _confine_gradients(self) -> None:
        """To the kept weights, unless the optimizer is to follow all."""
        if self.rule.optimizer_state == "dense":
            return
        for name, mask in self.masks.items():
            parameter = self.parameters[name]
            if name in self.values:
                self.values[name].grad = None if parameter.grad is None else parameter.grad[mask]
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)

    def _is_rescaled(self, name: str) -> bool:
        return name in self.born or self.rule.lr_density_power != 0

    @torch.no_grad()
    def _rescale(self, before: Mapping[str, Tensor]) -> None:
        """Lengthen or shorten the step that was just taken from `before`."""
        for name, start in before.items():
            if self.kept[name] == 0:
                continue
            held = self._held(name)
            density = self.kept[name] / self.masks[name].numel()
            factor = torch.full_like(held, density**-self.rule.lr_density_power)
            if name in self.born:
                born = self.born[name]
                age = (self.steps - born).to(held.dtype)
                factor = torch.where(born > 0, factor * self._cold_start(name, age), factor)
            held.copy_(torch.lerp(start, held, factor))

    def _cold_start(self, name: str, age: Tensor) -> Tensor:
        """What a step must be multiplied with so that its averages are corrected for `age` updates of a weight, and
        that it is warmed up."""
        young, warmup = torch.ones_like(age), self.rule.regrow_warmup
        if name in self.groups:
            state, group = self._state(name), self.groups[name]
            correction = CORRECTIONS.get(_known(self.optimizers[name]) or "")
            if correction is None and state.keys() >= {"exp_avg", "exp_avg_sq"} and len(group.get("betas", ())) == 2:
                correction = _as_adam  # one of another package
            if correction is not None:
                step = torch.full_like(age, float(state.get("step", group.get("step", self.steps))))
                young = correction(group, state, age, step)
            else:
                warmup = warmup or UNKNOWN_WARMUP
        return young * (age / warmup).clamp(max=1) if warmup else young

    @torch.no_grad()
    def _begin(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """Let the optimizer, about to step, remember what it would of weights that take their first one."""
        key, beginning = BEGINNINGS[str(_known(optimizer))]
        for name, born in self.born.items():
            held, state = self._held(name), self._state(name)
            if self.optimizers.get(name) is optimizer and key in state and held.grad is not None:
                state[key] = torch.where((born > 0) & (born == self.steps), beginning(held.grad), state[key])

    # ------------------------------------------------------------------------------------------------------- topologies

    def is_due(self, update: int) -> bool:
        """Whether masks move at this update.

        A resumed run whose schedule is another may be past the end without being where it was to be: then they do.
        """
        if update > self.end:
            return self._is_short_of_its_aim()
        aims = self.has_aim and update == self.end
        by_interval = update > self.interval * self.offset and (update - self.offset) % self.interval == 0
        if not self.begin <= update <= self.end or not (by_interval or aims):
            return False
        return self.has_aim or (self.rule.growth != "none" and self.rate(update) > 0 and update < self.updates)

    def _is_short_of_its_aim(self) -> bool:
        if self.falls and any(self.kept[name] > count for name, count in self.final.items()):
            return True
        share = self.rule.dead_channels
        return any(
            len(self.retired.get(name, ())) < min(int(share * group.size + 1e-9), group.size - 1)
            for name, group in self.channels.items()
        )

    def rate(self, update: int) -> float:
        """The share of kept weights that move at this update."""
        rule = self.rule
        return prune_rate(self._progress(update), rule.prune_rate, rule.final_prune_rate, rule.prune_schedule)

    def _progress(self, update: int) -> float:
        return min(max((update - self.begin) / max(self.end - self.begin, 1), 0.0), 1.0)

    def targets(self, update: int) -> dict[str, int]:
        """How many weights each layer keeps after this update.

        Where the density falls, a layer's sparsity is its final one times a factor that is the same for all, so that
        the whole follows s = s_f + (s_i - s_f) (1 - t)^3 (Zhu and Gupta 2017, arXiv 1710.01878, equation 1).
        """
        initial, final = self.rule.initial_density, self.rule.density
        if initial is None or final is None or final == 1 or update >= self.end:
            return self.final
        factor = 1 + ((1 - initial) / (1 - final) - 1) * (1 - self._progress(update)) ** 3
        sizes = {name: self.parameters[name].numel() for name in self.final}
        in_the_end = {name: sizes[name] - kept for name, kept in self.final.items()}
        pruned = apportion(round(sum(in_the_end.values()) * factor), in_the_end)
        return {name: size - pruned[name] for name, size in sizes.items()}

    @torch.no_grad()
    def move(self, update: int, gradients: Mapping[str, Tensor]) -> None:
        """Prune and grow. `gradients` are magnitudes; where they overflowed, no weights change places this time.

        Nor do they at the last update of all: those that appear would never learn.
        """
        grows = self.rule.growth != "none" and update < self.updates
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            if not self.has_aim:
                return
            grows, gradients = False, {}
        targets, rate = self.targets(update), self.rate(update)
        if self.falls:  # not beyond what is left, where a run goes on with a longer schedule
            targets = {name: min(count, self.kept[name]) for name, count in targets.items()}
        closed = channel_positions(self.model, self.channels, self.retired)
        fresh = {}
        for name, mask in self.masks.items():
            scores = self._scores(name, update, gradients) if grows else None
            # where all are zero, as of a path that was not taken, nothing says where to grow
            moving = math.ceil(rate * targets[name]) if scores is not None and scores.any() else 0
            kept = self._prune(name, mask, targets[name] - moving)
            if scores is not None and moving:
                free = ~(kept | closed[name].to(kept.device)) if name in closed else ~kept
                kept = self._grow(name, kept, free, moving, update, scores)
            fresh[name] = kept
        if self.channels:
            self.agree(list(fresh.values()))  # which channels go is read from them
            fresh = self._retire(fresh, update, gradients)
        self.agree(list(fresh.values()))
        for name, mask in fresh.items():
            self._adopt(name, mask)
        self._count()

    def _prune(self, name: str, mask: Tensor, count: int) -> Tensor:
        """`mask`, but for its smallest weights: `count` are left."""
        weight = self.parameters[name].detach()
        if self.rule.prune == "magnitude":
            return _best(weight.abs(), mask, count)
        negative = mask & (weight < 0)
        below, active = int(negative.count_nonzero()), int(mask.count_nonzero())
        count_below = round(count * below / active) if active else 0
        count_above = min(count - count_below, active - below)
        above = _best(weight.abs(), mask & ~negative, count_above)
        return above | _best(weight.abs(), negative, count - count_above)

    def _scores(self, name: str, update: int, gradients: Mapping[str, Tensor]) -> Tensor:
        """By which the highest of the weights at zero appear."""
        match self.rule.growth:
            case "gradient" if gradients:
                return gradients[name]
            case "momentum":
                return self._momentum(name)
            case _:
                return self._random(name, update)

    def _grow(self, name: str, kept: Tensor, free: Tensor, count: int, update: int, scores: Tensor) -> Tensor:
        if self.rule.n_m is not None:
            return self._n_m(name, scores.masked_fill(kept, math.inf))
        count = min(count, int(free.count_nonzero()))
        above = scores > 0
        if int((free & above).count_nonzero()) < count:  # the rest at random, not side by side
            scores = self._random(name, update).to(scores.dtype).masked_fill_(above, 2.0)
        return kept | _best(scores, free, count)

    def _retire(self, masks: dict[str, Tensor], update: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let more channels die out, those with the fewest weights, which their layers get back elsewhere (Chase)."""
        weakest = weakest_channels(self.model, self.channels, self.rule.dead_channels * self._progress(update), masks)
        going = {}
        for name, numbers in weakest.items():
            before = self.retired.get(name, [])
            more = [number for number in numbers.tolist() if number not in before][: len(numbers) - len(before)]
            if more:
                going[name] = more
        masks = retire_channels(
            self.model,
            self.channels,
            going,
            masks,
            retired=self.retired,
            scores=gradients or None,
            generator=self._generator("channels", update),
        )
        self.retired = {
            name: sorted(self.retired.get(name, []) + going.get(name, [])) for name in {**self.retired, **going}
        }
        masks = self._refill(masks, update, gradients)
        self.final = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        return masks

    def _refill(self, masks: dict[str, Tensor], update: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Grow what found no room in its own layer in the others, in proportion to their room."""
        closed = channel_positions(self.model, self.channels, self.retired)
        free = {
            name: ~(mask | closed[name].to(mask.device)) if name in closed else ~mask for name, mask in masks.items()
        }
        room = {name: int(positions.count_nonzero()) for name, positions in free.items()}
        missing = sum(self.final.values()) - sum(int(mask.count_nonzero()) for mask in masks.values())
        if not missing:
            return masks
        share = min(1.0, missing / max(sum(room.values()), 1))
        more = counts({name: (places,) for name, places in room.items()}, dict.fromkeys(room, share))
        return {
            name: self._grow(name, mask, free[name], more[name], update, self._scores(name, update, gradients))
            if more[name]
            else mask
            for name, mask in masks.items()
        }

    def _room(self) -> int:
        """How many weights of the layers with masks are left when all channels that are to die out did."""
        dying = weakest_channels(self.model, self.channels, self.rule.dead_channels, self.masks)
        closed = channel_positions(self.model, self.channels, dying)
        return sum(
            m.numel() - int(closed[name].count_nonzero() if name in closed else 0) for name, m in self.masks.items()
        )

    def _momentum(self, name: str) -> Tensor:
        """How far the optimizer would move each weight: |m| / (sqrt(v) + 1e-8), or |m| where it keeps no v.

        Raises ConfigError where it keeps no m.
        """
        state = self._state(name)
        momentum = next((state[key] for key in MOMENTA if key in state), None)
        if momentum is None and state:
            kind = type(self.optimizers[name]).__name__
            raise ConfigError(f"sparsity.growth momentum: {kind} keeps none. Choose another optimizer or growth.")
        if momentum is None:
            return torch.zeros_like(self.parameters[name])
        squares = state.get("exp_avg_sq")
        return momentum.abs() if squares is None else momentum.abs() / (squares.sqrt() + 1e-8)

    def _adopt(self, name: str, new: Tensor) -> None:
        """Change a mask, and with it the weights and what the optimizer remembers of them."""
        old, parameter = self.masks[name], self.parameters[name]
        parameter.masked_fill_(~new, 0)
        self.masks[name] = new
        if self.rule.optimizer_state == "dense" or not self.optimizers:
            return
        held, state = self._held(name), self._state(name)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == held.shape and value.ndim:
                state[key] = self._carried(name, value, old, new)
        appeared = new & ~old
        if name in self.born or appeared.any():
            born = self.born.get(name, torch.zeros_like(held, dtype=torch.int32))
            born = self._carried(name, born, old, new)
            self.born[name] = born.masked_fill(appeared[new] if name in self.values else appeared, self.steps)
        if name in self.values:
            held.grad = None
            self._hold(name, held)

    def _carried(self, name: str, value: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """What is remembered for each held weight, under another mask: zero for weights that appeared."""
        if name not in self.values:
            return value.masked_fill(~(old & new), 0)
        return torch.zeros(old.shape, dtype=value.dtype, device=value.device).masked_scatter_(old, value)[new]

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All but the masks, as plain data and tensors."""
        return {
            "optimizer_state": self.rule.optimizer_state,
            "rule": {name: _plain(getattr(self.rule, name)) for name in FIXED},
            "final": dict(self.final),
            "steps": self.steps,
            "born": dict(self.born),
            "retired": dict(self.retired),
        }

    def load_state_dict(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint: before `attach`, or after it, back to one of the same run.

        The model's `load_state_dict` comes before this, the optimizers' after it. Raises CheckpointError for what is no
        such state, masks of another model or of weights that are frozen now, a rule or a number of weights that the
        masks do not follow, an optimizer's state of another kind, and, after `attach`, masks of other layers.
        """
        wanted = ("optimizer_state", "final", "steps", "born", "retired")
        if not isinstance(state, Mapping) or not all(key in state for key in wanted):
            raise CheckpointError(f"This is no state of sparse training, which has {', '.join(wanted)}.")
        if (state["optimizer_state"] == "compact") != (self.rule.optimizer_state == "compact"):
            raise CheckpointError(
                f"The checkpoint was trained with sparsity.optimizer_state {state['optimizer_state']}, not "
                f"{self.rule.optimizer_state}: set it to that."
            )
        for field, before in state.get("rule", {}).items():
            if (now := _plain(getattr(self.rule, field))) != before:
                raise CheckpointError(
                    f"The checkpoint was trained with sparsity.{field} {before}, not {now}, and its masks follow that. "
                    "Set it to that; or begin a run in another output.dir, which may start from these weights "
                    "(model.checkpoint_path)."
                )
        found = check_masks(self.model, masks)
        lost = [name for name in state["final"] if name not in masks]
        if lost:
            raise CheckpointError(f"The checkpoint's masks are not whole: there is none of {lost[0]}.")
        for name in found:
            if name not in self.parameters:
                raise CheckpointError(
                    f"The checkpoint has a mask of {name}, which is frozen now, or not among sparsity.layers: unfreeze "
                    "it, or begin a run in another output.dir."
                )
        if self.optimizers and masks.keys() != self.masks.keys():
            raise CheckpointError("The checkpoint has masks of other layers: load it before attach().")
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                kind = str(mask.dtype).removeprefix("torch.")
                raise CheckpointError(f"The mask of {name} must be of bool, not {kind}.")
            final, kept = state["final"].get(name), int(mask.count_nonzero())
            if final is None or kept < final or (kept > final and not self.falls):
                raise CheckpointError(
                    f"The mask of {name} keeps {kept} weights, not the {final} of the checkpoint: it is another one's."
                )
        self.masks = {name: mask.to(found[name].device) for name, mask in masks.items()}
        self.final, self.steps = dict(state["final"]), state["steps"]
        self.born = {name: born.to(found[name].device) for name, born in state["born"].items()}
        self.retired = dict(state["retired"])
        if self.rule.dead_channels:
            self._find_channels()
        for name in self.retired:
            if name not in self.channels:
                raise CheckpointError(
                    f"Channels of {name} died out in the checkpoint, and some of their parameters are frozen now: "
                    "unfreeze them, or begin a run in another output.dir."
                )
        self._count()
        for name, held in self.values.items():
            self._hold(name, held)
        self.apply()

    # ---------------------------------------------------------------------------------------------------------- outcome

    def cut(self, model: nn.Module) -> int:
        """Slice the channels that no weight reads from a copy of the model, in place, and say how many they are.

        It computes what it did. They are those that died out, and others that lost their last reader by themselves; of
        a channel that is read, though no weight makes it, the bias goes on, and it stays.
        """
        unread = {}
        for name, (_, outgoing) in channel_counts(self.channels, self.masks).items():
            unread[name] = (outgoing == 0).nonzero().flatten()[: self.channels[name].size - 1]
        shrink(model, self.channels, unread)
        return sum(len(numbers) for numbers in unread.values())

    @property
    def density(self) -> float:
        """The share of the chosen layers' weights that is kept."""
        total = sum(parameter.numel() for parameter in self.parameters.values())
        return 1 - sum(mask.numel() - self.kept[name] for name, mask in self.masks.items()) / total

    def density_at(self, update: int) -> float:
        """What `density` is after this update where it falls."""
        last = max(filter(self.is_due, range(1, update + 1)), default=0)
        total = sum(parameter.numel() for parameter in self.parameters.values())
        targets = self.targets(last)
        return 1 - sum(self.masks[name].numel() - kept for name, kept in targets.items()) / total

    def describe(self) -> str:
        """One line on what is sparse."""
        total = sum(parameter.numel() for parameter in self.parameters.values())
        text = (
            f"Sparse: {len(self.masks)} of {len(self.parameters)} chosen layers; {self.density:.2%} of their "
            f"{total:,} weights kept."
        )
        kept, room = sum(self.kept.values()), self._room() if self.channels else total
        if kept > room:
            text += (
                f" The channels that are to live have room for {room:,} weights, not {kept:,}: they end dense, at "
                f"{self.density - (kept - room) / total:.2%}."
            )
        if self.rule.layers == "all" and (left_out := layers_left_out(self.model)):
            text += (
                " Layers stay dense whose weights are made of others, or hold those of several: "
                f"{', '.join(left_out[:3])}{' and others' * (len(left_out) > 3)}."
            )
        starts_anew = self.rule.growth != "none" and self.rule.optimizer_state != "dense"
        unknown = [type(o).__name__ for o in self.optimizers.values() if _known(o) is None]
        if starts_anew and unknown and not self.rule.regrow_warmup:
            text += (
                f" How {unknown[0]} begins with a weight is not known here: unless it keeps Adam's "
                f"averages, the steps of weights that appear grow over {UNKNOWN_WARMUP} updates "
                "(sparsity.regrow_warmup)."
            )
        empty = [name for name, kept in self.final.items() if kept == 0]
        if empty:
            text += f" Nothing is left of {', '.join(empty[:3])}{' and others' * (len(empty) > 3)}: raise the density?"
        return text


def prune_rate(progress: float, first: float, last: float, schedule: str) -> float:
    """The rate after a share of the time: from `first` to `last` by "cosine" or "linear"; "constant" is `first`."""
    match schedule:
        case "cosine":
            return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return first + (last - first) * progress
        case "constant":
            return first
        case _:
            raise ConfigError(f"There is no schedule {schedule!r}: take cosine, linear or constant.")


def snip_scores(
    model: nn.Module,
    names: Sequence[str],
    losses: Sequence[Callable[[nn.Module], Tensor]],
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """|weight x gradient| of the named weights, for the mean of `losses`: how much the loss depends on each.

    Lee et al., "SNIP", ICLR 2019, arXiv 1810.02340, equation 4, without its division by the sum. `losses` take a copy
    of the model in training mode, in which drop path and dropout rest: else a block that is dropped scores zero.
    `average` makes one gradient of all processes'. Raises ConfigError where scores are not finite, or all of a weight's
    are zero.
    """
    twin = copied(model).train()
    for module in twin.modules():
        if isinstance(module, DropPath | DropBlock2d | PatchDropout | _DropoutNd):
            module.eval()
        if isinstance(getattr(module, "drop_rate", None), float):  # timm's ResNets and MobileNets drop without a module
            module.drop_rate = 0.0  # type: ignore[assignment]
        if isinstance(module, nn.MultiheadAttention) or isinstance(getattr(module, "attn_drop", None), nn.Dropout):
            module.training = False  # fused attention asks its module whether to drop
    for loss in losses:
        (loss(twin) / len(losses)).backward()
    parameters, scores = {plain_name(name): parameter for name, parameter in unwrapped(twin).named_parameters()}, {}
    for name in names:
        weight = parameters[name].detach()
        gradient = parameters[name].grad
        scores[name] = (weight * average(torch.zeros_like(weight) if gradient is None else gradient)).abs()
    sums = [score.double().sum() for score in scores.values()]
    if not (math.isfinite(float(sum(sums))) and float(sum(sums)) > 0):
        raise ConfigError("SNIP cannot score the weights: the loss's gradients are zero or not finite. Take erk.")
    if idle := [name for name, total in zip(scores, sums, strict=True) if not total]:
        raise ConfigError(
            f"SNIP scores every weight of {some(idle, 3)} zero, and would remove them whole: the loss does not depend "
            "on them at first, as on what lies before a norm or a layer that begins at zero (timm's zero_init_last) or "
            "on a path that is not taken. Take erk, leave them out of sparsity.layers, or let nothing begin at zero."
        )
    return scores


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """How many of the `count` largest of all scores each layer holds."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    chosen = _best(everything, None, count)
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: int(part.count_nonzero()) for name, part in zip(scores, parts, strict=True)}


def _writing(parameter: nn.Parameter) -> tuple[int, int]:
    """Something else after each writing into it, or exchange of its data."""
    return parameter._version, parameter.data_ptr()


def _base(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Within timm's Lookahead, the optimizer that remembers."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def _known(optimizer: torch.optim.Optimizer) -> str | None:
    """The kind of an optimizer whose corrections are known."""
    return next((c.__name__ for c in type(optimizer).__mro__ if c.__name__ in CORRECTIONS), None)


def _plain(value: Any) -> Any:
    """As a checkpoint holds it."""
    return list(value) if isinstance(value, tuple) else value


def _best(scores: Tensor, among: Tensor | None, count: int) -> Tensor:
    """A mask of exactly the `count` highest scores, which are not negative, among those of a mask."""
    candidates = scores if among is None else scores.masked_fill(~among, -1.0)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[candidates.flatten().topk(count, sorted=False).indices] = True
    return mask.view(scores.shape)


def _grown(beta: float, age: Tensor) -> Tensor:
    """1 - beta ** age, to the last digit."""
    return -torch.expm1(age * math.log(beta)) if beta > 0 else torch.ones_like(age)


# ---------------------------------------------------------------------------------------------------------- cold starts
# What the steps of a weight are multiplied with, by the options of its group, what the optimizer remembers of its
# tensor, its age, and the number of all steps. Averages that nothing corrects, and that steps are not divided by, begin
# with short steps of themselves: they stay so.

Correction: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor, Tensor], Tensor]


def _as_adam(group: Mapping[str, Any], state: Mapping[str, Any], age: Tensor, step: Tensor) -> Tensor:
    """Both averages are corrected for all steps; LAMB's on request."""
    first, second = group["betas"][0], group["betas"][-1]
    if not group.get("bias_correction", True):
        return _grown(second, age).sqrt()
    return (_grown(second, age) / _grown(second, step)).sqrt() / (_grown(first, age) / _grown(first, step))


def _as_nadam(group: Mapping[str, Any], state: Mapping[str, Any], age: Tensor, step: Tensor) -> Tensor:
    """The first average is joined by the gradient, so that it does not begin short."""
    return (_grown(group["betas"][1], age) / _grown(group["betas"][1], step)).sqrt()


def _as_adamax(group: Mapping[str, Any], state: Mapping[str, Any], age: Tensor, step: Tensor) -> Tensor:
    """The maximum needs no correction."""
    return _grown(group["betas"][0], step) / _grown(group["betas"][0], age)


def _as_rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], age: Tensor, step: Tensor) -> Tensor:
    return _grown(group["alpha"], age).sqrt()


def _as_adagrad(group: Mapping[str, Any], state: Mapping[str, Any], age: Tensor, step: Tensor) -> Tensor:
    """A sum over all steps shortens them."""
    return (age / step.clamp(min=1)).sqrt()


def _as_adafactor(group: Mapping[str, Any], state: Mapping[str, Any], age: Tensor, step: Tensor) -> Tensor:
    """Averages of rows and columns do not start anew, those of tensors too small for that do."""
    if "exp_avg_sq" not in state:
        return torch.ones_like(age)
    beta = 1 - float(step.flatten()[0]) ** -abs(group["decay_rate"])
    return _grown(min(beta, group.get("beta2_cap", 1.0)), age).sqrt()


def _as_it_is(group: Mapping[str, Any], state: Mapping[str, Any], age: Tensor, step: Tensor) -> Tensor:
    return torch.ones_like(age)


CORRECTIONS: dict[str, Correction] = {
    **dict.fromkeys(("Adam", "AdamW", "AdamWLegacy", "AdamP", "NAdamW", "RAdam", "RAdamLegacy", "Lamb"), _as_adam),
    **dict.fromkeys(("AdaBelief", "Adan", "LaProp", "Mars"), _as_adam),
    **dict.fromkeys(("NAdam", "NAdamLegacy"), _as_nadam),
    **dict.fromkeys(("Adafactor", "AdafactorBigVision"), _as_adafactor),
    **dict.fromkeys(("SGD", "SGDW", "SGDP", "Lars", "Lion", "Adopt", "RMSpropTF", "Adadelta", "NvNovoGrad"), _as_it_is),
    "Adamax": _as_adamax,
    "RMSprop": _as_rmsprop,
    "Adagrad": _as_adagrad,
}
