"""Names, filters, suggestions, and a user's own models in the registry."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest

import zoo
from tests.launcher import python
from tests.models import each_model
from zoo import index, registry
from zoo.errors import CheckpointError, ConfigError, UnknownModelError
from zoo.layers.decoder import build_decoder
from zoo.registry import Entry, ModelInfo, Weights, get_entry, register, split_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def own_models():
    """Whatever a test registers is gone after it."""
    before = dict(registry._entries)
    yield
    registry._entries.clear()
    registry._entries.update(before)
    registry._measured_info.cache_clear()


def run_python(code: str) -> None:
    """In a fresh process, which has imported nothing of the zoo."""
    run = python("-c", code, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def tiny(num_classes: int = 10, in_chans: int = 3, width: int = 4):
    """A small network, built where it is asked for: torch is not needed to register it."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def register_here(**fields) -> Entry:
    entry = register(Entry(**{"build": tiny, "family": "tiny", "input_size": (3, 8, 8), **fields}))
    assert isinstance(entry, Entry)
    return entry


# ---------------------------------------------------------------------------------------------------------------- names


def test_names_come_in_natural_order():
    names = zoo.list_models("poolformer_")
    assert names == ["poolformer_m36", "poolformer_m48", "poolformer_s12", "poolformer_s24", "poolformer_s36"]


def test_natural_order_puts_2_before_12(own_models):
    for name in ("net_12", "net_2", "net_100", "net"):
        register_here(name=name)
    assert zoo.list_models(family="tiny") == ["net", "net_2", "net_12", "net_100"]


@pytest.mark.parametrize(
    ("pattern", "some", "none"),
    [
        ("", "caformer_s18", "resnet50"),
        ("poolformer*", "poolformerv2_s12", "caformer_s18"),
        ("*_s12", "identityformer_s12", "poolformer_s24"),
        ("former_s1", "convformer_s18", "convformer_s36"),  # no wildcard: anywhere in the name
        ("poolformer_s[13]*", "poolformer_s36", "poolformer_s24"),
        ("poolformer_s?2", "poolformer_s12", "poolformer_s24"),
        ("PoolFormer_S12", "poolformer_s12", "poolformerv2_s12"),
        (["caformer*", "poolformer_s12"], "poolformer_s12", "poolformer_s24"),
        (("caformer*", ""), "caformer_b36", "poolformer_s12"),
    ],
)
def test_patterns(pattern, some, none):
    names = zoo.list_models(pattern)
    assert some in names
    assert none not in names
    assert len(names) == len(set(names))


def test_a_pattern_that_nothing_matches_gives_an_empty_list():
    assert zoo.list_models("no_such_model*") == []


@pytest.mark.parametrize("pattern", [5, None, ["poolformer*", 5], {"poolformer*": 1}])
def test_a_pattern_of_the_wrong_type_is_an_error(pattern):
    with pytest.raises(ConfigError, match="A pattern is a string"):
        zoo.list_models(pattern)


def test_pretrained_names_carry_their_tags():
    names = zoo.list_models("caformer_s18", pretrained=True)
    assert names[0] == "caformer_s18.sail_in1k"
    assert "caformer_s18.sail_in22k_ft_in1k_384" in names
    assert names == [f"caformer_s18.{w.tag}" for w in zoo.model_info("caformer_s18").weights]
    # a pattern may match with the tag or without
    assert zoo.list_models("*_s18", pretrained=True) == zoo.list_models("*_s18.*", pretrained=True)
    assert zoo.list_models("*_384", pretrained=True)
    assert all(name.endswith("_384") for name in zoo.list_models("*_384", pretrained=True))
    assert zoo.list_models("*former*_384") == []


