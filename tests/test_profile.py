"""Profiles: every count worked out by hand, equal to fvcore's where fvcore counts, and complete over the registry."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from PIL import Image
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.models import SIZE, create, each_vision_model
from tests.profiles import NORMS, profiled
from zoo.errors import ConfigError, UnknownModelError
from zoo.profiling.flops import FREE, HANDLES, einsum_contractions


class Apply(nn.Module):
    """A function of the images as a module; the modules it takes beside them are its children."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(x, **self._modules)


def costs(module, size=(3, 8, 8), batch=1):
    """(MACs, fvcore total, activations), of which nothing may be missing."""
    profile = zoo.profile(module, size, batch)
    assert profile.complete, profile.unknown_operators
    return profile.macs, profile.fvcore_total, profile.activations


# ------------------------------------------------------------------------------------------------------- worked by hand


@pytest.mark.parametrize(
    ("module", "size", "batch", "macs", "activations"),
    [
        # 2 images, 4x4 output pixels, 8 filters of 3x3x3
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 8, 8), 2, 2 * 16 * 8 * 27, 2 * 16 * 8),
        # 6x6 output pixels, 8 filters that see 4/2 channels each
        (nn.Conv2d(4, 8, 3, groups=2), (4, 8, 8), 1, 36 * 8 * 2 * 9, 36 * 8),
        # depthwise: 8x8 output pixels, 4 filters of 7x7x1
        (nn.Conv2d(4, 4, 7, padding=3, groups=4), (4, 8, 8), 1, 64 * 4 * 49, 64 * 4),
        # dilation widens the filter, not its weights: 8 - 2*2 = 4x4 output pixels
        (nn.Conv2d(3, 5, 3, dilation=2), (3, 8, 8), 1, 16 * 5 * 27, 16 * 5),
        # "same" with an even kernel pads one side more than the other: 8x8 output pixels
        (nn.Conv2d(3, 5, 4, padding="same"), (3, 8, 8), 1, 64 * 5 * 3 * 16, 64 * 5),
        (nn.Conv2d(3, 5, 4, padding="valid"), (3, 8, 8), 1, 25 * 5 * 3 * 16, 25 * 5),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 8, 8), 1, 64 * 5 * 27, 64 * 5),
        # an image without a batch dimension
        (Apply(lambda x: F.conv2d(x[0], torch.ones(5, 3, 3, 3))), (3, 8, 8), 1, 36 * 5 * 27, 36 * 5),
        # padding worked out from the shape of the weights, as (3 - 1) / 2
        (
            Apply(lambda x, c: F.conv2d(x, c.weight, padding=c.weight.shape[-1] // 2), c=nn.Conv2d(3, 5, 3)),
            (3, 8, 8),
            1,
            64 * 5 * 27,
            64 * 5,
        ),
        # a line of 64 pixels, 62 output pixels
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 3)), (3, 8, 8), 1, 62 * 5 * 9, 62 * 5),
        # the channels as depth: 1x6x6 output voxels of one 3x3x3 filter
        (nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3)), (3, 8, 8), 1, 36 * 2 * 27, 36 * 2),
        # transposed: each of 8x8 input pixels spreads its 3 channels over 2x2x5 outputs; 16x16 output pixels
        (nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 8, 8), 1, 64 * 3 * 20, 256 * 5),
        # transposed with 2 groups: 4/2 output channels for each input channel; (8-1)*2+3+1 = 18x18 output pixels
        (
            nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, groups=2),
            (4, 8, 8),
            1,
            64 * 4 * 2 * 9,
            18 * 18 * 4,
        ),
        # 2 images of 3x8 rows of 8 numbers, each to 5
        (nn.Linear(8, 5), (3, 8, 8), 2, 2 * 24 * 8 * 5, 2 * 24 * 5),
        # 3 matrices of 8x8 by their transposes
        (Apply(lambda x: x @ x.transpose(-2, -1)), (3, 8, 8), 1, 3 * 8 * 8 * 8, 3 * 64),
        # one 4x8 matrix serves 3 of 8x8: 3 products of 4x8 by 8x8
        (Apply(lambda x: torch.ones(4, 8) @ x), (3, 8, 8), 1, 3 * 4 * 8 * 8, 3 * 32),
        # matrix by vector: 3x8 rows of 8
        (Apply(lambda x: x @ torch.ones(8)), (3, 8, 8), 1, 24 * 8, 24),
        (Apply(lambda x: torch.mv(x[0, 0], torch.ones(8))), (3, 8, 8), 1, 64, 8),
        (Apply(lambda x: torch.dot(x[0, 0, 0], x[0, 0, 1])), (3, 8, 8), 1, 8, 1),
        (Apply(lambda x: torch.mm(x[0, 0], torch.ones(8, 2))), (3, 8, 8), 1, 8 * 8 * 2, 16),
        (Apply(lambda x: torch.bmm(x[0], torch.ones(3, 8, 2))), (3, 8, 8), 1, 3 * 8 * 8 * 2, 48),
        (Apply(lambda x: torch.addmm(torch.ones(2), x[0, 0], torch.ones(8, 2))), (3, 8, 8), 1, 8 * 8 * 2, 16),
        (Apply(lambda x: torch.addmv(torch.ones(8), x[0, 0], torch.ones(8))), (3, 8, 8), 1, 64, 8),
        (Apply(lambda x: torch.baddbmm(torch.ones(1), x[0], torch.ones(3, 8, 2))), (3, 8, 8), 1, 3 * 8 * 8 * 2, 48),
        # in place, and under a name of Python's
        (Apply(lambda x: torch.ones(8, 2).addmm_(x[0, 0], torch.ones(8, 2))), (3, 8, 8), 1, 8 * 8 * 2, 16),
        (Apply(lambda x: torch.einsum("bchw,dc->bdhw", x, torch.ones(5, 3))), (3, 8, 8), 2, 2 * 64 * 3 * 5, 2 * 64 * 5),
    ],
)
def test_macs_and_activations(module, size, batch, macs, activations):
    assert costs(module, size, batch) == (macs, macs, activations)


