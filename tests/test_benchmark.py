"""Benchmarks: what is measured, that it is measured side by side, and what is refused. No timing is asserted."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import ConfigError, UnknownModelError
from zoo.profiling import BenchmarkResult, benchmark_table, measure

SMALL: dict[str, Any] = {"input_size": (3, 32, 32), "warmup": 1, "repeats": 4, "memory": False}


def test_every_name_at_every_batch_size():
    results = zoo.benchmark(["poolformer_s12", "timm/test_vit"], batch_sizes=(1, 2), warmup=1, repeats=3, memory=False)
    assert [(result.batch_size, result.name) for result in results] == [
        (1, "poolformer_s12"),
        (1, "timm/test_vit"),
        (2, "poolformer_s12"),
        (2, "timm/test_vit"),
    ]
    assert [result.input_size for result in results[:2]] == [(3, 224, 224), (3, 160, 160)]  # each model's own
    for result in results:
        assert 0 < result.latency_p10_ms <= result.latency_ms <= result.latency_p90_ms
        assert math.isclose(result.throughput, 1000 * result.batch_size / result.latency_ms)
        assert (result.repeats, result.warmup, result.peak_memory) == (3, 1, None)
        assert (result.device, result.dtype, result.mode) == ("cpu", "float32", "inference")
        assert result.hardware
        assert result.torch_version == torch.__version__


def test_the_models_take_turns(monkeypatch):
    steps = []
    step = measure.Subject.step

    def watched(subject, images):
        steps.append(subject.name)
        step(subject, images)

    monkeypatch.setattr(measure.Subject, "step", watched)
    zoo.benchmark(["timm/resnet10t", "timm/test_vit"], batch_sizes=1, warmup=2, repeats=3, memory=False)
    one, two = "timm/resnet10t", "timm/test_vit"
    assert steps == [one, one, two, two, one, two, two, one, one, two]


def test_settings_reach_the_model():
    with torch.random.fork_rng():
        settings = measure.Settings(
            device=torch.device("cpu"), dtype=torch.bfloat16, channels_last=True, compile=False, mode="inference"
        )
        subject = settings.prepare("poolformer_s12", (3, 32, 32))
    convolutions = [module for module in subject.model.modules() if isinstance(module, nn.Conv2d)]
    assert not subject.model.training
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.bfloat16}
    assert convolutions[0].weight.is_contiguous(memory_format=torch.channels_last)
    images = subject.images(2)
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_training_steps_run_backward():
    settings = measure.Settings(
        device=torch.device("cpu"), dtype=torch.float32, channels_last=False, compile=False, mode="train"
    )
    subject = settings.prepare("timm/test_vit", None)
    gradients = []
    for parameter in subject.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad is not None))
    subject.step(subject.images(2))
    assert subject.model.training
    assert len(gradients) == sum(1 for _ in subject.model.parameters())
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    (result,) = zoo.benchmark("timm/test_vit", mode="train", warmup=1, repeats=2, memory=False)
    assert result.mode == "train"


def test_threads_are_set_and_restored(monkeypatch):
    before = torch.get_num_threads()
    wanted = before + 1
    seen = set()
    step = measure.Subject.step

    def watched(subject, images):
        seen.add(torch.get_num_threads())
        if len(images) == 13:
            raise RuntimeError("an unlucky batch")
        step(subject, images)

    monkeypatch.setattr(measure.Subject, "step", watched)
    (result,) = zoo.benchmark("poolformer_s12", threads=wanted, **SMALL)
    assert result.threads == wanted
    assert seen == {wanted}
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match=r"poolformer_s12 cannot run inference on cpu .* 13, .*: an unlucky batch"):
        zoo.benchmark("poolformer_s12", threads=wanted, batch_sizes=13, **SMALL)
    assert torch.get_num_threads() == before


def test_peak_memory_is_that_of_weights_and_activations():
    size = (3, 64, 64)
    small, large = zoo.benchmark("poolformer_s12", batch_sizes=(1, 32), input_size=size, warmup=1, repeats=2)
    weights = 4 * zoo.model_info("poolformer_s12").params
    assert small.peak_memory is not None
    assert large.peak_memory is not None
    # besides the weights at batch 1 lie little more than a map of 256 channels, and copies that kernels make
    assert weights < small.peak_memory < 2 * weights
    # the input and output of the widest activation are alive at once: 32 maps of 256 x 16 x 16, twice
    assert large.peak_memory > weights + 2 * 32 * 256 * 16 * 16 * 4


@pytest.mark.slow  # each figure takes a process of its own
def test_peak_memory_of_a_model_of_the_users_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import zoo
            from torch import nn

            @zoo.register
            class my_net(nn.Sequential):
                def __init__(self, num_classes=10, in_chans=3):
                    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
                    super().__init__(nn.Conv2d(in_chans, 8, 3), pool, nn.Linear(8, num_classes))
            """
        )
    )
    script = """
import zoo, mine, torch
@zoo.register
class here(mine.my_net):
    pass
options = dict(input_size=(3, 32, 32), warmup=1, repeats=2)
results = zoo.benchmark(["my_net", "here"], **options)
print([result.peak_memory is None for result in results])
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[False, True]", done.stderr


def test_results_as_json_and_as_a_table():
    results = zoo.benchmark(["poolformer_s12", "timm/poolformer_s12"], batch_sizes=[1, 2], channels_last=True, **SMALL)
    facts = json.loads(results[0].to_json())
    assert facts == json.loads(json.dumps(results[0].to_dict()))
    assert facts["latency_ms"] == results[0].latency_ms
    assert facts["channels_last"] is True
    table = benchmark_table(results)
    rows = [line.split() for line in table.splitlines() if re.match(r" *(timm/)?poolformer_s12 ", line)]
    assert [row[0] for row in rows] == ["poolformer_s12", "timm/poolformer_s12"] * 2
    speeds = [row[-2] for row in rows]
    expected = results[1].throughput / results[0].throughput
    assert speeds[0] == speeds[2] == "1.00x"
    assert speeds[1] == f"{expected:.2f}x"
    assert "channels_last" in table.splitlines()[0]
    assert "Latency: of one batch, the median" in table


def test_the_table_without_results():
    with pytest.raises(ConfigError, match="no results"):
        benchmark_table([])


@pytest.mark.slow
def test_compiled_models_are_measured():
    (result,) = zoo.benchmark("timm/test_vit", compile=True, warmup=1, repeats=2)
    assert result.compile
    assert result.peak_memory is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    results: list[BenchmarkResult] = zoo.benchmark(
        ["poolformer_s12", "poolformer_s24"], batch_sizes=(1, 8), device="cuda", dtype="bfloat16", repeats=3
    )
    weights = [2 * zoo.model_info(result.name).params for result in results]
    for result, size in zip(results, weights, strict=True):
        assert result.peak_memory is not None
        assert size < result.peak_memory < 2 * size + 8 * 2**24


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": 0}, "batch_size must be a whole number from 1 up, not 0"),
        ({"batch_sizes": (1, -2)}, "batch_size must be a whole number from 1 up, not -2"),
        ({"batch_sizes": ()}, "batch_sizes must be one or a list"),
        ({"batch_sizes": 2.5}, "batch_sizes must be one or a list"),
        ({"repeats": 0}, "repeats must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"threads": 0}, "threads must be"),
        ({"threads": 1.5}, "threads must be"),
        ({"input_size": (3, 32)}, "input_size is"),
        ({"input_size": (3, 32, -32)}, "input_size is"),
        ({"input_size": (3, 1, 1)}, "cannot run inference on cpu with batch size 1, input (3, 1, 1): "),
        ({"device": "cdua"}, "There is no device 'cdua'. Did you mean cuda?"),
        ({"device": "meta"}, "Cannot benchmark on 'meta'"),
        ({"device": None}, "There is no device None"),
        ({"device": "cuda:99"}, "There is no device 'cuda:99' here"),
        ({"dtype": "float23"}, "Did you mean float32"),
        ({"dtype": torch.int8}, "dtype is 'int8'"),
        ({"mode": "training"}, "mode is 'training', but must be one of inference, train. Did you mean train?"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        zoo.benchmark("poolformer_s12", **{"memory": False, **arguments})


@pytest.mark.parametrize("names", [[], None, 3, [3]])
def test_names_that_are_none_at_all(names):
    with pytest.raises(ConfigError):
        zoo.benchmark(names)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownModelError, match=r"'poolformer_s99'. Did you mean poolformer_s"):
        zoo.benchmark(["poolformer_s12", "poolformer_s99"], **SMALL)
    with pytest.raises(UnknownModelError, match="Did you mean resnet18"):
        zoo.benchmark("timm/resnet_18", **SMALL)