def test_filters_by_task_and_family():
    assert zoo.list_models(task="vision", family="metaformer") == zoo.list_models(family="metaformer")
    assert "poolformer_s12" not in zoo.list_models(task="language")


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"family": "metaforme"}, "no family 'metaforme'. Did you mean metaformer?"),
        ({"task": "visoin"}, "no task 'visoin'. Did you mean vision?"),
        ({"task": "audio"}, "There are: language, segmentation, vision."),
    ],
)
def test_a_wrong_filter_names_the_right_ones(filters, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        zoo.list_models(**filters)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        zoo.search(**filters)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("poolformer_s12", ("poolformer_s12", None, None)),
        ("poolformer_s12.sail_in1k", ("poolformer_s12", "sail_in1k", None)),
        ("poolformer_s12.sail_in1k@abc", ("poolformer_s12", "sail_in1k", "abc")),
        ("poolformer_s12@v1.0", ("poolformer_s12", None, "v1.0")),
        ("poolformer_s12.", ("poolformer_s12", None, None)),
    ],
)
def test_split_name(name, parts):
    assert split_name(name) == parts


@pytest.mark.parametrize("ask", [zoo.model_info, get_entry, zoo.create_model])
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("poolformer_s13", "poolformer_s12"),
        ("PoolFormer_S12", "poolformer_s12"),
        ("caformer-s18", "caformer_s18"),
        ("Pool", "poolformer_s12"),
        ("vit", "vit_s_max"),
    ],
)
def test_an_unknown_name_raises_with_the_nearest(ask, name, near):
    with pytest.raises(UnknownModelError, match=f"no model called '{name}'. Did you mean .*{near}"):
        ask(name)


@pytest.mark.parametrize("name", ["", " ", "zzzzzz"])
def test_an_unknown_name_that_is_near_nothing_still_says_so(name):
    with pytest.raises(UnknownModelError, match=rf"There is no model called {name!r}\.$"):
        zoo.model_info(name)


def test_a_path_for_a_name_is_told_how_it_is_written(tmp_path):
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, advice in {
        f"{tmp_path}/run/best": f"For the model in that folder, write local-dir:{tmp_path}/run/best",
        f"{tmp_path}/empty": "That folder is neither one of a run with a checkpoint nor",
        "me/net": "for a repository on the Hub, hf-hub:me/net",
        "timm/resnet18": "timm.create_model.'resnet18'. makes timm's",
    }.items():
        with pytest.raises(UnknownModelError, match=f"There is no model called '{name}'.*{advice}"):
            zoo.create_model(name)
    with pytest.raises(CheckpointError, match=f"it is a run, whose model is local-dir:{tmp_path}/run/best"):
        zoo.create_model(f"local-dir:{tmp_path}/run")


@pytest.mark.parametrize("name", [None, 12, ["poolformer_s12"], b"poolformer_s12"])
def test_a_name_that_is_no_string(name):
    with pytest.raises(ConfigError, match="A model name is a string"):
        zoo.model_info(name)


def test_an_unknown_tag_names_those_that_there_are():
    for ask in (zoo.model_info, lambda name: get_entry(name).find_weights(split_name(name)[1])):
        with pytest.raises(UnknownModelError, match=r"no weights tagged 'sail_in22k'.* There are: sail_in1k"):
            ask("poolformer_s12.sail_in22k")


# ---------------------------------------------------------------------------------------------------------------- facts


def test_every_model_has_its_facts():
    for name in zoo.list_models():
        info = zoo.model_info(name)
        assert info.name == name
        if info.family != "smollm":  # of which there is no paper
            assert info.paper is not None
            assert info.paper.url.startswith("https://arxiv.org/abs/")
        assert info.compact
        assert info.code_license
        assert info.code_url.startswith("https://")
        assert 0 < info.trainable_params <= info.params
        assert (info.language is not None) == (info.task == "language")
        if info.language is None:
            assert len(info.input_size) == 3
            assert info.fvcore_total is not None
            assert 0 < info.macs <= info.fvcore_total
            assert info.activations is not None
            assert info.activations > 0
        else:
            assert (info.input_size, info.fvcore_total, info.activations, info.top1) == ((), None, None, None)
            assert min(dataclasses.astuple(info.language)[:-2]) > 0
        for weights in info.weights:
            assert weights.license
            assert [weights.hub_id, weights.url, weights.page].count(None) == 2
            assert weights.top1 is None or weights.accuracy_source