@pytest.mark.parametrize(
    ("equation", "shapes", "path", "expected"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)], None, [(24, 8)]),
        ("ij,jk", [(2, 3), (3, 4)], None, [(24, 8)]),  # the output is what appears once
        ("bhnd,bhmd->bhnm", [(2, 3, 4, 5), (2, 3, 6, 5)], None, [(2 * 3 * 4 * 5 * 6, 2 * 3 * 4 * 6)]),
        ("...nd, ...md -> ...nm", [(2, 3, 4, 5), (3, 6, 5)], None, [(2 * 3 * 4 * 5 * 6, 2 * 3 * 4 * 6)]),
        ("i,j->ij", [(2,), (3,)], None, []),  # an outer product sums over nothing
        ("bchw,c->bchw", [(2, 3, 4, 4), (3,)], None, []),  # element-wise
        ("bij->bji", [(2, 3, 4)], None, []),
        ("ii->", [(3, 3)], None, []),  # a trace adds, and multiplies nothing
        ("ij,jk->i", [(2, 3), (3, 4)], None, [(6, 2)]),  # k is summed away first, then 2x3 by 3
        ("b...,b...->b", [(2, 3, 4), (2, 3, 4)], None, [(24, 2)]),
        # left to right: 2x3 by 3x4, then 2x4 by 4x5
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], None, [(24, 8), (40, 10)]),
        # the other way round, by a path: 3x4 by 4x5, then 2x3 by 3x5
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], [1, 2, 0, 1], [(60, 15), (30, 10)]),
    ],
)
def test_einsum(equation, shapes, path, expected):
    assert einsum_contractions(equation, shapes, path) == expected


