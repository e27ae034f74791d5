"""Model cards: rendered from facts and measured results, and written where they belong."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest

import zoo
from tests import golden
from zoo import cards, registry
from zoo.errors import ConfigError
from zoo.registry import Entry


def test_a_card_holds_every_variant_and_every_checkpoint():
    card = cards.render_card("metaformer")
    for name in zoo.list_models(family="metaformer"):
        info = zoo.model_info(name)
        assert f"| `{name}`" in card
        assert f"{info.params:,}" in card
        for weights in info.weights:
            assert f"| `{name}.{weights.tag}`" in card
    assert "timm.create_model(" in card
    assert "eprint = {2111.11418}" in card
    assert "(https://huggingface.co/sail/dl/blob/main/randformer/randformer_s12.pth)" in card


@pytest.mark.parametrize("family", cards.families())
def test_what_a_card_gives_to_timm_timm_takes(family):
    """Names that timm does not have stand behind `register_with_timm`."""
    import timm

    for call in re.findall(r"```python\n(.*?)```", cards.render_card(family), re.DOTALL):
        if name := re.search(r'timm\.create_model\("(.*?)"', call):
            known = name[1] in timm.list_pretrained(name[1].partition(".")[0])
            assert known or "zoo.register_with_timm()" in call, name[1]
            assert name[1] in zoo.list_models(name[1].partition(".")[0], pretrained=True)


def test_a_card_names_every_variant_that_goldens_hold():
    (line,) = [line for line in cards.render_card("vovnet").splitlines() if "held by tests to those" in line]
    for name in ("vovnet27_slim", "{vovnet39,vovnet57}", "vovnetv2_{19,39,99}", "ese_vovnet19b_{dw,slim}"):
        assert f"`{name}`" in line, name
    for family in cards.families():
        names = {name.split("@")[0].split(".")[0] for name in golden.names(family)}
        assert family in ("slak", "snnet") or names <= set(zoo.list_models(family=family)), family


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no family 'metafomer'. Did you mean metaformer"):
        cards.render_card("metafomer")


def test_results_that_were_measured_here_stand_in_the_card(tmp_path, monkeypatch):
    assert "## Measured here" not in card_at(tmp_path, monkeypatch)
    folder = tmp_path / "benchmarks" / "results" / "digits"
    folder.mkdir(parents=True)
    report = {
        "what": "digits, 360 test images",
        "command": "python train.py --config digits.yaml",
        "device": "CPU, 2 threads",
        "runs": {
            "ours": {"model": "poolformer_s12", "last_top1": 98.765, "history": [{}, {}]},
            "theirs": {"model": "resnet18", "last_top1": 12.5, "history": [{}]},
        },
    }
    (folder / "results.json").write_text(json.dumps(report))
    (row,) = [line for line in card_at(tmp_path, monkeypatch).splitlines() if "digits, 360 test images" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "`poolformer_s12`",
        "digits, 360 test images",
        "98.77",
        "1",
        "2",
        "CPU, 2 threads",
        "`python train.py --config digits.yaml`",
    ]
    several = {"model": "poolformer_s12", "top1_mean": 98.2, "top1_std": 0.31, "seeds": 3, "epochs": 2}
    (folder / "results.json").write_text(json.dumps({**report, "summary": {"ours": several}}))
    (row,) = [line for line in card_at(tmp_path, monkeypatch).splitlines() if "digits, 360 test images" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")][2:5] == ["98.20 ± 0.31", "3", "2"]


def card_at(root, monkeypatch) -> str:
    monkeypatch.setattr(cards, "ROOT", root)
    return cards.render_card("metaformer")


@pytest.fixture
def own_family(monkeypatch):
    """A family without paper, weights or licence, registered by a module of its own."""
    before = dict(registry._entries)
    module = types.ModuleType("own_family")
    module.__dict__["entry"] = Entry(name="own_s1", family="own", build=_build, input_size=(3, 8, 8))
    exec("import zoo; zoo.register(entry)", module.__dict__)
    monkeypatch.setitem(sys.modules, "own_family", module)
    yield module
    registry._entries.clear()
    registry._entries.update(before)
    registry._measured_info.cache_clear()


def _build(num_classes: int = 10, in_chans: int = 3):
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 64, num_classes))


def test_a_family_of_ones_own_has_a_card_without_empty_sections(own_family):
    own_family.__doc__ = "Own: a single linear layer.\n\nIt is as small as can be."
    card = cards.render_card("own")
    assert card.startswith("# Own: a single linear layer\n")
    assert "It is as small as can be." in card
    assert "| `own_s1` | 1,930 | 1.92K |" in card
    assert "None are published." in card
    assert 'zoo.create_model("own_s1")' in card
    assert "## Papers" not in card
    assert "## Citation" not in card


def test_a_family_without_a_docstring_cannot_have_a_card(own_family):
    with pytest.raises(ConfigError, match="begins with the docstring of its module, and own_family has none"):
        cards.render_card("own")


def test_cards_are_written_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cards, "ROOT", tmp_path)
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "README.md").write_text("no marks\n")
    assert cards.main([]) == 1
    assert "needs the lines" in capsys.readouterr().err

    (tmp_path / "README.md").write_text(f"before\n{cards.FAMILIES_BEGIN}\nold\n{cards.FAMILIES_END}\nafter\n")
    assert cards.main(["--check"]) == 1
    assert not (tmp_path / "model_cards" / "metaformer.md").exists()
    assert cards.main([]) == 0
    assert cards.main(["--check"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "[metaformer](model_cards/metaformer.md)" in readme
    assert (tmp_path / "model_cards" / "metaformer.md").read_text() == cards.render_card("metaformer")
    assert cards.main(["--chekc"]) == 2


def test_names_that_differ_in_size_are_put_together():
    assert cards.groups(["net_s12", "net_s24", "net2_s12", "other"]) == ["net_{s12,s24}", "net2_s12", "other"]