def test_the_authors_own_figures_are_near_ours():
    """Theirs are rounded, and some count norms: 3% covers both, and where it does not, the entry says why."""
    infos = [info for info in map(zoo.model_info, zoo.list_models()) if info.reported is not None]
    assert len(infos) > 50
    for info in infos:
        assert info.reported is not None
        assert math.isclose(info.params, info.reported.params, rel_tol=0.03) or info.note, info.name
        if info.input_size == info.reported.input_size:
            assert info.reported.macs is not None, info.name
            assert math.isclose(info.macs, info.reported.macs, rel_tol=0.03) or info.note, info.name


def test_facts_are_those_of_the_entry():
    info = zoo.model_info("poolformer_s12")
    entry = get_entry("poolformer_s12")
    for field in ("family", "task", "module", "paper", "compact", "code_license", "reported", "weights", "input_size"):
        assert getattr(info, field) == getattr(entry, field)


def test_a_tag_keeps_its_weights_alone():
    (weights,) = zoo.model_info("caformer_s18.sail_in1k_384").weights
    assert weights.input_size == (3, 384, 384)


def test_top1_is_the_best_claim_at_the_size_that_the_costs_are_for():
    info = zoo.model_info("caformer_s18")
    claims = {w.tag: w.top1 for w in info.weights}
    assert claims["sail_in22k_ft_in1k_384"] == max(filter(None, claims.values()))
    assert info.input_size == (3, 224, 224)
    assert info.top1 == claims["sail_in22k_ft_in1k"] == 84.1


def test_facts_survive_json():
    for name in ("poolformer_s12", "caformer_s18", "randformer_s12", "mobilellm_ls_125m", "smollm_135m"):
        info = zoo.model_info(name)
        assert ModelInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_facts_of_a_language_model_say_nothing_of_images():
    facts = zoo.model_info("smollm_135m.instruct").to_dict()
    assert not {"input_size", "fvcore_total", "activations"} & facts.keys()
    (weights,) = facts["weights"]
    assert not {"input_size", "num_classes", "crop_pct", "interpolation", "mean", "std", "top1"} & weights.keys()
    assert weights["dataset"] == ""
    assert "language" not in zoo.model_info("poolformer_s12").to_dict()
    assert zoo.model_info("poolformer_s12").kv_bytes is None
    cfg = get_entry("smollm_135m").pretrained_cfg()
    assert cfg == {
        "architecture": "smollm_135m",
        "tag": "smollm_corpus",
        "license": "apache-2.0",
        "hf_hub_id": "HuggingFaceTB/SmolLM-135M",
    }


def test_facts_cannot_be_changed_by_accident():
    info = zoo.model_info("poolformer_s12")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(info, "params", 0)  # noqa: B010


# --------------------------------------------------------------------------------------------------------------- search


def top1(info: ModelInfo) -> float:
    assert info.top1 is not None
    return info.top1


@pytest.mark.parametrize("sort", ["params", "macs", "activations", "kv_bytes"])
def test_search_sorts_smallest_first(sort):
    values = [getattr(info, sort) for info in zoo.search(sort=sort)]
    known = [value for value in values if value is not None]
    assert values == sorted(known) + [None] * (len(values) - len(known))  # what has no such figure comes last
    assert len(values) == len(zoo.list_models())


def test_search_sorts_best_first_and_by_name():
    claims = [top1(info) for info in zoo.search(sort="top1", min_top1=1)]
    assert claims == sorted(claims, reverse=True)
    assert [info.name for info in zoo.search(sort="name")] == zoo.list_models()


def test_limits_are_inclusive_and_hold_together():
    exact = zoo.model_info("poolformer_s12")
    found = zoo.search(max_params=exact.params, max_macs=exact.macs, min_top1=exact.top1)
    assert exact in found
    assert all(i.params <= exact.params and i.macs <= exact.macs and top1(i) >= top1(exact) for i in found)
    assert exact not in zoo.search(max_params=exact.params - 1)
    assert exact not in zoo.search(max_macs=exact.macs - 1)
    assert exact not in zoo.search(min_top1=top1(exact) + 0.01)


