"""What a language model costs, counted: reading a prompt (prefill), and one more token (decode)."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError, first_line
from zoo.layers.decoder import outline
from zoo.profiling.flops import Trace, meta_twin
from zoo.profiling.report import Profile, costs_of
from zoo.profiling.resolve import check_count
from zoo.units import humanize

TOKENS = 128  # where none are asked for
CONVENTION = (
    "MACs: linear layers, head and attention, one fused multiply-add counts one; attention counts every pair of a new "
    "and a remembered token, masked ones too. Prefill: all tokens of the prompt, the head for the last alone. Decode: "
    "one token that sees as many, itself among them. fvcore total: MACs and norms. Activations: output elements of the "
    "operators that have MACs."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanguageProfile(Profile):
    """What a language model costs. MACs, fvcore total, activations, operators and modules are those of one token at
    decode, which sees `tokens`, itself among them; `prefill` has those of a prompt of `tokens`.
    """

    tokens: int
    prefill: Profile
    kv_bytes: int  # remembered of `tokens` tokens, in the weights' own precision

    @property
    def attention_macs(self) -> int:
        """Of `macs`, those of comparing with and summing over what is remembered."""
        return _attention_macs(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        facts = {**dataclasses.asdict(self), "convention": CONVENTION}
        for part, profile in ((facts, self), (facts["prefill"], self.prefill)):
            del part["input_size"]
            part["attention_macs"] = _attention_macs(profile)
        return facts

    def summary(self) -> str:
        """The totals in a few lines."""
        weights = ", ".join(f"{humanize(size)}B {dtype}" for dtype, size in self.weight_bytes.items())
        lines = [
            f"{self.name}, {self.batch_size} x {self.tokens:,} tokens",
            f"  parameters    {self.params:,}",
            f"  weights       {weights or 'none'}",
            f"  memory        {humanize(self.kv_bytes)}B of keys and values",
        ]
        for label, part in (("prefill", self.prefill), ("decode", self)):
            attention = _attention_macs(part)
            lines.append(f"  {label:<13} {part.macs:,} MACs, of which attention has {attention:,}")
        if self.effective and self.effective.density < 1:
            lines.append(f"  effective     {self.effective}")
        unknown = {**self.prefill.unknown_operators, **self.unknown_operators}
        if unknown:
            lines.append(f"  NOT COUNTED   operators without a handler: {', '.join(unknown)}")
        else:
            lines.append("  coverage      every operator that ran is accounted for")
        return "\n".join(lines)

    def table(self, depth: int = 2, width: int = 120) -> str:
        """The totals, and the cost of every module down to `depth` and of every operator, as text.

        Each row holds what lies below it too. Raises ConfigError for a negative depth.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table

        check_count("depth", depth, least=0)
        console = Console(width=width, color_system=None)
        passes = (self.prefill, self)
        modules = Table("module", "type", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("params", "%", "prefill MACs", "%", "decode MACs", "%"):
            modules.add_column(heading, justify="right", no_wrap=True)
        for module, at_prefill in zip(self.modules, self.prefill.modules, strict=True):
            if module.depth > depth or not (module.params or module.macs):
                continue
            label = "  " * module.depth + (module.name.rpartition(".")[2] or self.name)
            parts = ((module.params, self.params), (at_prefill.macs, passes[0].macs), (module.macs, passes[1].macs))
            modules.add_row(label, module.type, *(cell for part in parts for cell in _share(*part)))
        root, root_at_prefill = self.modules[0], self.prefill.modules[0]
        if depth and root.own_macs:  # the head, whose matrix may be the embedding's, is no module's call
            own = (_share(root_at_prefill.own_macs, passes[0].macs), _share(root.own_macs, passes[1].macs))
            modules.add_row("  (head)", "Linear", "", "", *(cell for cells in own for cell in cells))
        operators = Table("operator", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("prefill calls", "prefill MACs", "decode calls", "decode MACs"):
            operators.add_column(heading, justify="right", no_wrap=True)
        columns = [{operator.name: operator for operator in part.operators} for part in passes]
        for name in dict.fromkeys(name for column in columns for name in column):
            found = [column.get(name) for column in columns]
            cells = ((str(o.calls), humanize(o.macs)) if o else ("", "") for o in found)
            operators.add_row(name, *(cell for pair in cells for cell in pair))
        with console.capture() as capture:
            console.print(self.summary(), highlight=False)
            console.print()
            console.print(modules)
            console.print(operators)
            console.print(CONVENTION, highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __str__(self) -> str:
        return self.table(depth=1)


def _share(part: int, whole: int) -> tuple[str, str]:
    return humanize(part), f"{part / whole:.1%}" if whole else "-"


def _attention_macs(profile: Profile) -> int:
    return sum(o.macs for o in profile.operators if o.name == "scaled_dot_product_attention")


def _quantized(model: Any) -> dict[str, Any]:
    """The fields of a profile about weights that no parameters hold, where they are stored in 8 or 4 bits."""
    if getattr(model, "quantization", None) is None:
        return {}
    params = sum(p.numel() for p in outline(model).parameters())
    stored: Counter[str] = Counter()
    for tensor in model.state_dict().values():
        stored[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    counts = {"params": params, "trainable_params": 0, "frozen_params": params}
    return {**counts, "weight_bytes": dict(stored), "effective": None}  # zeros of the few that kept their precision


def profile_language(
    model: nn.Module,
    name: str,
    tokens: int | None,
    batch_size: int,
    sparsity: float | None,
    sparsity_rule: str,
) -> LanguageProfile:
    """The profile of a decoder, which is left as it is. Raises ConfigError for more tokens than its context has."""
    decoder: Any = model
    length = min(TOKENS, decoder.config.context_length) if tokens is None else tokens
    check_count("tokens", length)
    if length > decoder.config.context_length:
        raise ConfigError(f"{length} tokens are more than the context of {name}, {decoder.config.context_length}.")

    def costs(twin: Any, new: int, **options: Any) -> dict[str, Any]:
        twin.forward = functools.partial(twin.forward, **options)
        try:
            trace = Trace(twin, (torch.zeros(batch_size, new, dtype=torch.long, device="meta"),))
        except Exception as error:
            reason = first_line(error)
            raise ConfigError(f"{name} cannot be traced with {batch_size} x {new} tokens: {reason}") from error
        return costs_of(model, trace, sparsity, sparsity_rule)

    shared: dict[str, Any] = {"name": name, "input_size": (length,), "batch_size": batch_size, "traced_on": "meta"}
    twin: Any = meta_twin(model)
    cache = twin.make_cache(batch_size, length)
    cache.length = length - 1  # that many are remembered, whatever they were
    return LanguageProfile(
        **shared,
        **costs(twin, 1, cache=cache) | _quantized(decoder),
        tokens=length,
        prefill=Profile(**shared, **costs(meta_twin(model), length, logits_to_keep=1)),
        kv_bytes=cache.nbytes,
    )
