"""Greedy decoding on a CPU: ours in C++ and in PyTorch, transformers and llama.cpp, all with the same weights.

    python benchmarks/lm_decode.py

The weights are random: speed does not depend on them. Every contender reads the same prompt, has first shown that it
computes what the plain model does, and makes its new tokens in pieces; all take turns, piece by piece, in one process,
the order turning round, and one token before each piece is not timed. Recorded are medians over pieces and rounds, and
beside them the limit of each: memory bandwidth, measured in each round by reading a large array with as many threads,
over the bytes of the weights. The largest bandwidth seen is taken, and the memory for keys and values left out.
`--plot` draws the results file.

OMP_NUM_THREADS is set to 2 where it is not set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before anything reads it

import numpy as np
import torch
from record import RESULTS, command, versions, write_json
from torch import Tensor, nn

import zoo
from zoo.config import run_command
from zoo.devices import device_name
from zoo.errors import ConfigError, ZooError
from zoo.exporting.gguf import write_gguf
from zoo.plots import new_figure, save_figure

FOLDER = RESULTS / "lm_decode"
PIECE = 16  # tokens between two turns
READ = 2**28  # bytes that the bandwidth is measured on: much more than caches hold
CONTENDERS = {  # name: (weights, how much a logit may be off, of the largest: random ones are small)
    "zoo float32": ("float32", 1e-4),
    "zoo float32, PyTorch alone": ("float32", 1e-4),
    "zoo bfloat16": ("bfloat16", 0.1),
    "zoo bfloat16, PyTorch alone": ("bfloat16", 0.1),
    "zoo float16": ("float16", 0.1),
    "zoo int8": ("int8", 0.1),
    "zoo int4": ("int4", 0.8),
    "transformers float32": ("float32", 1e-4),
    "transformers float32, compiled": ("float32", 1e-4),
    "transformers bfloat16": ("bfloat16", 0.1),
    "transformers bfloat16, compiled": ("bfloat16", 0.1),
    "llama.cpp f32": ("float32", 1e-4),
    "llama.cpp bf16": ("bfloat16", 0.1),
    "llama.cpp q8_0": ("int8", 0.1),
    "llama.cpp q4_0": ("int4", 0.8),
    "llama-cpp-python f32": ("float32", 1e-4),
    "llama-cpp-python bf16": ("bfloat16", 0.1),
    "llama-cpp-python q8_0": ("int8", 0.1),
    "llama-cpp-python q4_0": ("int4", 0.8),
}


class Contender(Protocol):
    weight_bytes: int

    def prefill(self, tokens: list[int]) -> Tensor:
        """Forget everything, read the prompt; (vocab_size,) logits of the next token."""

    def step(self) -> None:
        """Take the most likely token, and compute the logits of the next."""


class Zoo:
    def __init__(self, model: nn.Module, name: str, length: int) -> None:
        kind, _, how = name.removeprefix("zoo ").partition(", ")
        if kind.startswith("int"):
            self.model: Any = zoo.quantize(model, kind)
        else:
            self.model = zoo.optimize_for_inference(model).to(getattr(torch, kind))
        self.native = "0" if how else "1"
        self.cache = self.model.make_cache(1, length)
        tensors = [tensor for name, tensor in self.model.state_dict().items() if "rotary" not in name]
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)

    def _run(self, tokens: Tensor) -> Tensor:
        os.environ["ZOO_NATIVE"] = self.native
        logits = self.model(tokens, cache=self.cache)[0, -1]
        self.next = logits.argmax().view(1, 1)
        return logits

    def prefill(self, tokens: list[int]) -> Tensor:
        self.cache.reset()
        return self._run(torch.tensor([tokens]))

    def step(self) -> None:
        self._run(self.next)


class Transformers:
    """transformers' own loop has more to do between steps than this one."""

    def __init__(self, model: nn.Module, name: str, length: int) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        kind, _, how = name.removeprefix("transformers ").partition(", ")
        self.length, self.is_static = length, bool(how)
        with tempfile.TemporaryDirectory() as folder:
            zoo.save_pretrained(model, f"{folder}/model")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                f"{folder}/model", dtype=getattr(torch, kind)
            ).eval()
        if type(self.model).__module__.partition(".")[0] != "transformers":
            raise ZooError(f"{type(self.model)} is not transformers' own class")
        self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())  # a tied one counts once
        self.run = torch.compile(self.model, dynamic=False) if self.is_static else self.model
        self.cache: Any = None

    def prefill(self, tokens: list[int]) -> Tensor:
        import transformers

        if not self.is_static:
            self.cache = transformers.DynamicCache(config=self.model.config)
        elif self.cache is None:
            self.cache = transformers.StaticCache(config=self.model.config, max_cache_len=self.length)
        else:
            self.cache.reset()
        self.place = len(tokens)
        out = self.model(
            torch.tensor([tokens]),
            past_key_values=self.cache,
            position_ids=torch.arange(self.place)[None],
            use_cache=True,
            logits_to_keep=1,
        )
        self.next = out.logits[0, -1].argmax().view(1, 1)
        return out.logits[0, -1]

    def step(self) -> None:
        out = self.run(
            self.next,
            past_key_values=self.cache,
            position_ids=torch.tensor([[self.place]]),
            use_cache=True,
            logits_to_keep=1,
        )
        self.place += 1
        self.next = out.logits[0, -1].argmax().view(1, 1)