def test_search_of_language_models():
    found = zoo.search(task="language", max_params=400e6, max_macs=300e6)
    assert [info.name for info in found][:2] == ["mobilellm_125m", "mobilellm_ls_125m"]
    assert all(info.language and info.macs <= 300e6 for info in found)
    assert zoo.model_info("mobilellm_350m") not in found
    front = zoo.pareto(x="params", y="kv_bytes")
    assert {info.task for info in front} == {"language"}
    assert [info.kv_bytes for info in front] == sorted((info.kv_bytes or 0 for info in front), reverse=True)


def test_license_holds_for_code_and_weights(own_models):
    free = Weights(tag="a", license="mit", url="https://example.org/a")
    bound = Weights(tag="b", license="cc-by-nc-4.0", url="https://example.org/b")
    register_here(name="tiny_both", code_license="MIT", weights=(free, bound))
    register_here(name="tiny_bound", code_license="MIT", weights=(bound,))
    register_here(name="tiny_code", code_license="MIT")
    register_here(name="tiny_unsaid")

    def found(pattern):
        return [info.name for info in zoo.search(family="tiny", license=pattern, sort="name")]

    assert found("mit") == ["tiny_both", "tiny_code"]
    assert found("MI*") == ["tiny_both", "tiny_code"]
    assert found("gpl*") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_params": 0}, "max_params must be a number above zero, not 0"),
        ({"max_macs": -1e9}, "max_macs must be"),
        ({"min_top1": math.nan}, "min_top1 must be"),
        ({"max_params": "6M"}, "max_params must be a number above zero, not '6M'"),
        ({"sort": "top-1"}, "no sort key 'top-1'. Did you mean top1"),
    ],
)
def test_search_with_values_that_make_no_sense(arguments, message):
    with pytest.raises(ConfigError, match=message):
        zoo.search(**arguments)
    if "sort" not in arguments:
        with pytest.raises(ConfigError, match=message):
            zoo.pareto(**arguments)


def dominated(info: ModelInfo, others: list[ModelInfo]) -> bool:
    return any(
        o.macs <= info.macs and top1(o) >= top1(info) and (o.macs < info.macs or top1(o) > top1(info)) for o in others
    )


def test_pareto_is_what_no_other_beats():
    rated = [info for info in zoo.search() if info.top1 is not None]
    front = zoo.pareto(x="macs", y="top1")
    assert {i.name for i in front} == {i.name for i in rated if not dominated(i, rated)}
    assert [i.macs for i in front] == sorted(i.macs for i in front)


def test_pareto_keeps_ties_and_leaves_out_the_unrated(own_models):
    def rated(name, width, top1):
        weights = (Weights(tag="x", license="mit", url="https://example.org", top1=top1, input_size=(3, 8, 8)),)
        register_here(name=name, args={"width": width}, weights=weights)

    rated("tie_a", 4, 70.0)
    rated("tie_b", 4, 70.0)
    rated("beaten", 8, 69.0)
    rated("best", 16, 80.0)
    register_here(name="unrated", args={"width": 2})
    assert [info.name for info in zoo.pareto(family="tiny")] == ["tie_a", "tie_b", "best"]
    assert [info.name for info in zoo.pareto(x="params", y="macs", family="tiny")] == ["unrated"]


def test_segmentation_networks_are_compared_by_miou():
    networks = zoo.search(task="segmentation")
    rated = [(info.macs, info.miou) for info in networks if info.miou is not None]
    front = zoo.pareto(task="segmentation")
    assert front == zoo.pareto(y="miou", task="segmentation")
    for info in networks:
        beaten = info.miou is None or any(
            macs <= info.macs and miou >= info.miou and (macs, miou) != (info.macs, info.miou) for macs, miou in rated
        )
        assert beaten == (info not in front), info.name
    assert front[-1].name == "ffnet150_aaa"
    assert zoo.model_info("ffnet150_aaa").miou == 84.4
    assert zoo.model_info("poolformer_s12").miou is None
    claims = [info.miou or 0 for info in zoo.search(task="segmentation", sort="miou")]
    assert claims == sorted(claims, reverse=True)