@pytest.mark.parametrize(
    "equation", ["ij,jk->ik", "bhnd,bhmd->bhnm", "abc,cd->abd", "ab,bc,cd->ad", "abcd,ce,bf->aefd", "ab,b", "ab,ac->bc"]
)
def test_einsum_counts_the_matrix_products_that_torch_runs(equation):
    sizes = {letter: 2 + i for i, letter in enumerate("abcdefhijkmn")}
    terms = equation.partition("->")[0].split(",")
    tensors = [torch.ones([sizes[letter] for letter in term]) for term in terms]
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *tensors)
    assert costs(Apply(lambda x: torch.einsum(equation, *tensors)))[0] == counter.get_total_flops() // 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_counts_two_products_whatever_is_masked(causal, kv_heads):
    def attend(_x):  # 2 images, 4 heads, 5 queries and 7 keys of width 8, values of width 6
        q, k, v = torch.ones(2, 4, 5, 8), torch.ones(2, kv_heads, 7, 8), torch.ones(2, kv_heads, 7, 6)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    macs = 2 * 4 * 5 * 7 * 8 + 2 * 4 * 5 * 7 * 6
    assert costs(Apply(attend)) == (macs, macs, 2 * 4 * 5 * 7 + 2 * 4 * 5 * 6)


@pytest.mark.parametrize("name", ["caformer_s18", "timm/caformer_s18", "timm/deit_tiny_patch16_224"])
def test_fused_and_unfused_attention_cost_the_same(name):
    fused = zoo.profile(name)
    timm.layers.set_fused_attn(False)
    try:
        unfused = zoo.profile(name)
    finally:
        timm.layers.set_fused_attn(True)
    operators = [{operator.name for operator in profile.operators} for profile in (fused, unfused)]
    assert [("scaled_dot_product_attention" in names) for names in operators] == [True, False]
    assert (fused.macs, fused.fvcore_total, fused.activations) == (
        unfused.macs,
        unfused.fvcore_total,
        unfused.activations,
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_attention_is_counted(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    before = torch.backends.mha.get_fastpath_enabled()
    # 1 image as 3 sequences of 8 tokens (the other way round: 8 of 3), width 8
    rows, length = (3, 8) if batch_first else (8, 3)
    projections = 4 * rows * length * 8 * 8  # query, key, value, output
    products = 2 * rows * length * length * 8
    module = Apply(lambda x, attend: attend(x[0], x[0], x[0], need_weights=False)[0], attend=attention)
    assert costs(module)[0] == projections + products
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize(
    ("module", "operations"),
    [
        (nn.GroupNorm(1, 4), 5 * 256),
        (nn.GroupNorm(1, 4, affine=False), 4 * 256),
        (nn.LayerNorm(8), 5 * 256),
        (nn.LayerNorm(8, bias=False), 5 * 256),
        (nn.LayerNorm(8, elementwise_affine=False), 4 * 256),
        (nn.RMSNorm(8), 3 * 256),
        (nn.RMSNorm(8, elementwise_affine=False), 2 * 256),
        (nn.BatchNorm2d(4), 2 * 256),
        (nn.InstanceNorm2d(4, affine=True), 5 * 256),
        (nn.AdaptiveAvgPool2d(1), 256),  # reads every element
        (nn.Upsample(scale_factor=2), 1 * 4 * 256),  # four times as many pixels
        (nn.Upsample(scale_factor=2, mode="bilinear"), 4 * 4 * 256),
        (nn.Upsample(scale_factor=2, mode="bicubic"), 16 * 4 * 256),
        (nn.AvgPool2d(2), 0),
        (nn.GELU(), 0),
    ],
)
def test_fvcore_total_of_what_has_no_macs(module, operations):
    assert costs(module, (4, 8, 8)) == (0, operations, 0)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "convnext_atto", "poolformer_s12", "test_vit"])
