"""The `zoo` command: finding, costing, converting and publishing models from a shell.

Facts (list, search, info, pareto, card) load neither torch nor timm; the other commands import what they need.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from zoo import __version__
from zoo.errors import ConfigError, ZooError, describe_os_error, did_you_mean
from zoo.files import check_writable, whole_file
from zoo.registry import (
    PARETO_AXES,
    SORT_KEYS,
    TASKS,
    ModelInfo,
    Weights,
    accuracy_axis,
    list_models,
    model_info,
    pareto,
    search,
)
from zoo.units import humanize, parse_quantity, shape_text

if TYPE_CHECKING:
    from rich.table import Table

CONVENTION = (
    "MACs: multiply-accumulates of convolution, linear, matmul and attention (one fused multiply-add counts one), "
    "for one input of the size given."
)
PER_TOKEN = (
    "MACs/token: multiply-accumulates of linear layers and head for one generated token; attention adds to them with "
    "every remembered one. KV/token: bytes remembered of a token, over all layers, at 2 bytes a number."
)
TOP1 = "top-1: best ImageNet-1k accuracy claimed for any of a model's weights at that size, percent."
MIOU = "mIoU: best Cityscapes accuracy of segmentation claimed likewise, percent."
STITCH_COSTS = (
    "Params: of the path, by the authors' rule, which leaves out class token and positions. MACs: convolution, linear "
    "and attention, one fused multiply-add counts one, for one image. fvcore: MACs and norms."
)


# -------------------------------------------------------------------------------------------------------------- parsing


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, and the nearest right one for a name that is wrong."""

    def __init__(self, **kwargs: Any) -> None:
        self.option_names: list[str] = []
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.option_names += action.option_strings
        return action

    def reject(self, unknown: list[str]) -> NoReturn:
        first = unknown[0]
        if first.startswith("-"):
            option = first.partition("=")[0]
            self.error(f"there is no option {option!r}.{did_you_mean(option, self.option_names)}")
        self.error(f"{first!r} is one argument too many.")