class LlamaCpp:
    """llama.cpp as `zoo.generate(..., engine="llama.cpp")` calls it."""

    def __init__(self, model: nn.Module, name: str, length: int) -> None:
        import llama_cpp

        from zoo.generation.llama_cpp import LlamaCppModel

        self.length = length
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(model, Path(folder) / "model.gguf", dtype=name.removeprefix("llama.cpp "))
            self.model = LlamaCppModel(path)
        self.weight_bytes = int(llama_cpp.llama_model_size(self.model.model))

    def prefill(self, tokens: list[int]) -> Tensor:
        from zoo.generation.llama_cpp import LlamaCppDecoding

        self.decoding = LlamaCppDecoding(self.model, [tokens], self.length - len(tokens))
        self.decoding.step()
        return self.decoding.logits[0].clone()

    def step(self) -> None:
        self.decoding.step()


class LlamaCppPython:
    """llama.cpp as its package calls it, with the memory that ours has."""

    def __init__(self, model: nn.Module, name: str, length: int) -> None:
        import llama_cpp

        dtype = name.removeprefix("llama-cpp-python ")
        wide = llama_cpp.GGML_TYPE_F32
        exact: dict[str, Any] = {"flash_attn": False, "type_k": wide, "type_v": wide}
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(model, Path(folder) / "model.gguf", dtype=dtype)
            self.model = llama_cpp.Llama(
                str(path),
                n_ctx=length,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
                **(exact if dtype == "f32" else {}),
            )
        self.vocab_size = int(self.model.n_vocab())
        self.weight_bytes = int(llama_cpp.llama_model_size(self.model.model))

    def prefill(self, tokens: list[int]) -> Tensor:
        import llama_cpp

        self.model.reset()
        self.tokens = self.model.generate(tokens, temp=0.0)
        next(self.tokens)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.model.ctx), shape=(self.vocab_size,))
        return torch.from_numpy(logits.copy())

    def step(self) -> None:
        next(self.tokens)


