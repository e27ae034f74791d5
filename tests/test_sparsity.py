"""Densities, masks and the report of sparse models."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from torch import nn

import zoo
from tests import golden
from zoo.cli import main
from zoo.errors import CheckpointError, ConfigError
from zoo.sparsity import (
    apply_masks,
    channel_groups,
    counts,
    densities,
    density_of,
    er,
    erk,
    follows_n_m,
    load_masks,
    masks_of,
    n_m_mask,
    save_masks,
    sparse_parameters,
    uniform,
    weakest_channels,
)
from zoo.sparsity.densities import apportion

TINY = {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32), "num_classes": 10}


def tiny(name: str = "poolformerv2_s12", **args) -> nn.Module:
    return zoo.create_model(name, **{**TINY, **args})


def random_masks(model: nn.Module, density: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in sparse_parameters(model).items()
    }


# --------------------------------------------------------------------------------------------------------------- layers


def test_all_weights_of_convolutions_and_linear_layers_can_be_sparse_and_nothing_else():
    model = tiny("convformer_s18")
    names = set(sparse_parameters(model))
    weights = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert names == weights
    assert "head.fc.fc2.weight" in names


def test_tables_are_not_weights():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 4, 7, 7)))
    assert list(sparse_parameters(model)) == ["1.weight"]


def test_decomposed_kernels_are_the_depthwise_ones_that_are_not_square():
    model = nn.Sequential(
        nn.Conv2d(8, 8, (51, 5), padding=(25, 2), groups=8),
        nn.Conv2d(8, 8, (5, 51), padding=(2, 25), groups=8),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 16, (1, 3)),
    )
    assert list(sparse_parameters(model, "decomposed")) == ["0.weight", "1.weight"]
    with pytest.raises(ConfigError, match="no decomposed kernels"):
        sparse_parameters(tiny(), "decomposed")


def test_patterns_choose_modules_and_parameters():
    model = tiny()
    assert list(sparse_parameters(model, ["stages.0", "head.fc.weight"])) == [
        "stages.0.blocks.0.mlp.fc1.weight",
        "stages.0.blocks.0.mlp.fc2.weight",
        "head.fc.weight",
    ]
    assert list(sparse_parameters(model, "*.fc1")) == [f"stages.{i}.blocks.0.mlp.fc1.weight" for i in range(4)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("stagez.0", "Did you mean stages.0"),
        ("decomposd", "Did you mean decomposed"),
        ("stages.0.blocks.0.norm1", "holds no convolution"),
        ([], "chooses nothing"),
    ],
)
def test_layers_that_are_not_there_are_errors(layers, message):
    with pytest.raises(ConfigError, match=message):
        sparse_parameters(tiny(), layers)


def test_wrappers_do_not_change_the_names():
    model = tiny()
    assert list(sparse_parameters(nn.DataParallel(model))) == list(sparse_parameters(model))
    assert list(sparse_parameters(torch.compile(model))) == list(sparse_parameters(model))
    assert list(sparse_parameters(nn.DataParallel(torch.compile(model)))) == list(sparse_parameters(model))


@pytest.mark.parametrize("first", ["table", "head"])
def test_a_table_that_is_a_layers_weight_too_stays_dense(first):
    model = nn.Module()
    for name in (first, *({"table", "head"} - {first})):
        model.add_module(name, nn.Embedding(8, 4) if name == "table" else nn.Linear(4, 8))
    model.fc = nn.Linear(4, 4)
    model.head.weight = model.table.weight
    assert list(sparse_parameters(model)) == ["fc.weight"]
    with pytest.raises(ConfigError, match="no convolution or linear layer with a weight of its own"):
        sparse_parameters(model, "head")


def test_a_convolution_of_one_channel_is_not_depthwise():
    model = nn.Sequential(nn.Conv2d(1, 16, (3, 5)), nn.Conv2d(16, 16, (3, 5), groups=16))
    assert list(sparse_parameters(model, "decomposed")) == ["1.weight"]


def test_a_part_called_module_keeps_its_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.module = nn.Sequential(nn.Conv2d(4, 4, 1))
    assert list(sparse_parameters(model)) == ["0.weight", "module.0.weight"]
    assert list(sparse_parameters(model, "module")) == ["module.0.weight"]
    assert list(sparse_parameters(nn.DataParallel(model))) == ["0.weight", "module.0.weight"]


# ------------------------------------------------------------------------------------------------------------ densities


def test_erk_is_that_of_the_published_code():
    cases = golden.load("slak", "sparse_training")["cases"]["erk"]["cases"]
    slak = {name: key["shape"] for name, key in golden.load("slak", "slak_tiny")["keys"].items()}
    assert len(cases) == 6
    for name, case in cases.items():
        shapes = case.get("shapes") or {layer: slak[layer] for layer in case["layers"]}
        assert erk(shapes, case["density"]) == pytest.approx(case["layers"], rel=1e-12), name


@pytest.mark.parametrize("rule", [uniform, er, erk])
@pytest.mark.parametrize("density", [0.03, 0.4, 0.6, 0.95, 1.0])
def test_densities_keep_the_share_that_was_asked_for(rule, density):
    shapes = {name: p.shape for name, p in sparse_parameters(tiny("convformer_s18")).items()}
    found = rule(shapes, density)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert sum(found[name] * math.prod(shape) for name, shape in shapes.items()) == pytest.approx(density * total)
    assert all(0 < share <= 1 for share in found.values())
    whole = counts(shapes, found)
    assert sum(whole.values()) == round(density * total)
    assert all(abs(whole[name] - found[name] * math.prod(shape)) < 1 for name, shape in shapes.items())


def test_shares_never_shrink_when_the_total_grows():
    weights = {"a": 700, "none": 0, "b": 31, "c": 31, "d": 1, "e": 3, "f": 100_000}
    total, before = sum(weights.values()), dict.fromkeys(weights, 0)
    for places in [*range(3_000), *range(3_000, total - 3_000, 997), *range(total - 3_000, total + 1)]:
        shares = apportion(places, weights)
        assert sum(shares.values()) == places
        assert all(shares[name] >= before[name] for name in weights), places
        assert all(abs(shares[name] - places * weight / total) < 3 for name, weight in weights.items()), places
        before = shares
    assert before == weights


def test_er_looks_at_channels_and_erk_at_the_kernel_too():
    shapes = {"wide": (64, 64, 7, 7), "narrow": (64, 64, 1, 1)}
    assert er(shapes, 0.2)["wide"] == pytest.approx(er(shapes, 0.2)["narrow"])
    assert erk(shapes, 0.02)["wide"] < erk(shapes, 0.02)["narrow"]


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan"), True, "half"])
def test_a_density_that_cannot_be_is_an_error(density):
    with pytest.raises(ConfigError, match="A density is a number above 0"):
        erk({"a": (2, 2)}, density)


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean uniform"):
        densities({"a": (2, 2)}, 0.5, "unifrom")


# ---------------------------------------------------------------------------------------------------------------- masks


def test_masks_survive_a_file_at_a_bit_for_a_weight(tmp_path):
    model = tiny()
    masks = random_masks(model)
    save_masks(masks, tmp_path / "masks.safetensors")
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    size = (tmp_path / "masks.safetensors").stat().st_size
    assert size < sum(mask.numel() for mask in masks.values()) / 8 + 200 * len(masks)


def test_masks_load_into_a_dense_model_by_name(tmp_path):
    masks = random_masks(tiny(), 0.3)
    save_masks(masks, tmp_path / "masks.safetensors")
    dense = tiny()
    with torch.no_grad():
        dense.head.fc.weight[0] = math.nan
    apply_masks(dense, load_masks(tmp_path / "masks.safetensors"))
    for name, parameter in sparse_parameters(dense).items():
        assert not parameter[~masks[name]].count_nonzero()
        assert parameter[masks[name]].count_nonzero() == masks[name].sum()
    found = masks_of(dense)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert density_of(found) == pytest.approx(0.3, abs=0.02)
    assert masks_of(tiny()) == {}


def test_masks_of_another_model_are_errors(tmp_path):
    model = tiny()
    with pytest.raises(CheckpointError, match=r"'head\.fc\.weigth'.*Did you mean head\.fc\.weight"):
        apply_masks(model, {"head.fc.weigth": torch.ones(10, 32, dtype=torch.bool)})
    before = model.head.fc.weight.clone()
    with pytest.raises(CheckpointError, match="9x32, its weight in MetaFormer is 10x32"):
        apply_masks(model, {"stem.conv.weight": torch.zeros(16, 3, 7, 7), "head.fc.weight": torch.ones(9, 32)})
    assert torch.equal(before, model.head.fc.weight)
    assert model.stem.conv.weight.count_nonzero()


def test_masks_of_other_weights_are_errors(tmp_path, capsys):
    """As those that stay behind where a file of weights is exchanged; what writes a model removes them itself."""
    model, masks = tiny(), random_masks(tiny(), 0.3)
    apply_masks(model, masks)
    folder = zoo.save_pretrained(model, tmp_path / "model")
    save_masks(masks, folder / "masks.safetensors")
    assert zoo.sparsity.report(model, masks=load_masks(folder / "masks.safetensors")).density < 0.4
    zoo.save_pretrained(tiny(), tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "model.safetensors", folder)
    with pytest.raises(
        CheckpointError, match=r"The masks are not of these weights: \S+ has \d+ that its mask leaves out"
    ):
        zoo.sparsity.report(tiny(), masks=masks)
    assert main(["sparsity", str(folder)]) == 1
    assert "The masks are not of these weights" in capsys.readouterr().err
    zoo.save_pretrained(tiny(), folder, overwrite=True)
    assert main(["sparsity", str(folder)]) == 0
    assert "100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (sparse_parameters, [None], "A model is a torch.nn.Module, and not None"),
        (sparse_parameters, [tiny(), ""], "Nothing in .* is called ''.*There are: "),
        (sparse_parameters, [tiny(), ["all", "head"]], "layers 'all' stands alone"),
        (sparse_parameters, [tiny(), 3], "layers is all, decomposed, or names of layers, and not 3"),
        (masks_of, [nn.Linear], "A model is a torch.nn.Module"),
        (channel_groups, ["resnet18"], "A model is a torch.nn.Module, and not 'resnet18'"),
        (apply_masks, [tiny(), None], "Masks are tensors by the names of their weights, and not NoneType"),
        (apply_masks, [tiny(), {"head.fc.weight": None}], "The mask of head.fc.weight must be a tensor"),
        (density_of, [[1]], "and not list"),
        (save_masks, [{3: torch.ones(1)}, "masks.safetensors"], "by the name of its weight, and not by 3"),
        (n_m_mask, [torch.ones(4), 2, 4], "along the inputs of a weight, its second dimension, and this has 1"),
        (follows_n_m, [torch.ones(4), 2, 4], "along the inputs of a weight, its second dimension, and this has 1"),
        (follows_n_m, ["x", 2, 4], "which are tensors, not 'x'"),
        (counts, [{"a": (2, 3)}, {}], "The density of a must be from 0 to 1, not None"),
        (weakest_channels, [tiny(), {}, "0.3"], "is from 0 up to, but not, 1; it is '0.3'"),
    ],
)
def test_arguments_of_other_types(function, arguments, message):
    with pytest.raises(ConfigError, match=message):
        function(*arguments)


def test_densities_that_are_none_are_errors():
    with pytest.raises(ConfigError, match="The density of a must be from 0 to 1, not 2"):
        counts({"a": (4, 4)}, {"a": 2})
    for rule in ("er", "erk"):
        with pytest.raises(ConfigError, match=r"a has no weights to make sparse: its shape is \(0, 3\)"):
            densities({"a": (0, 3), "b": (4, 4)}, 0.5, rule)


def test_a_file_that_holds_no_masks_is_an_error(tmp_path):
    zoo.save_pretrained(tiny(), tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds no masks"):
        load_masks(tmp_path / "model" / "model.safetensors")
    save_masks({"a": torch.ones(100, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "masks.safetensors").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_masks(cut)
    with pytest.raises(CheckpointError, match="no file of masks"):
        load_masks(tmp_path / "none.safetensors")


@pytest.mark.parametrize("shape", [(6, 8), (4, 12, 3, 3), (5, 7), (8, 1, 5, 5)])
def test_n_m_masks_keep_the_largest_of_every_group_of_inputs(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    mask = n_m_mask(weight.abs(), 2, 4)
    assert mask.shape == weight.shape
    assert follows_n_m(weight * mask, 2, 4)
    for start in range(0, shape[1], 4):
        group, kept = weight[:, start : start + 4].abs(), mask[:, start : start + 4]
        assert (kept.sum(1) == min(2, group.shape[1])).all()
        least = group.masked_fill(~kept, math.inf).amin(1)
        assert (least >= group.masked_fill(kept, 0).amax(1)).all()
    assert follows_n_m(weight, 2, 4) == (shape[1] <= 2)
    with pytest.raises(ConfigError, match="N:M"):
        n_m_mask(weight, 4, 2)


# --------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def sparse() -> nn.Module:
    torch.manual_seed(0)
    model = tiny("convformer_s18")
    masks = random_masks(model, 0.5)
    masks["stages.0.blocks.0.mlp.fc1.weight"][:3] = False
    masks["stages.0.blocks.0.mlp.fc1.weight"][:, 5] = False
    apply_masks(model, masks)
    return model


def test_a_report_counts_what_is_there(sparse):
    found = zoo.sparsity.report(sparse, (3, 64, 64))
    dense = zoo.profile(sparse, (3, 64, 64))
    weights = sparse_parameters(sparse)
    assert [layer.name for layer in found.layers] == list(weights)
    assert [layer.nonzeros for layer in found.layers] == [int(w.count_nonzero()) for w in weights.values()]
    assert (found.params, found.macs) == (dense.params, dense.macs)
    assert found.effective_params == sum(int(p.count_nonzero()) for p in weights.values()) + sum(
        p.numel() for name, p in sparse.named_parameters() if name not in weights
    )
    assert found.density == pytest.approx(0.5, abs=0.02)
    assert sum(layer.macs for layer in found.layers) == found.macs  # no attention in it
    assert found.effective_macs == pytest.approx(sum(layer.effective_macs for layer in found.layers), abs=30)

    layers = {layer.name: layer for layer in found.layers}
    fc1 = layers["stages.0.blocks.0.mlp.fc1.weight"]
    assert (fc1.shape, fc1.empty_outputs, fc1.empty_inputs) == ((64, 16, 1, 1), 3, 1)
    assert fc1.macs == 64 * 16 * 16 * 16
    assert fc1.effective_macs == fc1.nonzeros * 16 * 16
    assert torch.equal(found.masks[fc1.name], weights[fc1.name] != 0)
    assert all(name in str(found) for name in ("stages.0.blocks.0.token_mixer.dwconv", f"{found.params:,}"))


def test_a_report_sees_n_m_patterns_and_dense_models():
    model = tiny()
    assert zoo.sparsity.report(model, (3, 64, 64)).density == 1
    for name, parameter in sparse_parameters(model, "*.mlp").items():
        apply_masks(model, {name: n_m_mask(parameter.detach().abs(), 2, 4)})
    found = zoo.sparsity.report(model, (3, 64, 64))
    assert {layer.name for layer in found.layers if layer.follows_2_4} == set(sparse_parameters(model, "*.mlp"))
    assert "2:4 in every layer that has zeros" in found.summary()


def test_empty_channels_of_grouped_and_transposed_convolutions():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 12, 2, groups=2), nn.Conv2d(12, 4, 1))
    with torch.no_grad():
        model[0].weight[:4, 1] = 0  # input 1 of 8
        model[1].weight[4:, 3] = 0  # output 9 of 12
        model[1].weight[2] = 0  # input 2 of 8
    grouped, transposed, plain = zoo.sparsity.report(model, (8, 4, 4)).layers
    assert (grouped.empty_outputs, grouped.empty_inputs) == (0, 1)
    assert (transposed.empty_outputs, transposed.empty_inputs) == (1, 1)
    assert (plain.empty_outputs, plain.empty_inputs) == (0, 0)


def test_a_shared_weight_counts_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x.flatten(1)))

    model = Twice()
    with torch.no_grad():
        model.first.weight[0] = 0
    (layer,) = zoo.sparsity.report(model, (1, 2, 2)).layers
    assert (layer.params, layer.nonzeros, layer.macs, layer.effective_macs) == (16, 12, 32, 24)
    for pattern in ("second", "second.weight", "first", "*"):  # either of its names means it
        assert list(sparse_parameters(model, [pattern])) == ["first.weight"]


def test_depthwise_kernels_are_shown_as_kernels(tmp_path):
    """Those of a layer that reads one channel are not depthwise, and those along one dimension are."""
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 5, groups=8), nn.Flatten(2), nn.Conv1d(8, 8, 7, groups=8))
    found = zoo.sparsity.report(model, (1, 12, 12))
    assert [layer.depthwise for layer in found.layers] == [False, True, True]
    assert found.plot(tmp_path / "masks.png").is_file()


def test_what_has_no_weights_has_no_report():
    with pytest.raises(ConfigError, match="no weights of convolutions"):
        zoo.sparsity.report(nn.ReLU(), (3, 8, 8))
    with pytest.raises(ConfigError, match="meta device"):
        zoo.sparsity.report(tiny(device="meta"))
    with pytest.raises(ConfigError, match="takes a module"):
        zoo.sparsity.report("poolformer_s12")


def test_the_picture_shows_densities_and_masks(sparse, tmp_path):
    pytest.importorskip("matplotlib")
    found = zoo.sparsity.report(sparse, (3, 64, 64))
    from PIL import Image

    whole = Image.open(found.plot(tmp_path / "masks.png")).size
    one = Image.open(found.plot(tmp_path / "one.png", "*.dwconv*")).size
    assert whole[1] > one[1] > 300
    zoo.sparsity.report(tiny(), (3, 64, 64)).plot(tmp_path / "dense.svg")
    assert "<svg" in (tmp_path / "dense.svg").read_text()
    with pytest.raises(ConfigError, match=r"no weight called 'stagez'.*Did you mean stages"):
        found.plot(tmp_path / "none.png", ["stagez"])
    with pytest.raises(ConfigError, match="endings"):
        found.plot(tmp_path / "masks.doc")


def test_a_report_goes_by_masks_where_it_is_given_them(sparse):
    """Weights that have just appeared are zero, and yet kept."""
    masks = masks_of(sparse)
    expected = zoo.sparsity.report(sparse, (3, 64, 64))
    fresh = copy.deepcopy(sparse)
    with torch.no_grad():
        for name, mask in masks.items():
            fresh.get_parameter(name).view(-1)[mask.flatten().nonzero()[:2]] = 0
    assert zoo.sparsity.report(fresh, (3, 64, 64)).effective_params < expected.effective_params
    found = zoo.sparsity.report(fresh, (3, 64, 64), masks=masks)
    assert found == expected
    assert all(torch.equal(found.masks[name], mask) for name, mask in masks.items())
    assert masks_of(fresh)[name].sum() == masks[name].sum() - 2  # the model is left as it is
    with pytest.raises(CheckpointError, match="There is a mask for 'fc'"):
        zoo.sparsity.report(sparse, (3, 64, 64), masks={"fc": masks[name]})


def test_a_folder_is_profiled_with_its_zeros(sparse, tmp_path, capsys):
    from zoo.cli import main

    zoo.save_pretrained(sparse, tmp_path / "best")
    run, size = str(tmp_path), ["--input-size", "3", "64", "64"]
    assert main(["profile", run, "poolformer_s12", *size, "--json"]) == 0
    told, dense = json.loads(capsys.readouterr().out)
    found = zoo.sparsity.report(sparse, (3, 64, 64))
    assert (told["name"], told["params"], told["macs"]) == (run, found.params, found.macs)
    assert (told["effective"]["params"], told["effective"]["macs"]) == (found.effective_params, found.effective_macs)
    assert dense["effective"] is None
    (result,) = zoo.benchmark(run, input_size=(3, 64, 64), repeats=1, warmup=0, memory=False)
    assert result.name == run
    for name in (f"{run}/nothing", f"{run}/nothing/at/all"):
        assert main(["profile", name]) == 1
        assert f"There is no run or checkpoint {name!r}" in capsys.readouterr().err


def test_a_rule_without_a_sparsity_is_an_error(capsys):
    from zoo.cli import main

    with pytest.raises(SystemExit):
        main(["profile", "poolformer_s12", "--sparsity-rule", "erk"])
    assert "--sparsity-rule says how zeros are spread over the layers" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="say with sparsity="):
        zoo.profile("poolformer_s12", sparsity_rule="erk")


def test_the_command_prints_and_draws(sparse, tmp_path, capsys):
    from zoo.cli import main

    (tmp_path / "run").mkdir()
    zoo.save_pretrained(sparse, tmp_path / "run" / "best")
    size = ["--input-size", "3", "64", "64"]
    assert main(["sparsity", str(tmp_path / "run"), *size]) == 0
    assert "stages.3.blocks.0.mlp.fc2" in capsys.readouterr().out
    assert main(["sparsity", str(tmp_path / "run"), *size, "--json", "--plot", str(tmp_path / "masks.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["density"] == pytest.approx(0.5, abs=0.02)
    assert told["layers"][0].keys() >= {"name", "density", "macs", "effective_macs", "nonzeros"}
    assert (tmp_path / "masks.png").stat().st_size
    assert main(["sparsity", str(tmp_path / "runn")]) == 1
    assert "Did you mean run" in capsys.readouterr().err
    assert main(["sparsity", "slak_test"]) == 1
    assert "(--checkpoint)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sparsity", str(tmp_path / "run"), "--layers", "stages.0"])