def test_equals_fvcore_on_real_tensors(name):
    timm.layers.set_fused_attn(False)  # which fvcore does not count
    try:
        model = timm.create_model(name).eval()
    finally:
        timm.layers.set_fused_attn(True)
    size = model.pretrained_cfg["input_size"] if "vit" in name else (3, 64, 64)
    images = torch.zeros(1, *size)
    flops = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    activations = ActivationCountAnalysis(model, images).unsupported_ops_warnings(False)
    activations.uncalled_modules_warnings(False)
    profile = zoo.profile(model, size)
    assert profile.fvcore_total == flops.total()
    assert profile.activations == activations.total()
    by_module = {module.name: module.fvcore_total for module in profile.modules}
    assert by_module == {module: flops.total(module) for module in by_module}
    norms = sum(operator.fvcore_total for operator in profile.operators if operator.name in NORMS)
    pooling = sum(operator.fvcore_total for operator in profile.operators if "pool" in operator.name)
    assert profile.fvcore_total == profile.macs + norms + pooling


def test_no_operator_is_both_counted_and_free():
    assert not FREE & HANDLES.keys()


# --------------------------------------------------------------------------------------------------------- the registry


def used_without_a_call(name: str) -> set[str]:
    """Modules whose weights another module uses, as timm's attention does where only some outputs have a bias."""
    model = create(name).eval()
    model(torch.randn(1, 3, SIZE, SIZE)).sum().backward()
    weights = {key: list(module.parameters()) for key, module in model.named_modules()}
    return {key for key, tensors in weights.items() if tensors and all(tensor.grad is not None for tensor in tensors)}


@pytest.mark.parametrize("name", each_vision_model())
def test_every_model_is_counted_whole(name):
    """The figures of the others are held by the check of the index, which counts all anew."""
    info = zoo.model_info(name)
    profile = profiled(name, info.input_size)
    assert profile.unknown_operators == {}
    uncalled = set(profile.uncalled_modules)
    model = zoo.create_model(name, pretrained=False, device="meta")
    for path in range(1, getattr(model, "num_stitches", 1)):  # every module has its turn
        model.set_stitch(path)
        uncalled &= set(zoo.profile(model, info.input_size).uncalled_modules)
    assert not uncalled or uncalled <= used_without_a_call(name)
    assert profile.traced_on == "meta"
    for quantity in ("params", "trainable_params", "macs", "fvcore_total", "activations"):
        assert getattr(profile, quantity) == getattr(info, quantity), quantity
    assert sum(operator.macs for operator in profile.operators) == profile.macs
    assert sum(module.own_macs for module in profile.modules) == profile.macs
    assert sum(module.own_activations for module in profile.modules) == profile.activations