def quantity(text: str) -> float:
    try:
        return parse_quantity(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `zoo`, and those of its commands by name."""
    parser = Parser(
        prog="zoo",
        description="Compact networks: find them, count and measure what they cost, convert their checkpoints.",
        epilog="`zoo COMMAND --help` shows the options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"zoo {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    commands: dict[str, Parser] = {}

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: str) -> Parser:
        listed = "\n".join(f"  {line}" for line in examples.strip().splitlines())
        sub = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"examples:\n{listed}"
        )
        sub.set_defaults(run=run)
        commands[name] = sub
        return sub

    def filters(sub: Parser) -> None:
        sub.add_argument("--task", metavar="TASK", help=f"{' or '.join(TASKS)}")
        sub.add_argument("--family", metavar="FAMILY", help="models of one family, such as metaformer")

    def budget(sub: Parser) -> None:
        filters(sub)
        sub.add_argument("--max-params", type=quantity, metavar="N", help="parameters at most: 6e6 or 6M")
        sub.add_argument("--max-macs", type=quantity, metavar="N", help="MACs at most, of an image or a token: 1.2G")
        sub.add_argument("--min-top1", type=float, metavar="PERCENT", help="claimed ImageNet-1k top-1 at least")
        sub.add_argument("--license", metavar="PATTERN", help="licence of code and weights: apache-2.0, or 'apache*'")

    def as_json(sub: Parser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON, with exact numbers, instead of a table")

    def input_shape(sub: Parser) -> None:
        sub.add_argument("--input-size", nargs=3, type=int, metavar=("C", "H", "W"), help="default: the model's own")

    sub = command(
        "list",
        run_list,
        "list models by name",
        """
zoo list
zoo list 'poolformer*' '*_s36'
zoo list caformer --pretrained
zoo list --task vision --json""",
    )
    sub.add_argument("patterns", nargs="*", metavar="PATTERN", help="wildcard, or text that the name contains")
    filters(sub)
    sub.add_argument("--pretrained", action="store_true", help="one row for each published checkpoint, by name.tag")
    as_json(sub)

    sub = command(
        "search",
        run_search,
        "find models within a budget",
        """
zoo search --max-params 30M --max-macs 4.5G --min-top1 80
zoo search --license 'apache*' --sort top1
zoo search --task language --max-params 400M
zoo search --max-macs 2e9 --json""",
    )
    budget(sub)
    sub.add_argument("--sort", metavar="KEY", default="params", help=f"{', '.join(SORT_KEYS)} (default: params)")
    as_json(sub)

    sub = command(
        "info",
        run_info,
        "show every fact about a model: paper, costs, licences, weights",
        """
zoo info poolformer_s12
zoo info caformer_s18.sail_in22k_ft_in1k_384
zoo info poolformer_s12 --json""",
    )
    sub.add_argument("name", metavar="NAME", help="a model, or a model and the tag of its weights")
    as_json(sub)

    sub = command(
        "pareto",
        run_pareto,
        "show the models that no other beats on cost and accuracy together",
        """
zoo pareto
zoo pareto --x params --max-params 60M
zoo pareto --task segmentation
zoo pareto --plot pareto.png""",
    )
    sub.add_argument("--x", metavar="AXIS", default="macs", help=f"{', '.join(PARETO_AXES)} (default: macs)")
    sub.add_argument("--y", metavar="AXIS", help="as --x (default: top1; of segmentation miou)")
    budget(sub)
    sub.add_argument("--plot", metavar="FILE", help="also draw it, as PNG, SVG or PDF by the ending of FILE")
    as_json(sub)

    sub = command(
        "profile",
        run_profile,
        "count parameters, MACs and activations, by module and by operator",
        """
zoo profile poolformer_s12
zoo profile caformer_s18 --input-size 3 384 384 --depth 3
zoo profile poolformer_s12 --plot cost.png
zoo profile runs/digits
zoo profile slak_tiny --sparsity 0.4 --sparsity-rule erk
zoo profile mobilellm_125m --tokens 512
zoo profile snnet_deit_ti_s_b --stitches --plot stitches.png
zoo profile poolformer_s12 timm/deit_tiny_patch16_224 --json""",
    )
    sub.add_argument("names", nargs="+", metavar="NAME", help="a model of the zoo, of timm (timm/NAME), or a folder")
    input_shape(sub)
    sub.add_argument("--tokens", type=int, metavar="N", help="of a language model: length of the text (default: 128)")
    sub.add_argument("--batch-size", type=int, default=1, metavar="N", help="images or texts at once (default: 1)")
    sub.add_argument("--depth", type=int, default=2, metavar="N", help="levels of modules to show (default: 2)")
    sub.add_argument("--plot", metavar="FILE", help="also draw where the cost lies, for a single NAME")
    sub.add_argument("--stitches", action="store_true", help="of an SN-Net: a row for each network in it")
    zeros = sub.add_mutually_exclusive_group()
    zeros.add_argument("--checkpoint", metavar="FILE", help="weights whose zeros are counted, for a single NAME")
    zeros.add_argument("--sparsity", type=float, metavar="S", help="count as if this share of the weights were zero")
    sub.add_argument(
        "--sparsity-rule",
        metavar="R",
        help="how --sparsity is spread over the layers: uniform, er, erk (default: uniform)",
    )
    as_json(sub)

    sub = command(
        "sparsity",
        run_sparsity,
        "count what zeros, or the masks of a run, leave of a model's weights, layer by layer, and of its costs",
        """
zoo sparsity runs/sparse
zoo sparsity slak_tiny --checkpoint SLaK_tiny_checkpoint.pth
zoo sparsity runs/sparse --plot masks.png --layers 'stages.2.*'
zoo sparsity runs/sparse --json""",
    )
    sub.add_argument("source", metavar="RUN|CHECKPOINT|NAME", help="a folder, hf-hub:owner/name, a name, or timm/NAME")
    sub.add_argument("--checkpoint", metavar="FILE", help="weights for a model that is given by its name")
    input_shape(sub)
    sub.add_argument("--plot", metavar="FILE", help="also draw densities and masks, as PNG, SVG or PDF")
    sub.add_argument("--layers", nargs="+", metavar="PATTERN", help="whose masks to draw (default: twelve, evenly)")
    as_json(sub)

    sub = command(
        "benchmark",
        run_benchmark,
        "measure latency, throughput and peak memory side by side",
        """
zoo benchmark poolformer_s12 timm/poolformer_s12
zoo benchmark poolformer_s12 convformer_s18 --batch-size 1 32 --threads 2
zoo benchmark caformer_s18 --device cuda --dtype bfloat16 --channels-last --compile
zoo benchmark mobilellm_125m smollm_135m --tokens 128 --optimize --threads 2""",
    )
    sub.add_argument("names", nargs="+", metavar="NAME", help="a model of the zoo, of timm (timm/NAME), or a folder")
    sub.add_argument("--batch-size", nargs="+", type=int, default=[1], metavar="N", help="one or several (default: 1)")
    input_shape(sub)
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    sub.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, mps (default: cpu)")
    sub.add_argument("--dtype", default="float32", metavar="T", help="float32, bfloat16, float16 (default: float32)")
    sub.add_argument("--tokens", type=int, metavar="N", help="of a language model's prompt (default: 128)")
    sub.add_argument("--new-tokens", type=int, metavar="N", help="that a language model adds (default: 32)")
    sub.add_argument("--quantize", metavar="Q", help="weights of language models in int8 or int4")
    sub.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    sub.add_argument("--optimize", action="store_true", help="measure their fast forms (zoo.optimize_for_inference)")
    sub.add_argument("--compile", action="store_true", help="torch.compile the models first")
    sub.add_argument("--repeats", type=int, metavar="N", help="measurements of each model")
    as_json(sub)

    sub = command(
        "predict",
        run_predict,
        "say what a classifier sees in images, and draw where",
        """
zoo predict cat.jpg --model poolformer_s12
zoo predict photos/*.jpg --model runs/pets --topk 3 --json
zoo predict cat.jpg --model caformer_s18 --cam cam.png --class 'tabby cat'""",
    )
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="a file that Pillow reads")
    sub.add_argument("--model", required=True, metavar="NAME", help="a name, timm/NAME, hf-hub:owner/name or a folder")
    sub.add_argument("--checkpoint", metavar="PATH", help="weights for a model that is given by its name")
    sub.add_argument("--topk", type=int, default=5, metavar="N", help="classes to tell of each image (default: 5)")
    sub.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, mps (default: the accelerator there is)")
    sub.add_argument("--cam", metavar="FILE", help="draw the class-activation map (Grad-CAM) of a single IMAGE")
    sub.add_argument("--cam-dir", metavar="DIR", help="draw those of all images, each into DIR under its own name")
    sub.add_argument("--class", dest="class_name", metavar="CLASS", help="the map's class, by name or number")
    as_json(sub)

    sub = command(
        "token-labels",
        run_token_labels,
        "let a teacher label every place of training images, for training with token labels",
        """
zoo token-labels imagenet labels --teacher timm/dm_nfnet_f6.dm_in1k --size 576 --amp bf16
zoo token-labels pets labels --teacher runs/pets --device cpu""",
    )
    sub.add_argument("data", metavar="DATA", help="the folder with train/<class>/*.jpg")
    sub.add_argument("out", metavar="OUT", help="the folder to write; maps that are there already are kept")
    sub.add_argument(
        "--teacher", required=True, metavar="NAME", help="a name, timm/NAME, hf-hub:owner/name or a folder"
    )
    sub.add_argument("--checkpoint", metavar="PATH", help="weights for a teacher that is given by its name")
    sub.add_argument("--split", default="train", metavar="NAME", help="the folder in DATA (default: train)")
    sub.add_argument("--size", type=int, metavar="N", help="side that images are resized to (default: the teacher's)")
    sub.add_argument("--topk", type=int, default=5, metavar="K", help="classes to keep of each place (default: 5)")
    sub.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once (default: 32)")
    sub.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: up to 4)")
    sub.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, mps (default: the accelerator there is)")
    sub.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no", help="mixed precision (default: no)")

    def language_model(sub: Parser, temperature: float, top_p: float | None, max_new_tokens: str) -> None:
        sub.add_argument("--model", required=True, metavar="NAME", help="a name, hf-hub:owner/name, a run or a folder")
        sub.add_argument("--checkpoint", metavar="PATH", help="weights for a model that is given by its name")
        sub.add_argument("--random", action="store_true", help="random weights, to see how fast it is")
        sub.add_argument(
            "--tokenizer", metavar="NAME", help="bytes, a folder, hf-hub:owner/name (default: the model's)"
        )
        sub.add_argument("--max-new-tokens", type=int, metavar="N", help=f"at most (default: {max_new_tokens})")
        sub.add_argument(
            "--temperature",
            type=float,
            default=temperature,
            metavar="T",
            help="0 takes the most likely token (default: %(default)s)",
        )
        sub.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
        sub.add_argument(
            "--top-p",
            type=float,
            default=top_p,
            metavar="P",
            help="draw among those that reach the probability P together"
            + (" (default: %(default)s)" if top_p else ""),
        )
        sub.add_argument("--min-p", type=float, metavar="P", help="draw among those P times as likely as the first")
        sub.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less")
        sub.add_argument("--seed", type=int, metavar="N", help="of the draws")
        sub.add_argument(
            "--engine",
            choices=("native", "torch", "llama.cpp"),
            help="native: the fast form (default); torch: the model as it is; llama.cpp: exported to that",
        )
        sub.add_argument("--quantize", choices=("int8", "int4"), help="keep the weights in 8 or 4 bits")
        sub.add_argument(
            "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
        )
        sub.add_argument("--compile", action="store_true", help="run steps through torch.compile")
        sub.add_argument(
            "--device", default="auto", metavar="D", help="cpu, cuda, mps (default: the accelerator there is)"
        )
        sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")

    sub = command(
        "generate",
        run_generate,
        "let a language model continue a text",
        """
zoo generate --model runs/demo "Once upon a time"
zoo generate --model smollm_135m "The capital of France is" --max-new-tokens 20
zoo generate --model smollm_135m --quantize int8 --temperature 0.8 --top-p 0.95 -
zoo generate --model mobilellm_125m --random --tokenizer bytes "Hello" --json""",
    )
    sub.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from the standard input")
    language_model(sub, temperature=0.0, top_p=None, max_new_tokens="256, or what the context has room for")
    sub.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    as_json(sub)

    sub = command(
        "chat",
        run_chat,
        "talk with an instruction model, in the terminal or from a pipe, a line a turn",
        """
zoo chat --model hf-hub:me/assistant
zoo chat --model mobilellm_r1_140m --temperature 0.6 --system 'Answer in one sentence.'""",
    )
    language_model(sub, temperature=0.7, top_p=0.95, max_new_tokens="256, or what the context has room for")
    sub.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")

    sub = command(
        "tokenizer",
        run_tokenizer,
        "train a tokenizer, or show what one makes of a text",
        """
zoo tokenizer train books/*.txt --vocab-size 8192 --output books-8k
zoo tokenizer train corpus.parquet --column text --output corpus-8k
zoo tokenizer encode books-8k "It was a dark and stormy night"
zoo tokenizer encode smollm_135m "Hello, world" --json""",
    )
    actions = sub.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="a byte-level BPE of texts")
    train.add_argument("files", nargs="+", metavar="FILE", help="text, JSONL, parquet, a folder or a pattern")
    train.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="tokens (default: 8192)")
    train.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    train.add_argument("--column", metavar="NAME", help="of a table, what holds the texts")
    train.add_argument("--overwrite", action="store_true", help="replace the tokenizer in DIR")
    encode = actions.add_parser("encode", help="the token numbers of a text")
    encode.add_argument("tokenizer", metavar="NAME", help="bytes, a folder, hf-hub:owner/name, or a model's name")
    encode.add_argument("text", metavar="TEXT", help="- reads it from the standard input")
    as_json(encode)
    sub.option_names += [*train.option_names, *encode.option_names]

    sub = command(
        "convert",
        run_convert,
        "turn a published checkpoint into safetensors with the zoo's (and timm's) keys",
        """
zoo convert poolformer_s12.pth.tar poolformer_s12.safetensors --model poolformer_s12
zoo convert hf-hub:timm/poolformer_s12.sail_in1k poolformer_s12.safetensors --overwrite""",
    )
    sub.add_argument("source", metavar="IN", help="a checkpoint file, a folder, or hf-hub:owner/name@revision")
    sub.add_argument("out", metavar="OUT.safetensors", help="the file to write")
    sub.add_argument("--model", metavar="NAME", help="the architecture, where IN does not say it")
    sub.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")

    sub = command(
        "quantize",
        run_quantize,
        "store a language model in 8 or 4 bits, and say what that costs",
        """
zoo quantize runs/demo demo-int8 --to int8 --text notes.txt
zoo quantize smollm_135m smollm-int4 --to int4 --text corpus.parquet --max-tokens 100000""",
    )
    sub.add_argument("source", metavar="SOURCE", help="a run, a folder, hf-hub:owner/name, or a name")
    sub.add_argument("out", metavar="OUT", help="the folder to write")
    sub.add_argument("--to", choices=("int8", "int4"), default="int8", help="bits of a weight (default: int8)")
    sub.add_argument("--group-size", type=int, default=32, metavar="N", help="weights that share a scale (default: 32)")
    sub.add_argument("--text", metavar="PATH", help="measure the perplexity on it before and after: a file or folder")
    sub.add_argument("--max-tokens", type=int, metavar="N", help="read no more documents of it after so many tokens")
    sub.add_argument("--tokenizer", metavar="NAME", help="where SOURCE has none: bytes, a folder, hf-hub:owner/name")
    sub.add_argument("--checkpoint", metavar="FILE", help="weights for a model that is given by its name")
    sub.add_argument("--overwrite", action="store_true", help="replace the model in OUT")

    sub = command(
        "export",
        run_export,
        "write a model as transformers, llama.cpp (GGUF) or ONNX Runtime read it, and compare its logits there",
        """
zoo export runs/books books-transformers --to transformers
zoo export smollm_135m smollm-q8 --to gguf --dtype q8_0
zoo export poolformer_s12 poolformer-onnx --to onnx
zoo export poolformer_s12 poolformer-384 --to onnx --input-size 3 384 384""",
    )
    sub.add_argument("source", metavar="SOURCE", help="a name, hf-hub:owner/name, a run or a folder")
    sub.add_argument("folder", metavar="DIR", help="the folder to write, new or empty")
    sub.add_argument("--to", required=True, choices=("transformers", "gguf", "onnx"), help="the format")
    sub.add_argument("--dtype", metavar="T", help="f32, f16, bf16, for GGUF q8_0 and q4_0 too (default: the weights')")
    sub.add_argument(
        "--input-size",
        nargs=3,
        type=int,
        metavar=("C", "H", "W"),
        help="of the images, for ONNX (default: the model's own)",
    )
    sub.add_argument("--checkpoint", metavar="PATH", help="weights for a model that is given by its name")
    sub.add_argument(
        "--tokenizer", metavar="NAME", help="bytes, a folder, hf-hub:owner/name, none (default: the model's)"
    )
    sub.add_argument("--overwrite", action="store_true", help="write into DIR where it is not empty")

    def described(sub: Parser) -> None:
        sub.add_argument("--model", metavar="NAME", help="the architecture, where the source is a bare file of weights")
        sub.add_argument("--license", metavar="ID", help="of the weights, as the Hub calls it: apache-2.0, cc-by-4.0")
        sub.add_argument("--license-file", metavar="FILE", help="its text, where a copy has to go along")
        sub.add_argument("--dataset", metavar="ID", help="on the Hub, of the data it was trained and measured on")
        sub.add_argument("--note", metavar="TEXT", help="what else the card should say, such as the hardware")
        sub.add_argument("--results", metavar="FILE", help="results.json of eval.py (default: the run's evaluation/)")
        sub.add_argument("--half", action="store_true", help="keep the weights in half precision")
        sub.add_argument(
            "--tokenizer", metavar="NAME", help="of a language model (default: the one beside its weights)"
        )
        sub.add_argument(
            "--i-have-the-rights",
            action="store_true",
            help="pass on weights that come from others without a licence, or under one that forbids it",
        )

    sub = command(
        "card",
        run_card,
        "write the card of a family, from the facts of the index, or of a run or checkpoint, as `zoo publish` does",
        """
zoo card metaformer
zoo card metaformer --output metaformer.md
zoo card runs/digits""",
    )
    sub.add_argument("source", metavar="FAMILY|RUN|CHECKPOINT", help="such as metaformer, or a folder")
    sub.add_argument("--output", metavar="FILE", help="write here instead of to the terminal")
    described(sub)

    sub = command(
        "publish",
        run_publish,
        "publish a model on the Hub in one commit, and prove that it is there",
        """
zoo publish runs/digits me/digits --license apache-2.0
zoo publish runs/digits me/digits --dry-run
zoo publish runs/books me/books-20m --license cc-by-4.0
zoo publish model.safetensors me/poolformer --model poolformer_s12 --private""",
    )
    sub.add_argument("source", metavar="RUN|CHECKPOINT", help="a run's folder, one in the Hub's layout, or a file")
    sub.add_argument("repo_id", metavar="OWNER/NAME", help="the repository, made if need be; other files in it stay")
    sub.add_argument("--private", action="store_true", help="make the repository private")
    sub.add_argument("--pr", action="store_true", help="open a pull request instead of committing")
    sub.add_argument("--message", metavar="TEXT", help="of the commit")
    sub.add_argument(
        "--dry-run",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="only print what would be published, or leave it in FOLDER; no network",
    )
    described(sub)

    return parser, commands


# ------------------------------------------------------------------------------------------------------------- commands


def run_list(args: argparse.Namespace) -> None:
    names = list_models(args.patterns, task=args.task, family=args.family, pretrained=args.pretrained)
    if args.json:
        print_json(names)
    elif not names:
        note("No model matches." + "".join(did_you_mean(p, list_models()) for p in args.patterns))
    elif args.pretrained:
        print_weights([model_info(name) for name in names])
    else:
        print_models([model_info(name) for name in names])


def run_search(args: argparse.Namespace) -> None:
    found = search(**budget_of(args), sort=args.sort)
    if args.json:
        print_json([info.to_dict() for info in found])
    elif not found:
        note("No model fits.")
    else:
        print_models(found)


def run_info(args: argparse.Namespace) -> None:
    info = model_info(args.name)
    if args.json:
        print_json(info.to_dict())
    else:
        print_info(info)


def run_pareto(args: argparse.Namespace) -> None:
    if args.plot:
        from zoo.plots import check_picture

        check_picture(args.plot)
    y = accuracy_axis(args.task) if args.y is None else args.y
    front = pareto(args.x, y, **budget_of(args))
    if args.plot and front:
        from zoo.plots import plot_pareto

        rated = [m for m in search(**budget_of(args)) if None not in (getattr(m, args.x), getattr(m, y))]
        plot_pareto(rated, front, args.x, y, args.plot)
    if args.json:
        print_json([info.to_dict() for info in front])
    elif not front:
        note(nothing_rated(search(**budget_of(args)), {"--x": args.x, "--y": y}))
    else:
        print_models(front)
    if args.plot and front:
        note(f"Plot: {args.plot}")


def nothing_rated(fitting: Sequence[ModelInfo], axes: Mapping[str, str]) -> str:
    """Why there is no front: no models, or none with a figure of one of the axes."""
    known = [axis for axis in PARETO_AXES if any(getattr(info, axis) is not None for info in fitting)]
    missing = " or ".join(f"{option} {axis}" for option, axis in axes.items() if axis not in known)
    if not fitting:
        return "No model fits."
    if not missing:
        return (
            f"{count('model', fitting)} fit, but none has figures for both {' and '.join(map(' '.join, axes.items()))}."
        )
    return f"{count('model', fitting)} fit, but none has a figure for {missing}: choose of {', '.join(known)}."


def run_profile(args: argparse.Namespace) -> None:
    if args.plot:
        from zoo.plots import check_picture

        check_picture(args.plot)
    import zoo

    size = None if args.input_size is None else tuple(args.input_size)
    if args.stitches:
        from zoo.profiling import stitch_costs

        costs = stitch_costs(args.names[0], size)
        if args.json:
            print_json(costs.to_dict())
        else:
            print(costs.table())
            print_text(f"{count('network', costs.stitches)} at {shape_text(costs.input_size)}. {STITCH_COSTS}")
        if args.plot:
            costs.plot(args.plot)
            note(f"Plot: {args.plot}")
        return
    options = {
        "input_size": size,
        "batch_size": args.batch_size,
        "tokens": args.tokens,
        "checkpoint_path": args.checkpoint,
        "sparsity": args.sparsity,
        "sparsity_rule": args.sparsity_rule,
    }
    profiles = [zoo.profile(name, **options) for name in args.names]
    if args.json:
        print_json([profile.to_dict() for profile in profiles])
    else:
        print("\n\n".join(profile.table(depth=args.depth) for profile in profiles))
    if args.plot:
        profiles[0].plot(args.plot, depth=args.depth)
        note(f"Plot: {args.plot}")


def run_sparsity(args: argparse.Namespace) -> None:
    if args.plot:
        from zoo.plots import check_picture

        check_picture(args.plot)
    import zoo
    from zoo.loading import load_model

    size = None if args.input_size is None else tuple(args.input_size)
    model = load_model(args.source, args.checkpoint)
    loaded = getattr(model, "load_report", None)  # timm's own models have none
    if loaded is not None and loaded.choice:
        note(f"{loaded.choice}.")
    found = zoo.sparsity.report(model, size, masks=_masks_beside(args.checkpoint or args.source))
    if args.plot:
        found.plot(args.plot, args.layers)
    if args.json:
        print_json(found.to_dict())
    else:
        print(found.table())
    if args.plot:
        note(f"Plot: {args.plot}")


def _masks_beside(weights: str) -> dict[str, Any] | None:
    """The masks of the run that left these weights; None where there are none."""
    from pathlib import Path

    from zoo.files import checkpoint_folder
    from zoo.sparsity.masks import MASKS, load_masks

    path = Path(weights.removeprefix("local-dir:")).expanduser()
    folder = checkpoint_folder(path) if path.exists() else None
    return None if folder is None or not (folder / MASKS).is_file() else load_masks(folder / MASKS)


def run_benchmark(args: argparse.Namespace) -> None:
    import zoo
    from zoo.profiling import benchmark_table

    results = zoo.benchmark(
        args.names,
        batch_sizes=args.batch_size,
        input_size=None if args.input_size is None else tuple(args.input_size),
        tokens=args.tokens,
        new_tokens=args.new_tokens,
        quantize=args.quantize,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
        channels_last=args.channels_last,
        compile=args.compile,
        optimize=args.optimize,
        repeats=args.repeats,
    )
    if args.json:
        print_json([result.to_dict() for result in results])
    else:
        print(benchmark_table(results))


def run_predict(args: argparse.Namespace) -> None:
    from zoo.evaluation.prediction import predict_files

    found = predict_files(
        args.images,
        args.model,
        checkpoint_path=args.checkpoint,
        topk=args.topk,
        device=args.device,
        cam=args.cam,
        cam_dir=args.cam_dir,
        class_name=args.class_name,
        report_error=lambda error: note(f"error: {error}"),
    )
    answers: list[Any] = []
    for image, predictions, picture in found:
        if args.json:
            answers.append(
                {"image": image, "predictions": [dataclasses.asdict(prediction) for prediction in predictions]}
                | ({"cam": str(picture)} if picture else {})
            )
            continue
        print(image)
        for prediction in predictions:
            print(f"  {prediction.probability:7.2%}  {prediction.label} ({prediction.index})")
        if picture:
            note(f"Class-activation map: {picture}")
        answers.append(image)
    if args.json:
        print_json(answers)
    if len(answers) < len(args.images):
        raise ZooError(f"{len(args.images) - len(answers)} of {len(args.images)} images cannot be read.")


def run_token_labels(args: argparse.Namespace) -> None:
    from pathlib import Path

    from rich.console import Console

    from zoo.data import DataConfig, load_split
    from zoo.evaluation.token_labels import make_token_labels
    from zoo.loading import load_model

    if not (Path(args.data).expanduser() / args.split).is_dir():  # said before the teacher is fetched
        load_split(DataConfig(name="folder", path=args.data, train_split=args.split), training=True)
    made = make_token_labels(
        load_model(args.teacher, args.checkpoint),
        args.data,
        args.out,
        name=args.teacher if args.checkpoint is None else f"{args.teacher} with {args.checkpoint}",
        split=args.split,
        size=args.size,
        topk=args.topk,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        amp=args.amp,
        console=Console(stderr=True),
    )
    if made.skipped:
        note(f"Damaged, and without a map: {', '.join(made.skipped[:20])}{', ...' if len(made.skipped) > 20 else ''}.")
    kept = f", {made.kept:,} kept" if made.kept else ""
    print(f"{made.written:,} label maps of {shape_text(made.shape)} written{kept}: {made.folder}")


def run_generate(args: argparse.Namespace) -> None:
    from zoo.generation.command import run_generate

    run_generate(args)


def run_chat(args: argparse.Namespace) -> None:
    from zoo.generation.command import run_chat

    run_chat(args)


def run_tokenizer(args: argparse.Namespace) -> None:
    from zoo.generation.command import run_tokenizer

    run_tokenizer(args)


def run_convert(args: argparse.Namespace) -> None:
    check_writable(args.out)
    import zoo

    print(zoo.convert_checkpoint(args.source, args.out, name=args.model, overwrite=args.overwrite))
    note(f"Written: {args.out}")


def run_quantize(args: argparse.Namespace) -> None:
    from zoo.quantization import quantize_checkpoint

    done = quantize_checkpoint(
        args.source,
        args.out,
        to=args.to,
        group_size=args.group_size,
        text=args.text,
        tokenizer=args.tokenizer,
        checkpoint=args.checkpoint,
        max_tokens=args.max_tokens,
        overwrite=args.overwrite,
    )
    if done.perplexity is not None:
        before, after = done.perplexity["before"], done.perplexity["after"]
        print_facts(
            ("perplexity before", f"{before:.4f}"),
            (f"in {done.to}", f"{after:.4f} ({100 * (after / before - 1):+.2f}%)"),
            ("tokens", f"{done.perplexity['tokens']:,} of {done.perplexity['text']}"),
        )
    note(f"Written: {args.out}")


def run_export(args: argparse.Namespace) -> None:
    from zoo.exporting import command

    found = command.run(args, note)
    print_files(found.files)
    print(f"\nWritten: {args.folder}\n{found.check}")


def run_card(args: argparse.Namespace) -> None:
    from zoo.cards import families, render_card

    if args.output is not None:
        check_writable(args.output)
    is_path = os.path.exists(os.path.expanduser(args.source)) or os.sep in args.source
    if args.source not in families() and is_path:
        from zoo.publishing import model_card

        card = model_card(args.source, say=note, **description_of(args))
    else:
        card = render_card(args.source)
        for key, value in description_of(args).items():
            if value not in (None, False):
                flag = "--i-have-the-rights" if key == "has_rights" else f"--{key.replace('_', '-')}"
                raise ConfigError(f"{flag} goes with the card of a run or checkpoint: leave it out for a family's.")
    if args.output is None:
        print(card, end="")
        return
    with whole_file(args.output) as file:
        file.write(card.encode())
    note(f"Written: {args.output}")


def run_publish(args: argparse.Namespace) -> None:
    from zoo.publishing import check_repo_id, prepare, publish

    check_repo_id(args.repo_id)
    description = description_of(args)
    if args.dry_run is not None:
        with tempfile.TemporaryDirectory(prefix="zoo-publish-") as scratch:
            draft = prepare(
                args.source, args.dry_run or os.path.join(scratch, "repository"), repo_id=args.repo_id, **description
            )
            print_files(draft.files)
            print(f"\n{draft.card}", end="")
        for remark in draft.remarks:
            note(remark)
        kept = f" The files are in {draft.folder}." if args.dry_run else ""
        note(f"Nothing was published: this was a dry run.{kept}")
        return
    found = publish(
        args.source,
        args.repo_id,
        private=args.private,
        create_pr=args.pr,
        commit_message=args.message,
        say=note,
        **description,
    )
    print_files(found.files)
    if found.replaced:
        note(f"Replaced: {', '.join(found.replaced)}; the versions before are in the repository's history.")
    if found.kept:
        note(f"Other files stay: {', '.join(found.kept)}.")
    unchanged = "" if found.changed else ", which held all of it already"
    print(f"Published and read back: {found.url} (commit {found.commit[:12]}{unchanged})")


def description_of(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("model", "license", "license_file", "dataset", "note", "results", "half", "tokenizer")
    return {key: getattr(args, key) for key in keys} | {"has_rights": args.i_have_the_rights}


def budget_of(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in ("task", "family", "max_params", "max_macs", "min_top1", "license")}


# ------------------------------------------------------------------------------------------------------------- printing


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def note(text: str) -> None:
    """A word to the reader that is not part of the result."""
    print(text, file=sys.stderr)


def print_files(files: Mapping[str, int]) -> None:
    table = new_table("file", ">bytes")
    for name, size in files.items():
        table.add_row(name, f"{size:,}")
    print_table(table)


def print_models(infos: Sequence[ModelInfo]) -> None:
    if infos and all(info.language for info in infos):
        print_language_models(infos)
        return
    accuracies = accuracy_columns(infos)
    table = new_table("name", ">params", ">MACs", "input", *accuracies.values(), "weights", "licence")
    for info in infos:
        table.add_row(
            info.name,
            humanize(info.params),
            humanize(info.macs),
            "token" if info.language else shape_text(info.input_size),
            *(percent(getattr(info, accuracy)) for accuracy in accuracies),
            tags(info),
            licences(info),
        )
    print_table(table)
    tokens = " A language model's are those of one generated token." if any(info.language for info in infos) else ""
    said = " ".join({"top1": TOP1, "miou": MIOU}[accuracy] for accuracy in accuracies)
    print_text(f"{count('model', infos)}. {CONVENTION}{tokens} {said}")


def accuracy_columns(infos: Sequence[ModelInfo]) -> dict[str, str]:
    """The accuracies that models of these tasks have, and the columns that show them."""
    tasks = {info.task for info in infos}
    found = {} if tasks == {"segmentation"} else {"top1": ">top-1"}
    return found | ({"miou": ">mIoU"} if "segmentation" in tasks else {})


def print_language_models(infos: Sequence[ModelInfo]) -> None:
    table = new_table("name", ">params", ">MACs/token", ">KV/token", ">context", "weights", "licence")
    for info in infos:
        assert info.language is not None
        cells = (humanize(info.params), humanize(info.macs), kib(info.language.kv_bytes))
        table.add_row(info.name, *cells, f"{info.language.context_length:,}", tags(info), licences(info))
    print_table(table)
    print_text(f"{count('model', infos)}. {PER_TOKEN} Context: tokens at most.")


def tags(info: ModelInfo) -> str:
    """Those of its weights, or how many there are."""
    if len(info.weights) > 1:
        return f"{len(info.weights)} tags"
    return ", ".join(w.tag + (" (gated)" if w.gated else "") for w in info.weights)


def kib(size: float) -> str:
    return f"{size / 1024:.1f} KiB"


def licences(info: ModelInfo) -> str:
    """The code's licence, and the weights' where it is another."""
    others = sorted({weights.license for weights in info.weights} - {info.code_license})
    return info.code_license + (f" (weights: {', '.join(others)})" if others else "")


def print_weights(infos: Sequence[ModelInfo]) -> None:
    accuracies = accuracy_columns(infos)
    table = new_table("name", "input", "trained on", *accuracies.values(), "licence")
    for info in infos:
        (weights,) = info.weights
        size = "tokens" if info.language else shape_text(weights.input_size)
        name = f"{info.name}.{weights.tag}"
        claims = (percent(getattr(weights, accuracy)) for accuracy in accuracies)
        table.add_row(name, size, weights.dataset, *claims, weights.license)
    print_table(table)
    names = " and ".join(column.lstrip(">") for column in accuracies.values())
    print_text(f"{count('checkpoint', infos)}. {names}: as their authors claim for the data named, percent.")


def print_info(info: ModelInfo) -> None:
    frozen = info.params - info.trainable_params
    paper = info.paper
    print_facts(
        ("name", f"{info.name} ({info.task}, family {info.family})"),
        ("compact", info.compact),
        ("paper", f"{paper.title}. {paper.authors}. {paper.venue}. {paper.url}" if paper else ""),
        ("code", ", ".join(filter(None, (info.code_license, info.code_url)))),
        ("params", f"{info.params:,}" + (f", of which {frozen:,} are frozen" if frozen else "")),
        *(token_costs(info) if info.language else image_costs(info)),
        ("reported", reported(info)),
        ("note", info.note),
    )
    print(f"\n{count('checkpoint', info.weights)}" if info.weights else "\nno published weights")
    if info.weights:
        show = language_checkpoint if info.language else checkpoint
        print_facts(*((f"  {weights.tag}", show(weights)) for weights in info.weights))
    for text in dict.fromkeys(weights.note for weights in info.weights):
        if text:
            print_text(text)
    if any(weights.gated for weights in info.weights):
        print_text(
            "Gated: the Hub gives the files to those who have accepted the terms on the page named, with the token of "
            "`hf auth login`."
        )
    if info.language:
        print_text(f"{PER_TOKEN} `zoo profile {info.name} --tokens N` counts all of it at a length of N.")
        return
    print_text(
        f"{CONVENTION} fvcore total: what fvcore counts, norms included. Activations: output elements of the same "
        "operators as MACs. Crop: the share of the resized image's side that is kept."
    )


def image_costs(info: ModelInfo) -> list[tuple[str, str]]:
    return [
        ("MACs", f"{info.macs:,} at {shape_text(info.input_size)}"),
        ("fvcore total", f"{info.fvcore_total:,}"),
        ("activations", f"{info.activations:,}"),
    ]


def token_costs(info: ModelInfo) -> list[tuple[str, str]]:
    facts = info.language
    assert facts is not None
    attention = f"{facts.attention_macs:,} for each remembered token"
    if facts.prefill_attention_macs != facts.attention_macs:
        attention += f"; within a prompt {facts.prefill_attention_macs:,}"
    memory = f"{kib(facts.kv_bytes)} ({facts.kv_elements:,} numbers)"
    if facts.sliding_window is not None:
        memory += f", of which {facts.windowed_kv_elements:,} are forgotten {facts.sliding_window} tokens later"
    return [
        ("layers", f"{facts.stored_layers} stored, {facts.executed_layers} executed"),
        ("vocabulary", f"{facts.vocab_size:,}"),
        ("context", f"{facts.context_length:,} tokens"),
        ("MACs/token", f"{info.macs:,}; of a prompt's {facts.prefill_macs:,}, as its last alone needs the head"),
        ("  attention", attention),
        ("KV/token", memory),
    ]


def checkpoint(weights: Weights) -> str:
    data = weights.dataset + (f" after {weights.pretrained_on}" if weights.pretrained_on else "")
    claim = f", top-1 {weights.top1:.1f}% ({weights.accuracy_source})" if weights.top1 is not None else ""
    if weights.miou is not None:
        claim = f", mIoU {weights.miou:.1f}% ({weights.accuracy_source})"
    lines = (
        f"{data}, {weights.num_classes:,} classes{claim}",
        f"input {shape_text(weights.input_size)}, crop {weights.crop_pct:g}, {weights.interpolation}",
        f"licence {weights.license}",
        " ".join(filter(None, (weights.source, weights.filename))),
    )
    return "\n".join(lines)


def language_checkpoint(weights: Weights) -> str:
    gated = f"gated: terms at https://huggingface.co/{weights.hub_id}" if weights.gated else ""
    place = " ".join(filter(None, (weights.source, weights.filename)))
    return "\n".join(filter(None, (weights.dataset, f"licence {weights.license}", place, gated)))


def reported(info: ModelInfo) -> str:
    if info.reported is None:
        return ""
    r = info.reported
    macs = "" if r.macs is None else f", {humanize(r.macs)} MACs at {shape_text(r.input_size)}"
    return f"{humanize(r.params)} params{macs} ({r.source})"


def new_table(*columns: str) -> Table:
    """A table; `>` before a column's name aligns it right. Where the terminal is narrow, words fold, and no numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        name = column.lstrip(">")
        folds = name in ("weights", "licence", "trained on")
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(name, justify=justify, no_wrap=not folds, min_width=6 if folds else None, overflow="fold")
    return table


def print_facts(*rows: tuple[str, str]) -> None:
    """Labels and texts side by side, without those that say nothing."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in rows:
        if text:
            table.add_row(label, text)
    print_table(table)


def print_table(table: Table) -> None:
    from rich.cells import cell_len
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
    least = sum((column.min_width or 1) + 2 for column in table.columns)
    # no terminal, no width to keep to: whatever reads the output gets every name whole and one row a line
    if not is_terminal() or least > console.width:
        console.width = 10_000
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # None where it was closed


def print_text(text: str) -> None:
    columns = shutil.get_terminal_size().columns if is_terminal() else 120
    print("\n" + textwrap.fill(text, min(columns, 120)))


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def count(what: str, items: Sequence[Any]) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


# ----------------------------------------------------------------------------------------------------------------- main


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command. Raises SystemExit with status 2, and the nearest right name, for wrong usage."""
    parser, commands = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        hint = did_you_mean(arguments[0], commands) or f" There are: {', '.join(commands)}."
        parser.error(f"there is no command {arguments[0]!r}.{hint}")
    args, unknown = parser.parse_known_args(arguments)
    command = commands[args.command]
    if unknown:
        command.reject(unknown)
    if args.command == "profile" and args.plot and len(args.names) > 1:
        command.error("--plot draws one model: give a single NAME.")
    if args.command == "profile" and args.checkpoint and len(args.names) > 1:
        command.error("--checkpoint holds one model: give a single NAME.")
    if args.command == "profile" and args.sparsity_rule is not None and args.sparsity is None:
        command.error("--sparsity-rule says how zeros are spread over the layers: say with --sparsity how many.")
    if args.command == "profile" and args.stitches:
        others = (args.checkpoint, args.sparsity, args.tokens)
        if len(args.names) > 1 or args.batch_size != 1 or any(other is not None for other in others):
            command.error("--stitches takes a single NAME, and goes with --input-size, --plot and --json alone.")
    if args.command == "sparsity" and args.layers and not args.plot:
        command.error("--layers are those to draw: say with --plot where.")
    if args.command == "predict":
        if args.cam and (args.cam_dir or len(args.images) > 1):
            command.error("--cam draws one image: give a single IMAGE, or a folder with --cam-dir alone.")
        if args.class_name and not (args.cam or args.cam_dir):
            command.error("--class is the class of an activation map: say with --cam or --cam-dir where to draw it.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `zoo`; returns the exit status: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a letter in a paper's title must not end the command
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")  # libraries below us, not the user's
    try:
        args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except ZooError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return fail(describe_os_error(error))
    except KeyboardInterrupt:
        note("Interrupted.")
        return 130
    return 0


def fail(message: str) -> int:
    note(f"error: {message}")
    return 1