def contender(name: str, model: nn.Module, length: int) -> Contender:
    sides: dict[str, Callable[..., Contender]] = {
        "zoo": Zoo,
        "transformers": Transformers,
        "llama.cpp": LlamaCpp,
        "llama-cpp-python": LlamaCppPython,
    }
    return sides[name.partition(" ")[0]](model, name, length)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bandwidth(array: Tensor) -> float:
    """Bytes a second that all threads together read."""
    return array.nbytes / min(seconds(array.sum) for _ in range(3))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model: Any = zoo.create_model(arguments.model, pretrained=False).eval().requires_grad_(False)
    prompt = torch.randint(0, model.config.vocab_size, (arguments.prompt,)).tolist()
    length = arguments.prompt + arguments.new_tokens + arguments.new_tokens // PIECE + 1
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]), logits_to_keep=1)[0, -1]
        running: dict[str, Contender] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in arguments.contenders:
            print(f"preparing {name}", file=sys.stderr, flush=True)
            one = running[name] = contender(name, model, length)
            error = ((one.prefill(prompt).float() - expected).abs().max() / expected.abs().max()).item()
            if not error < CONTENDERS[name][1]:
                raise ZooError(f"{name} computes something else: off by {error:.1e} of the largest logit")
            for _ in range(4):  # compiles what is to be compiled
                one.step()
            found[name] = {"error": float(f"{error:.1e}"), "weight_bytes": one.weight_bytes}
        prefill: dict[str, list[float]] = {name: [] for name in running}
        decode: dict[str, list[float]] = {name: [] for name in running}
        speeds = []
        array = torch.ones(READ // 4)
        for turn in range(arguments.rounds):
            speeds.append(bandwidth(array))
            order = list(running)
            order = order[turn % len(order) :] + order[: turn % len(order)]
            for name in order:
                one = running[name]
                prefill[name].append(seconds(lambda one=one: one.prefill(prompt)))  # type: ignore[misc]
            for piece in range(arguments.new_tokens // PIECE):
                for name in order if piece % 2 else reversed(order):
                    one = running[name]
                    one.step()
                    start = time.perf_counter()
                    for _ in range(PIECE):
                        one.step()
                    decode[name].append((time.perf_counter() - start) / PIECE)
            print(f"round {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    limit = max(speeds)
    for name, facts in found.items():
        rate = 1 / statistics.median(decode[name])
        facts |= {
            "decode_tokens_per_second": round(rate, 2),
            "decode_tokens_per_second_fastest": round(1 / min(decode[name]), 2),
            "prefill_tokens_per_second": round(arguments.prompt / statistics.median(prefill[name]), 1),
            "limit_tokens_per_second": round(limit / facts["weight_bytes"], 1),
            "of_limit": round(rate * facts["weight_bytes"] / limit, 3),
        }
    return {
        "bandwidth_gb_s": round(limit / 1e9, 2),
        "bandwidth_gb_s_each_round": [round(speed / 1e9, 2) for speed in speeds],
        "contenders": found,
        "ratios": ratios(found),
    }


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What ours reaches of others: of transformers' best, of llama.cpp, of our own 16 bits; and our way to call
    llama.cpp of its package's.
    """
    rate = {name: one["decode_tokens_per_second"] for name, one in found.items()}
    out: dict[str, float] = {}
    for name, (weights, _) in CONTENDERS.items():
        if name not in rate or not name.startswith("zoo"):
            continue
        sixteen = ("bfloat16", "float16")
        like = [n for n, (w, _) in CONTENDERS.items() if n in rate and (w == weights or {w, weights} <= {*sixteen})]
        for side in ("transformers", "llama.cpp"):
            theirs = [rate[n] for n in like if n.startswith(side)]
            if theirs:
                out[f"{name} / {side}'s best"] = round(rate[name] / max(theirs), 3)
        if weights.startswith("int"):
            ours = [rate[n] for n in rate if n.startswith("zoo") and CONTENDERS[n][0] in sixteen]
            if ours:
                out[f"{name} / zoo's best in 16 bits"] = round(rate[name] / max(ours), 3)
    for name in rate:
        package = name.replace("llama.cpp", "llama-cpp-python")
        if name.startswith("llama.cpp") and package in rate:
            out[f"{name} / {package}"] = round(rate[name] / rate[package], 3)
    return out


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens a second of every contender, with its limit as a line."""
    found = report["contenders"]
    names = list(found)
    figure = new_figure((9, 0.38 * len(names) + 1.6))
    axes = figure.add_subplot()
    colours = {
        "zoo": "tab:blue",
        "transformers": "tab:orange",
        "llama.cpp": "tab:green",
        "llama-cpp-python": "tab:olive",
    }
    for place, name in enumerate(reversed(names)):
        one = found[name]
        axes.barh(place, one["decode_tokens_per_second"], color=colours[name.partition(" ")[0]])
        axes.plot([one["limit_tokens_per_second"]] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("new tokens a second; black: memory bandwidth over the bytes of the weights")
    axes.set_title(f"{report['model']}, {report['threads']} threads")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilellm_125m")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="TOKENS", help=f"a multiple of {PIECE}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--plot", action="store_true", help="only draw the results file of --model")
    arguments = parser.parse_args()
    path = arguments.results / f"{arguments.model}.json"
    if not arguments.plot:
        if arguments.rounds < 1 or arguments.threads < 1 or arguments.prompt < 1:
            raise ConfigError("--rounds, --threads and --prompt are whole numbers from 1 up.")
        if arguments.new_tokens < PIECE or arguments.new_tokens % PIECE:
            raise ConfigError(f"--new-tokens is a multiple of {PIECE}, not {arguments.new_tokens}.")
        report = {
            "model": arguments.model,
            "command": command(),
            "device": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} processors ({platform.machine()})",
            "threads": arguments.threads,
            "versions": versions("torch", "transformers", "llama_cpp_python"),
            "prompt": arguments.prompt,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            **measure(arguments),
        }
        write_json(report, path)
        print(f"bandwidth {report['bandwidth_gb_s']} GB/s")
        for name, one in report["contenders"].items():
            print(
                f"{name:<32}{one['decode_tokens_per_second']:8.1f} tokens/s, {100 * one['of_limit']:5.1f}% of the limit"
                f", prefill {one['prefill_tokens_per_second']:7.1f}"
            )
        for name, ratio in report["ratios"].items():
            print(f"{name:<60}{ratio:6.2f}")
        print(f"Written to {path}")
    if not path.is_file():
        raise ConfigError(f"There is nothing to draw in {path}: measure first.")
    plot(json.loads(path.read_text()), path.with_suffix(".png"))
    print(f"Written to {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_command(main))