def test_pareto_filters_and_refuses_bad_axes():
    with pytest.raises(TypeError, match=r"^pareto\(\) got .* 'maxparams'. Did you mean max_params"):
        zoo.pareto(maxparams=30e6)
    assert all(info.params <= 30e6 for info in zoo.pareto(max_params=30e6))
    with pytest.raises(ConfigError, match=r"no axis 'mac'. Did you mean macs"):
        zoo.pareto(x="mac")
    with pytest.raises(ConfigError, match="two different axes"):
        zoo.pareto(x="macs", y="macs")


# ---------------------------------------------------------------------------------------------------------- registering


def has_every_verb(name: str, family: str) -> None:
    assert name in zoo.list_models(family=family)
    info = zoo.model_info(name)
    assert info.params == info.trainable_params == 3 * 4 * 9 + 4 * 10 + 10
    assert info.macs == 8 * 8 * 3 * 4 * 9 + 4 * 10
    assert info in zoo.search(max_params=1000)
    assert info in zoo.pareto(x="params", y="macs", max_params=1000)
    from torch import nn

    model = zoo.create_model(name, num_classes=7)
    assert isinstance(model, nn.Sequential)
    assert model[-1].out_features == 7
    assert zoo.profile(name).params == info.params


def test_a_language_model_of_ones_own(own_models):
    sizes = {"vocab_size": 50, "depth": 2, "dim": 16, "num_heads": 2, "hidden_dim": 24, "head_dim": 8}
    zoo.register(Entry(name="my_lm", build=build_decoder, args=sizes, family="mine", task="language"))
    assert "my_lm" in zoo.list_models(task="language")
    info = zoo.model_info("my_lm")
    assert info.language is not None
    assert (info.language.vocab_size, info.language.kv_elements) == (50, 2 * 2 * 2 * 8)
    assert info.macs == 2 * (4 * 16 * 16 + 3 * 16 * 24) + 50 * 16
    assert info in zoo.search(task="language", family="mine")
    assert info in zoo.pareto(x="params", y="kv_bytes")
    assert zoo.profile("my_lm", tokens=4).params == info.params
    (result,) = zoo.benchmark("my_lm", tokens=4, new_tokens=2, repeats=1, memory=False)
    assert result.name == "my_lm"
    model = zoo.create_model("my_lm", depth=1)
    assert model.config.depth == 1
    assert model.pretrained_cfg["architecture"] == "my_lm"
    register_here(name="no_lm", task="language")
    with pytest.raises(ConfigError, match=r"is built by zoo\.layers\.decoder\.build_decoder, which gives a Decoder"):
        zoo.model_info("no_lm")


def test_register_decorates_a_function(own_models):
    @zoo.register(family="tiny", input_size=(3, 8, 8))
    def tiny_net(num_classes=10, in_chans=3):
        return tiny(num_classes, in_chans)

    assert callable(tiny_net)  # the decorator hands the function back
    has_every_verb("tiny_net", "tiny")


def test_register_without_arguments_takes_the_functions_name(own_models):
    @zoo.register
    def bare_net(num_classes=10, in_chans=3):
        return tiny(num_classes, in_chans)

    assert zoo.list_models("bare_net", family="bare_net") == ["bare_net"]
    assert get_entry("bare_net").module == __name__


def test_register_decorates_a_class(own_models):
    from torch import nn

    @zoo.register(name="tiny_class", family="tiny", input_size=(3, 8, 8), args={"width": 4})
    class TinyClass(nn.Sequential):
        def __init__(self, num_classes=10, in_chans=3, width=8):
            super().__init__(*tiny(num_classes, in_chans, width))

    has_every_verb("tiny_class", "tiny")
    assert isinstance(zoo.create_model("tiny_class"), TinyClass)


