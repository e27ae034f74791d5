"""The `zoo` command as its users meet it: real processes, their output and exit status, on good input and bad."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zoo
from tests.launcher import python
from zoo import cli

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
COMMAND = [sys.executable, "-m", "zoo"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-m", "zoo", *arguments, cwd=cwd, env=ENVIRONMENT)


def succeed(*arguments: str, cwd: Path | None = None) -> str:
    result = run(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(status: int, *arguments: str, cwd: Path | None = None) -> str:
    """The message of a command that must fail with `status`, and without a traceback."""
    result = run(*arguments, cwd=cwd)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    *_, message = result.stderr.strip().splitlines()
    assert "error: " in message
    return message.partition("error: ")[2]


def table(output: str) -> list[list[str]]:
    """The cells of the rows above the first empty line."""
    lines = output.partition("\n\n")[0].splitlines()
    return [line.split() for line in lines if not line.startswith("─")]


# ---------------------------------------------------------------------------------------------------------------- facts


def test_list_prints_a_row_for_each_model_whole_though_piped():
    output = succeed("list")
    header, *rows = table(output)
    assert header[:3] == ["name", "params", "MACs"]
    assert [row[0] for row in rows] == zoo.list_models()
    assert ["poolformer_s12", "11.9M", "1.81G", "3x224x224", "77.2"] in [row[:5] for row in rows]
    assert f"{len(rows)} models. MACs: multiply-accumulates" in output  # the convention stands beside the numbers


def test_list_takes_patterns_and_filters():
    names = json.loads(
        succeed("list", "poolformer_s*", "*_b36", "--family", "metaformer", "--task", "vision", "--json")
    )
    assert names == zoo.list_models(["poolformer_s*", "*_b36"])


def test_list_of_checkpoints_has_one_row_for_each_tag():
    output = succeed("list", "caformer_s18", "--pretrained")
    _, *rows = table(output)
    assert [row[0] for row in rows] == zoo.list_models("caformer_s18", pretrained=True)
    assert ["caformer_s18.sail_in22k_ft_in1k_384", "3x384x384", "imagenet-1k", "85.4", "apache-2.0"] in rows
    assert json.loads(succeed("list", "caformer_s18", "--pretrained", "--json")) == [row[0] for row in rows]


def test_nothing_found_is_said_beside_the_result():
    result = run("list", "poolfromer_s12")
    assert (result.returncode, result.stdout) == (0, "")
    assert "No model matches. Did you mean poolformer_s12" in result.stderr
    assert succeed("list", "no_such_model", "--json") == "[]\n"
    assert succeed("search", "--max-params", "1", "--json") == "[]\n"
    assert run("search", "--max-params", "1").stderr == "No model fits.\n"


def test_search_finds_what_python_finds():
    budget = ["--max-params", "30M", "--max-macs", "4.5e9", "--min-top1", "78", "--license", "APACHE*"]
    expected = zoo.search(max_params=30e6, max_macs=4.5e9, min_top1=78, license="apache*", sort="top1")
    assert expected
    _, *rows = table(succeed("search", *budget, "--sort", "top1"))
    assert [row[0] for row in rows] == [info.name for info in expected]
    found = json.loads(succeed("search", *budget, "--sort", "top1", "--json"))
    assert [zoo.ModelInfo.from_dict(facts) for facts in found] == expected


def test_info_shows_every_fact():
    output = succeed("info", "poolformer_s12")
    info = zoo.model_info("poolformer_s12")
    assert info.paper is not None
    for fact in (info.paper.title, info.paper.url, info.compact, info.code_url, f"{info.params:,}", f"{info.macs:,}"):
        assert fact in output
    for fact in ("12.0M params, 1.80G MACs", "sail_in1k", "77.2", "hf-hub:timm/poolformer_s12.sail_in1k", "apache-2.0"):
        assert fact in output
    assert json.loads(succeed("info", "poolformer_s12", "--json")) == json.loads(json.dumps(info.to_dict()))


def test_info_of_a_tag_and_of_frozen_weights():
    (weights,) = json.loads(succeed("info", "caformer_s18.sail_in1k_384", "--json"))["weights"]
    assert weights["tag"] == "sail_in1k_384"
    output = succeed("info", "randformer_s12")
    assert "of which 235,298 are frozen" in output
    assert "hf-hub:sail/dl randformer/randformer_s12.pth" in output
    assert "licence unstated" in output


def test_language_models_have_columns_of_their_own():
    output = succeed("search", "--task", "language", "--max-params", "400M")
    header, *rows = table(output)
    assert header == ["name", "params", "MACs/token", "KV/token", "context", "weights", "licence"]
    assert [row[0] for row in rows] == [info.name for info in zoo.search(task="language", max_params=400e6)]
    assert ["mobilellm_ls_125m", "125M", "231M", "45.0", "KiB", "2,048", "meta", "(gated)"] in [row[:8] for row in rows]
    assert "KV/token: bytes remembered of a token" in output
    mixed = succeed("list", "mobilellm_125m", "poolformer_s12")
    assert [row[:4] for row in table(mixed)[1:]] == [
        ["mobilellm_125m", "125M", "125M", "token"],
        ["poolformer_s12", "11.9M", "1.81G", "3x224x224"],
    ]
    assert "A language model's are those of one generated token." in mixed
    _, *tagged = table(succeed("list", "smollm_135m", "--pretrained"))
    assert ["smollm_135m.smollm_corpus", "tokens", "smollm-corpus", "apache-2.0"] in tagged
    _, *front = table(succeed("pareto", "--x", "params", "--y", "kv_bytes", "--task", "language"))
    assert next(row[0] for row in front) == "mobilellm_125m"
    without = run("pareto", "--task", "language").stderr
    assert without.endswith("none has a figure for --y top1: choose of params, macs, kv_bytes.\n")
    assert run("pareto", "--max-params", "1").stderr == "No model fits.\n"


def test_segmentation_networks_are_shown_with_their_miou():
    header, *rows = table(output := succeed("list", "ffnet40s_dbbb_mobile"))
    assert header == ["name", "params", "MACs", "input", "mIoU", "weights", "licence"]
    assert rows[0][4] == "79.2"
    assert "mIoU: best Cityscapes" in output
    assert "top-1" not in output
    mixed = succeed("list", "ffnet40s_dbbb_mobile", "poolformer_s12")
    header, *rows = table(mixed)
    assert header[4:6] == ["top-1", "mIoU"]
    assert {row[0]: row[4] for row in rows} == {"ffnet40s_dbbb_mobile": "79.2", "poolformer_s12": "77.2"}
    line = next(line for line in mixed.splitlines() if "79.2" in line)
    assert line.index("79.2") == mixed.splitlines()[0].index("mIoU")
    _, row = table(tagged := succeed("list", "ffnet40s_dbbb_mobile", "--pretrained"))
    assert row[3] == "79.2"
    assert "mIoU: as their authors claim" in tagged
    front = [row[0] for row in table(succeed("pareto", "--task", "segmentation"))[1:]]
    assert front == [info.name for info in zoo.pareto(y="miou", task="segmentation")]
    assert front


def test_info_of_a_language_model():
    output = succeed("info", "mobilellm_ls_125m")
    for fact in (
        "30 stored, 60 executed",
        "230,768,640",
        "45.0 KiB (23,040 numbers)",
        "2,048 tokens",
        "eight zero-shot",
    ):
        assert fact in output
    for access in ("gated: terms at https://huggingface.co/facebook/MobileLLM-125M-layer-share", "`hf auth", "token"):
        assert access in output
    for of_images in ("top-1", "crop", "fvcore", "classes", "3x224x224"):
        assert of_images not in output
    assert "gated" not in succeed("info", "smollm_135m")
    windowed = succeed("info", "mobilellm_pro")
    assert "of which 10,752 are forgotten 512 tokens later" in windowed
    facts = json.loads(succeed("info", "youtu_llm_2b", "--json"))
    assert facts["language"]["kv_elements"] == 18_432
    assert "input_size" not in facts


def on_a_terminal(columns: int, *arguments: str) -> list[str]:
    """The lines that a command prints there."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    environment = {**ENVIRONMENT, "NO_COLOR": "1", "COLUMNS": str(columns)}
    process = subprocess.Popen([*COMMAND, *arguments], stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    with contextlib.suppress(OSError):  # how a terminal says that it was closed
        while chunk := os.read(parent, 65536):
            output += chunk
    os.close(parent)
    assert process.wait() == 0
    return output.decode().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()


def test_numbers_and_names_stay_whole_however_narrow_a_terminal():
    wide = [line.split() for line in succeed("list", "emo*").splitlines() if line.startswith("emo")]
    lines = on_a_terminal(30, "list", "emo*")
    assert [line.split() for line in lines if line.startswith("emo")] == wide


def test_output_that_was_closed():
    done = subprocess.run(
        [*COMMAND, "list"], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=lambda: os.close(1)
    )
    assert "Traceback" not in done.stderr


def test_tables_that_can_fit_a_terminal_of_80_columns():
    lines = on_a_terminal(80, "list", "mobilellm_*")
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if line.startswith("mobilellm_")]
    assert shown == zoo.list_models("mobilellm_*")