def test_a_large_model_takes_no_memory():
    """caformer_b36 at 384 pixels: 395 MB of weights, and 1.4 GB of activations, which are not there."""
    program = """
import resource, torch, zoo
zoo.profile("poolformer_s12", (3, 64, 64))  # everything that loads on first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
profile = zoo.profile("caformer_b36", (3, 384, 384))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sum(profile.weight_bytes.values()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    growth, weights = map(int, done.stdout.split())
    assert weights > 390e6
    assert growth * (1 if sys.platform == "darwin" else 1024) < 150e6


# ----------------------------------------------------------------------------------------------------- what is reported


def test_batches_scale_what_is_computed_and_not_what_is_stored():
    one, four = (zoo.profile("poolformer_s12", (3, 64, 64), batch_size=n) for n in (1, 4))
    assert (four.macs, four.fvcore_total, four.activations) == (4 * one.macs, 4 * one.fvcore_total, 4 * one.activations)
    assert four.params == one.params


def test_a_shared_module_counts_its_parameters_once_and_its_macs_at_every_call():
    layer = nn.Conv2d(3, 3, 1, bias=False)
    profile = zoo.profile(nn.Sequential(layer, nn.ReLU(), layer), (3, 8, 8))
    assert profile.params == 9
    assert profile.macs == 2 * 64 * 9
    (shared,) = [module for module in profile.modules if module.type == "Conv2d"]
    assert (shared.name, shared.calls, shared.macs, shared.params) == ("0", 2, profile.macs, 9)


def test_a_shared_parameter_counts_once():
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    profile = zoo.profile(nn.Sequential(first, second), (3, 8, 8))
    assert profile.params == 64
    assert profile.weight_bytes == {"float32": 4 * 64}
    assert profile.macs == 2 * 24 * 64


def test_frozen_parameters_and_weights_by_dtype():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(torch.bfloat16)
    model[1].float()
    model[0].requires_grad_(False)
    profile = zoo.profile(model, (3, 8, 8))
    assert (profile.params, profile.trainable_params, profile.frozen_params) == (16 + 8, 8, 16)
    assert profile.weight_bytes == {"bfloat16": 2 * 16, "float32": 4 * 8}


def test_weights_in_buffers_count_as_frozen():
    profile = zoo.profile("randformer_s12")
    matrices = 6 * 196**2 + 2 * 49**2
    assert profile.frozen_params == matrices
    assert profile.params == profile.trainable_params + matrices
    mixer = next(module for module in profile.modules if module.name == "stages.2.blocks.0.token_mixer")
    assert mixer.own_params == 196**2
    assert mixer.macs == 320 * 196**2


def test_modules_hold_what_is_below_them():
    profile = zoo.profile("poolformer_s12")
    modules = {module.name: module for module in profile.modules}
    stages = [modules[f"stages.{i}"] for i in range(4)]
    assert modules["stages"].macs == sum(stage.macs for stage in stages)
    assert modules["stages"].own_macs == 0
    assert modules["stages"].depth == 1
    block = modules["stages.0.blocks.0"]  # two 1x1 convolutions between 64 and 256 channels on 56x56 pixels
    assert block.macs == 2 * 56 * 56 * 64 * 256
    assert block.activations == 56 * 56 * (256 + 64)
    assert block.params == 2 * 64 * 256 + 256 + 64 + 2 * (64 + 64) + 2 * 64
    assert modules[""].params == profile.params


def test_functional_use_of_a_parameter_belongs_to_the_module_that_runs():
    profile = zoo.profile(Apply(lambda x, holder: F.linear(x, holder.weight), holder=nn.Linear(8, 8)), (3, 8, 8))
    assert profile.uncalled_modules == ("holder",)
    assert [module.own_macs for module in profile.modules] == [24 * 64, 0]


def test_an_operator_without_a_handler_is_reported():
    profile = zoo.profile(Apply(lambda x: torch.cdist(torch.fft.rfft(x).real.clone(), torch.ones(5, 5))), (3, 8, 8))
    assert profile.unknown_operators == {"aten::fft_rfft": 1, "aten::cdist": 1}
    assert not profile.complete
    assert "NOT COUNTED" in profile.summary()
    assert "aten::cdist (1x)" in profile.table()


def test_work_hidden_in_a_python_operator_is_reported():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ x

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    assert list(zoo.profile(Apply(Hidden.apply), (3, 8, 8)).unknown_operators) == ["prim::PythonOp.Hidden"]


def test_a_module_that_never_runs_is_reported():
    layers = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})
    profile = zoo.profile(Apply(lambda x, layers: layers["used"](x), layers=layers), (3, 8, 8))
    assert profile.uncalled_modules == ("layers.unused",)
    assert "never called  layers.unused" in profile.summary()


def test_whatever_a_model_returns():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    for pack in (lambda y: {"a": [y]}, lambda y: (y, (y, None, 3)), Output):
        module = Apply(lambda x, layer, pack=pack: pack(layer(x)), layer=nn.Linear(8, 8))
        assert costs(module)[0] == 24 * 64
    with pytest.raises(ConfigError, match="returns no tensor"):
        zoo.profile(Apply(lambda x: None), (3, 8, 8))


def test_a_model_that_looks_at_values_is_traced_on_the_cpu():
    look = Apply(lambda x, layer: layer(x) if x.sum().item() == 0 else x, layer=nn.Linear(8, 8))
    profile = zoo.profile(look, (3, 8, 8))
    assert profile.traced_on == "cpu"
    assert profile.macs == 24 * 64


def test_the_model_is_left_as_it_was():
    model = timm.create_model("resnet18").train()
    calls = []
    handle = model.fc.register_forward_hook(lambda *_: calls.append(1))
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    first, second = zoo.profile(model, (3, 64, 64)), zoo.profile(model, (3, 64, 64))

    assert first == second
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(parameter.is_meta for parameter in model.parameters())
    handle.remove()


def test_wrapped_models_are_unwrapped():
    model = nn.Conv2d(3, 4, 3)
    plain = zoo.profile(model, (3, 8, 8))
    assert zoo.profile(nn.DataParallel(model), (3, 8, 8)) == plain
    assert zoo.profile(torch.compile(model), (3, 8, 8)) == plain


def test_pruned_and_parametrized_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert zoo.profile(model, (3, 8, 8)).macs == 36 * 4 * 27 + 16 * 4 * 36


# ---------------------------------------------------------------------------------------------------- names and outputs


class Scores(nn.Module):
    """A layer whose product with itself no weight has a part in: 8 x 8 products of 4."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.fc(x.flatten(2).transpose(1, 2))
        return x @ x.transpose(1, 2)