def test_register_takes_a_model_whose_constructor_reads_values(own_models):
    """Which nothing on the meta device can do: such a model is built in memory."""

    @zoo.register(family="tiny", input_size=(3, 8, 8))
    def reading_net(num_classes=10, in_chans=3):
        import torch

        (width,) = [int(value.item()) for value in torch.linspace(4, 4, 1)]
        return tiny(num_classes, in_chans, width)

    has_every_verb("reading_net", "tiny")


def test_register_takes_an_entry(own_models):
    entry = register_here(name="tiny_entry")
    assert entry.module == __name__
    assert get_entry("tiny_entry") is entry
    has_every_verb("tiny_entry", "tiny")


def test_register_calls_a_partial_by_the_name_given(own_models):
    build = functools.partial(tiny, width=4)
    zoo.register(name="tiny_partial", family="tiny", input_size=(3, 8, 8))(build)
    assert "tiny_partial" in zoo.list_models(family="tiny")
    with pytest.raises(ConfigError, match="None cannot name a model"):
        zoo.register(build)


def test_an_unknown_name_is_suggested_from_a_users_models_too(own_models):
    register_here(name="quite_different")
    with pytest.raises(UnknownModelError, match="Did you mean quite_different"):
        zoo.model_info("quiet_different")


def test_a_model_without_weights_says_what_to_do(own_models):
    entry = register_here(name="tiny_bare")
    assert zoo.list_models(family="tiny", pretrained=True) == []
    for ask in (lambda: entry.find_weights(), lambda: zoo.model_info("tiny_bare.best")):
        with pytest.raises(UnknownModelError, match=r"tiny_bare has no published weights. Load your own"):
            ask()


def test_a_models_figures_follow_its_registration(own_models):
    register_here(name="tiny_changing")
    before = zoo.model_info("tiny_changing").params
    register_here(name="tiny_changing", args={"width": 8})  # as a notebook cell does that is run again
    assert zoo.model_info("tiny_changing").params > before


@pytest.mark.parametrize("name", ["My Net", "MyNet", "net-12", "", "_net", "net.tag", 12])
def test_names_that_cannot_be(name, own_models):
    with pytest.raises(ConfigError, match="cannot name a model"):
        register_here(name=name)
    with pytest.raises(ConfigError, match="no field 'paramaters'"):
        zoo.register(name="net", paramaters={})(tiny)


@pytest.mark.parametrize("target", [12, "poolformer_s12", ["a"]])
def test_register_refuses_what_builds_nothing(target):
    with pytest.raises(ConfigError, match="takes an Entry, a class or a function"):
        zoo.register(target)


def test_register_refuses_unknown_fields_and_tasks(own_models):
    with pytest.raises(ConfigError, match=r"no field 'famly'. Did you mean family"):
        zoo.register(name="net", famly="tiny")(tiny)
    with pytest.raises(ConfigError, match="task is 'sound', but must be one of vision, segmentation, language"):
        register_here(name="net", task="sound")
    assert "net" not in zoo.list_models()


def test_a_taken_name_is_refused_unless_replaced(own_models):
    from zoo.models.metaformer import MetaFormer

    for build in (tiny, MetaFormer):  # even what the shipped model is built with
        with pytest.raises(ConfigError, match=r"'poolformer_s12' is registered already, by zoo.models.metaformer"):
            zoo.register(name="poolformer_s12")(build)
    shipped = zoo.model_info("poolformer_s12")

    zoo.register(name="poolformer_s12", family="tiny", input_size=(3, 8, 8), replace=True)(tiny)
    assert zoo.model_info("poolformer_s12").family == "tiny"
    assert zoo.model_info("poolformer_s12").params < 1000 < shipped.params
    assert "poolformer_s12" not in zoo.list_models(family="metaformer")