def test_pareto_prints_the_front():
    expected = [info.name for info in zoo.pareto(x="params", max_params=60e6)]
    arguments = ["pareto", "--x", "params", "--max-params", "60M"]
    assert [row[0] for row in table(succeed(*arguments))[1:]] == expected
    assert [facts["name"] for facts in json.loads(succeed(*arguments, "--json"))] == expected


@pytest.mark.parametrize(
    ("name", "magic", "axes"),
    [
        ("front.png", b"\x89PNG", ("--y", "top1")),
        ("front.svg", b"<?xml", ("--task", "segmentation")),
        ("front.pdf", b"%PDF", ("--y", "macs")),
    ],
)
def test_pareto_draws(name, magic, axes, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("pareto", "--x", "params", *axes, "--plot", name, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"Plot: {name}" in result.stderr
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-params", "1k"], "No model fits."),
        (["--task", "language"], "none has a figure for --y top1"),
        (["--x", "miou"], "none has figures for both --x miou and --y top1"),
    ],
)
def test_nothing_to_draw(arguments, message, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("pareto", *arguments, "--plot", "front.png", cwd=tmp_path)
    assert (result.returncode, os.listdir(tmp_path)) == (0, [])
    assert message in result.stderr
    assert "Plot" not in result.stderr


def test_a_plot_names_the_front_and_no_others(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from zoo.plots import plot_pareto

    front = zoo.pareto()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        picture = plot_pareto(zoo.search(), front, "macs", "top1", tmp_path / "front.svg").read_text(encoding="utf-8")
    drawn = {name for name in zoo.list_models() if f">{name}<" in picture}
    assert drawn == {info.name for info in front}
    assert "claimed ImageNet-1k top-1 (%)" in picture
    assert "one fused multiply-add counts one" in picture


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    env = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = python("-m", "zoo", "pareto", "--plot", "front.png", env=env, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == 'error: Plots need matplotlib: pip install "backbone-zoo[train]".\n'


def test_card_goes_to_the_terminal_or_into_a_file(tmp_path):
    card = succeed("card", "metaformer")
    assert card == (ROOT / "model_cards" / "metaformer.md").read_text(encoding="utf-8")
    assert succeed("card", "metaformer", "--output", "card.md", cwd=tmp_path) == ""
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == card
    assert os.listdir(tmp_path) == ["card.md"]


# ------------------------------------------------------------------------------------------------------- costs, weights


def test_profile_prints_tables_and_json(tmp_path):
    output = succeed("profile", "poolformer_s12", "--input-size", "3", "64", "64", "--depth", "1")
    assert "11,915,176" in output
    assert "one fused multiply-add counts one" in output
    plotted = ["profile", "poolformer_s12", "--batch-size", "2", "--plot", "cost.png", "--json"]
    (costs,) = json.loads(succeed(*plotted, cwd=tmp_path))
    assert costs["params"] == zoo.model_info("poolformer_s12").params
    assert costs["macs"] == 2 * zoo.model_info("poolformer_s12").macs
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # test_snnet holds its figures
def test_profile_of_stitches(tmp_path):
    output = succeed("profile", "snnet_test", "--stitches", "--plot", "stitches.svg", cwd=tmp_path)
    assert "anchor 0 to block 0 > anchor 1 from block 1" in output
    assert "9 networks at 3x64x64." in output
    assert (tmp_path / "stitches.svg").read_text().count("<use") > 9
    costs = json.loads(succeed("profile", "snnet_test", "--stitches", "--input-size", "3", "32", "32", "--json"))
    assert [cost["stitch"] for cost in costs["stitches"]] == list(range(9))
    assert costs["stitches"][0]["macs"] == zoo.profile("snnet_test", (3, 32, 32)).macs


def test_benchmark_prints_json(tmp_path):
    arguments = ["poolformer_s12", "--input-size", "3", "32", "32", "--batch-size", "1", "2", "--threads", "1"]
    results = json.loads(succeed("benchmark", *arguments, "--repeats", "2", "--json"))
    assert [result["batch_size"] for result in results] == [1, 2]
    assert all(result["latency_ms"] > 0 for result in results)


def test_convert_writes_the_zoos_layout(tmp_path):
    import safetensors.torch
    import torch

    model = zoo.create_model("poolformerv2_s12", num_classes=10)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "published.pth")
    succeed("convert", "published.pth", "ours.safetensors", "--model", "poolformerv2_s12", cwd=tmp_path)
    converted = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())

    before = (tmp_path / "ours.safetensors").read_bytes()
    again = ("convert", "published.pth", "ours.safetensors", "--model", "poolformerv2_s12")
    assert "overwrite" in fail(1, *again, cwd=tmp_path)
    assert (tmp_path / "ours.safetensors").read_bytes() == before
    succeed(*again, "--overwrite", cwd=tmp_path)


# ------------------------------------------------------------------------------------------------------------ bad input

USER_ERRORS = [
    (["info", "poolformer_s13"], "There is no model called 'poolformer_s13'. Did you mean"),
    (["info", "poolformer_s12.sail_in2k"], "no weights tagged 'sail_in2k'. Did you mean sail_in1k?"),
    (["info", ""], "There is no model called ''."),
    (["list", "--family", "metaforme"], "no family 'metaforme'. Did you mean metaformer?"),
    (["search", "--task", "visoin"], "no task 'visoin'. Did you mean vision?"),
    (["search", "--max-params", "0"], "max_params must be a number above zero"),
    (["search", "--max-macs", "-2"], "max_macs must be a number above zero"),
    (["search", "--min-top1", "nan"], "min_top1 must be a number above zero"),
    (["search", "--sort", "parms"], "no sort key 'parms'. Did you mean params?"),
    (["pareto", "--x", "latency"], "no axis 'latency'"),
    (["pareto", "--x", "macs", "--y", "macs"], "two different axes"),
    (["pareto", "--plot", "nowhere/front.png"], "there is no folder 'nowhere'"),
    (["pareto", "--plot", "."], "it is a folder"),
    (["pareto", "--plot", "front.xyz"], "give it one of the endings"),
    (["pareto", "--plot", "front"], "give it one of the endings"),
    (["card", "metaforme"], "Did you mean metaformer?"),
    (["card", "metaformer", "--output", "nowhere/card.md"], "there is no folder 'nowhere'"),
    (["profile", "poolformer_s12", "--plot", "nowhere/cost.png"], "there is no folder 'nowhere'"),
    (["convert", "in.pth", "nowhere/out.safetensors"], "there is no folder 'nowhere'"),
]


@pytest.mark.parametrize(("arguments", "message"), USER_ERRORS, ids=str)
def test_errors_of_the_user_are_one_line_and_status_1(arguments, message, tmp_path):
    assert message in fail(1, *arguments, cwd=tmp_path)
    assert os.listdir(tmp_path) == []


HEAVY_USER_ERRORS = [
    (["profile", "poolformer_s13"], "poolformer_s13"),
    (["profile", "poolformer_s12", "--input-size", "3", "0", "224"], "input"),
    (["profile", "poolformer_s12", "--input-size", "4", "224", "224"], "4"),
    (["profile", "poolformer_s12", "--batch-size", "0"], "batch_size"),
    (["profile", "poolformer_s12", "--depth", "-1"], "depth"),
    (["profile", "poolformer_s12", "--stitches"], "has no stitches"),
    (["benchmark", "poolformer_s12", "--batch-size", "-1"], "batch"),
    (["benchmark", "poolformer_s12", "--dtype", "float23"], "float23"),
    (["benchmark", "poolformer_s12", "--device", "gpu"], "gpu"),
    (["convert", "missing.pth", "out.safetensors", "--model", "poolformer_s12"], "missing.pth"),
]


@pytest.mark.parametrize(("arguments", "message"), HEAVY_USER_ERRORS, ids=str)
def test_errors_of_the_user_in_commands_that_load_torch(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert os.listdir(tmp_path) == []


WRONG_USAGE = [
    ([], "the following arguments are required: COMMAND"),
    (["lst"], "there is no command 'lst'. Did you mean list?"),
    (["frobnicate"], "There are: list, search"),
    (["list", "--famly", "metaformer"], "there is no option '--famly'. Did you mean --family?"),
    (["search", "--max_params=6M"], "there is no option '--max_params'. Did you mean --max-params"),
    (["search", "--max-par", "6M"], "there is no option '--max-par'"),  # no abbreviations: scripts outlive them
    (["search", "--max-params", "6 apples"], "'6 apples' is not a number such as 6e6, 6M or 1.2G"),
    (["search", "poolformer"], "'poolformer' is one argument too many"),
    (["info"], "required: NAME"),
    (["info", "poolformer_s12", "poolformer_s24"], "one argument too many"),
    (["profile", "poolformer_s12", "--input-size", "224"], "--input-size: expected 3 arguments"),
    (["profile", "poolformer_s12", "--depth", "deep"], "--depth: invalid int value: 'deep'"),
    (["profile", "poolformer_s12", "poolformer_s24", "--plot", "x.png"], "--plot draws one model"),
    (["profile", "snnet_test", "--stitches", "--tokens", "8"], "--stitches takes a single NAME"),
    (["convert", "in.pth"], "required: OUT.safetensors"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE, ids=str)
def test_wrong_usage_is_status_2_and_names_the_right_one(arguments, message):
    assert message in fail(2, *arguments)


def test_version():
    assert succeed("--version") == f"zoo {zoo.__version__}\n"


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [*COMMAND, "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None
    process.stdout.close()  # nobody reads
    _, errors = process.communicate()
    assert process.returncode == 141
    assert errors == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*COMMAND, "list"], stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert result.returncode == 1
    assert result.stderr == "error: No space left on device\n"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_ctrl_c_ends_a_command_quietly():
    arguments = ["benchmark", "poolformer_s12", "--input-size", "3", "32", "32", "--repeats", "1000000"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        while process.poll() is None and "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.1)
        time.sleep(3)  # from here on it builds or measures, for hours
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    # Python itself ends by the signal when the interrupt fell into an extension's import; a shell says 130 to both
    assert process.returncode in (130, -signal.SIGINT)
    assert out == b""
    assert errors.endswith(b"Interrupted.\n")
    assert b"Traceback" not in errors


def test_output_that_cannot_spell_a_name_is_still_output():
    env = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([*COMMAND, "info", "poolformer_s12"], capture_output=True, env=env)
    assert result.returncode == 0, result.stderr
    assert b"11,915,176" in result.stdout


def test_info_asks_for_an_architecture(tmp_path):
    for place in (tmp_path, "here"):
        assert "That names weights, and this asks for an architecture" in fail(1, "info", f"local-dir:{place}")