def test_effective_costs_leave_zeros_out_where_weights_multiply():
    model = Scores()
    with torch.no_grad():
        model.fc.weight[0] = 0
        model.fc.bias.zero_()
    profile = zoo.profile(model, (4, 2, 4))
    assert profile.macs == 8 * 16 + 8 * 8 * 4
    assert profile.effective.macs == 8 * 12 + 8 * 8 * 4
    assert profile.effective.params == 20 - 4  # zeros in biases are no sparsity
    assert profile.effective.density == 0.75
    stated = zoo.profile(model, (4, 2, 4), 2, sparsity=0.5).effective
    assert (stated.rule, stated.params, stated.macs) == ("uniform", 20 - 8, 2 * (8 * 8 + 8 * 8 * 4))


def test_effective_costs_of_shared_and_pruned_weights():
    conv = nn.Conv2d(4, 4, 1, bias=False)
    with torch.no_grad():
        conv.weight[:, 0] = 0
    profile = zoo.profile(nn.Sequential(conv, nn.ReLU(), conv), (4, 2, 2))
    assert (profile.params, profile.effective.params) == (16, 12)
    assert (profile.macs, profile.effective.macs) == (2 * 4 * 16, 2 * 4 * 12)
    pruned = prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", amount=0.5)
    assert zoo.profile(pruned, (4, 2, 2)).effective.macs == 4 * 8


class Lender(nn.Module):
    """Whose convolution's weight is used without calling it, beside products that have none."""

    def __init__(self, calls: int):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(4, 4, 1), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.conv(x)
        x = F.linear(x.flatten(2).mT, self.conv.weight.flatten(1))
        return x @ x.mT


@pytest.mark.parametrize("calls", [0, 1])
def test_effective_costs_of_weights_that_are_used_without_their_module(calls):
    model = Lender(calls)
    with torch.no_grad():
        model.conv.weight[0] = 0
    profile = zoo.profile(model, (4, 2, 4))
    assert profile.macs == (1 + calls) * 8 * 16 + 8 * 8 * 4
    assert profile.effective.macs == (1 + calls) * 8 * 12 + 8 * 8 * 4
    (layer,) = zoo.sparsity.report(model, (4, 2, 4)).layers
    assert (layer.macs, layer.effective_macs) == ((1 + calls) * 8 * 16, (1 + calls) * 8 * 12)