def test_a_replaced_model_stays_replaced_when_the_shipped_file_is_imported_later():
    run_python("""
import sys, zoo
from torch import nn
zoo.register(name="poolformer_s12", family="mine", replace=True)(lambda num_classes=9: nn.Linear(1, num_classes))
assert "zoo.models.metaformer" not in sys.modules
other = zoo.create_model("poolformer_s24", device="meta")
assert "zoo.models.metaformer" in sys.modules
assert zoo.registry.get_entry("poolformer_s12").family == "mine"
assert zoo.registry.get_entry("poolformer_s24").family == "metaformer"
""")


def test_a_model_file_may_be_reloaded():
    run_python("""
import importlib, zoo.registry
first = zoo.registry.get_entry("poolformer_s12").build
module = importlib.reload(importlib.import_module("zoo.models.metaformer"))
assert zoo.registry.get_entry("poolformer_s12").build is module.MetaFormer is not first
""")


# ------------------------------------------------------------------------------------------------------- pretrained_cfg


def test_pretrained_cfg_is_timms():
    import timm.models

    for name in ("poolformer_s12", "caformer_s18"):
        for weights in zoo.model_info(name).weights:
            ours = timm.models.PretrainedCfg(**get_entry(name).pretrained_cfg(weights.tag)).to_dict()
            theirs = timm.models.get_pretrained_cfg(f"{name}.{weights.tag}").to_dict()
            for key in (
                "hf_hub_id",
                "num_classes",
                "input_size",
                "pool_size",
                "crop_pct",
                "interpolation",
                "mean",
                "std",
            ):
                assert ours[key] == theirs[key], (name, weights.tag, key)
            assert ours["classifier"] == theirs["classifier"]
            assert ours["first_conv"] == theirs["first_conv"]


def test_pretrained_cfg_without_weights_describes_the_input(own_models):
    cfg = register_here(name="tiny_cfg").pretrained_cfg()
    assert cfg["architecture"] == "tiny_cfg"
    assert cfg["input_size"] == (3, 8, 8)
    assert "hf_hub_id" not in cfg
    assert "url" not in cfg


def test_a_pinned_commit_stands_in_the_cfg(own_models):
    weights = Weights(tag="pinned", license="mit", hub_id="me/net", filename="net.pth", revision="abc123")
    cfg = register_here(name="tiny_pinned", weights=(weights,)).pretrained_cfg("pinned")
    assert cfg["hf_hub_id"] == "me/net@abc123"
    assert cfg["hf_hub_filename"] == "net.pth"
    assert weights.source == "hf-hub:me/net@abc123"


# ---------------------------------------------------------------------------------------------------------------- index


@pytest.mark.parametrize("name", each_model(index.model_names()))
def test_the_index_says_what_the_code_generates(name):
    """`python -m zoo.index --check`, model by model: all of a model's costs are counted anew."""
    lines = registry.INDEX_PATH.read_text().splitlines()
    assert index.line(name) in [line.removesuffix(",") for line in lines]


def test_the_index_has_every_model_and_no_other():
    found = [json.loads(line.removesuffix(","))["name"] for line in registry.INDEX_PATH.read_text().splitlines()[1:-1]]
    assert found == index.model_names()


def test_an_index_that_is_out_of_date(tmp_path, monkeypatch, capsys):
    """Checked without being written, then written anew."""
    monkeypatch.setattr(index, "INDEX_PATH", tmp_path / "index.json")
    monkeypatch.setattr(index, "model_names", lambda: ["poolformer_s12"])
    assert index.main(["--check"]) == 1
    assert "run `python -m zoo.index`" in capsys.readouterr().err
    assert index.main([]) == 0
    assert index.main(["--check"]) == 0
    assert json.loads((tmp_path / "index.json").read_text())["models"][0]["name"] == "poolformer_s12"


@pytest.mark.usefixtures("own_models")
def test_a_model_that_cannot_be_built_does_not_hide_the_others():
    @zoo.register
    def broken_net(num_classes=10):
        raise ValueError("no such thing")

    with pytest.warns(UserWarning, match=r"broken_net is left out: .*no such thing"):
        found = zoo.search()
    assert len(found) == len(zoo.list_models()) - 1