@pytest.mark.parametrize("name", ["eupe_test", "timm/test_vit"])
def test_layers_of_transformers_have_the_macs_of_their_own_products(name):
    model = zoo.create_model(name, pretrained=False) if name == "eupe_test" else timm.create_model(name[5:])
    seen = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear) and "qkv" not in key:
            module.register_forward_hook(
                lambda module, args, output, key=key: seen.update({key: output.numel() * module.in_features})
            )
    images = torch.zeros(1, 3, 64, 64) if name == "eupe_test" else torch.zeros(1, 3, 160, 160)
    model.eval()(images)
    (tokens,) = {macs // model.get_submodule(k).weight.numel() for k, macs in seen.items() if "blocks" in k}
    seen |= {key: tokens * module.weight.numel() for key, module in model.named_modules() if key.endswith("qkv")}
    assert len(seen) > 4
    report = zoo.sparsity.report(model, tuple(images.shape[1:]))
    found = {layer.name.removesuffix(".weight"): layer.macs for layer in report.layers}
    assert {key: found[key] for key in seen} == seen


def test_weights_that_are_not_known_have_no_effective_costs():
    assert zoo.profile("poolformer_s12", (3, 64, 64)).effective is None
    assert zoo.profile(nn.Conv2d(3, 8, 3, device="meta"), (3, 8, 8)).effective is None
    dense = zoo.profile(nn.Conv2d(3, 8, 3), (3, 8, 8))
    assert (dense.effective.params, dense.effective.macs) == (dense.params, dense.macs)
    assert "effective" not in dense.summary()


def test_names_of_the_zoo_come_first_and_timm_is_at_hand():
    ours, theirs = zoo.profile("poolformer_s12"), zoo.profile("timm/poolformer_s12")
    assert ours.macs == theirs.macs
    assert ours.params == theirs.params
    assert next(m for m in ours.modules if not m.name).type == "MetaFormer"
    assert zoo.profile("resnet18").params == 11_689_512
    assert zoo.profile("caformer_s18.sail_in1k_384").input_size == (3, 384, 384)
    assert zoo.profile(zoo.create_model("poolformer_s12", in_chans=1, device="meta")).input_size == (1, 224, 224)


def test_json_holds_everything():
    profile = zoo.profile("caformer_s18", (3, 64, 64))
    facts = json.loads(profile.to_json())
    assert facts == json.loads(json.dumps(profile.to_dict()))
    assert facts["macs"] == profile.macs
    assert facts["input_size"] == [3, 64, 64]
    assert "one fused multiply-add counts one" in facts["convention"]
    assert {module["name"] for module in facts["modules"]} >= {"", "stem.conv", "stages.2.blocks.0.token_mixer.qkv"}
    assert {operator["name"] for operator in facts["operators"]} >= {"convolution", "scaled_dot_product_attention"}


def test_the_table_goes_as_deep_as_it_is_told():
    profile = zoo.profile("poolformer_s12")
    rows = {depth: profile.table(depth=depth).splitlines() for depth in (0, 1, 2)}
    assert "parameters    11,915,176" in rows[0][1]
    assert not any("stem" in line for line in rows[0])
    assert any(re.match(r" *stages +Sequential", line) for line in rows[1])
    assert not any("MetaFormerStage" in line for line in rows[1])
    assert sum("MetaFormerStage" in line for line in rows[2]) == 4
    assert any(re.match(r" *convolution +28 +1.81G", line) for line in rows[0])
    assert str(profile) == profile.table(depth=1)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_plot_is_a_picture(tmp_path, ending):
    path = zoo.profile("poolformer_s12", (3, 64, 64)).plot(tmp_path / f"cost.{ending}", depth=2)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if ending == "png":
        with Image.open(path) as image:
            pixels = image.convert("RGB").getcolors(maxcolors=2**24)
        assert pixels is not None
        assert len(pixels) > 10
    if ending == "svg":
        text = path.read_text()
        assert all(label in text for label in ("stages.3", "head.fc", "MACs"))


def test_the_bars_of_the_plot_add_up_to_the_whole():
    attention = nn.MultiheadAttention(8, 2)  # computes beside its children
    model = Apply(lambda x, attend: attend(x[0], x[0], x[0])[0] @ x[0, 0], attend=attention)
    profile = zoo.profile(model, (3, 8, 8))
    for depth in (1, 2, 3):
        columns = zip(*(bar for _, bar in profile._bars(depth)), strict=True)
        assert [sum(column) for column in columns] == [profile.macs, profile.params, profile.activations]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("size", [224, (224, 224), (3, 0, 224), (3, -1, 8), (3, 224.0, 224), "3x8x8", (True, 8, 8)])
def test_sizes_that_make_no_sense(size):
    with pytest.raises(ConfigError, match=re.escape("(channels, height, width)")):
        zoo.profile("poolformer_s12", size)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None, True])
def test_batch_sizes_that_make_no_sense(batch_size):
    with pytest.raises(ConfigError, match="batch_size must be a whole number from 1 up"):
        zoo.profile("poolformer_s12", batch_size=batch_size)


def test_sizes_that_a_model_does_not_take():
    with pytest.raises(
        ConfigError, match=r"poolformer_s12 cannot run on a batch of 1 at 3x2x2: .*(Kernel|Output) size"
    ):
        zoo.profile("poolformer_s12", (3, 2, 2))
    with pytest.raises(ConfigError, match=r"randformer_s12 cannot run on .* at 3x384x384: .*14x14 grid.*24x24"):
        zoo.profile("randformer_s12", (3, 384, 384))
    with pytest.raises(ConfigError, match="takes images of 3 channels, not 1"):
        zoo.profile("caformer_s18", (1, 224, 224))
    with pytest.raises(ConfigError, match=r"cannot run .* at 5x8x8"):
        zoo.profile(nn.Sequential(nn.Conv2d(3, 4, 3)), (5, 8, 8))
    with pytest.raises(ConfigError, match="does not say what input it takes"):
        zoo.profile(nn.Conv2d(3, 4, 3))
    with pytest.raises(ConfigError, match="lazy"):
        zoo.profile(nn.LazyConv2d(4, 3), (3, 8, 8))
    with pytest.raises(ConfigError, match="scripted modules"):
        zoo.profile(torch.jit.trace(nn.Linear(8, 8), torch.zeros(3, 8, 8)), (3, 8, 8))


def test_names_that_are_none():
    with pytest.raises(UnknownModelError, match=r"'poolfromer_s12'. Did you mean poolformer_s12"):
        zoo.profile("poolfromer_s12")
    with pytest.raises(UnknownModelError, match="Did you mean resnet18"):
        zoo.profile("timm/resnet_18")
    with pytest.raises(UnknownModelError, match=r"timm has no weights 'a1_in1kk' of resnet18. Did you mean a1_in1k"):
        zoo.profile("resnet18.a1_in1kk")
    with pytest.raises(UnknownModelError, match="poolformer_s12 has no weights tagged 'sail'"):
        zoo.profile("poolformer_s12.sail")
    with pytest.raises(ConfigError, match="a module or the name of a model, not int"):
        zoo.profile(12)


def test_plots_that_cannot_be_drawn(tmp_path):
    profile = zoo.profile(nn.Linear(8, 8), (3, 8, 8))
    with pytest.raises(ConfigError, match="there is no folder"):
        profile.plot(tmp_path / "none" / "cost.png")
    with pytest.raises(ConfigError, match="endings"):
        profile.plot(tmp_path / "cost.txt")
    for depth in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="depth must be"):
            profile.plot(tmp_path / "cost.png", depth=depth)
    with pytest.raises(ConfigError, match="depth must be"):
        profile.table(depth=-1)
    with pytest.raises(ConfigError, match="nothing to draw"):
        zoo.profile(nn.ReLU(), (3, 8, 8)).plot(tmp_path / "cost.png")
    assert list(tmp_path.iterdir()) == []


def test_every_handler_is_one_that_torch_can_call():
    """A mistyped operator would never match: every name in the tables is one that this torch has."""
    free_of_schema = {"Bool", "Float", "Int", "IntImplicit", "ScalarImplicit"}
    kinds = {tuple(kind.split("::")) for kind in (*FREE, *HANDLES)}
    missing = [
        name for space, name in kinds if name not in free_of_schema and not hasattr(getattr(torch.ops, space), name)
    ]
    assert missing == []
