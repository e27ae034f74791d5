"""What `zoo generate`, `zoo chat` and `zoo tokenizer` do."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

import zoo
from zoo.data.text import iterate_texts
from zoo.data.tokenizers import VOCABULARIES, Tokenizer, as_text, check_fits, create_tokenizer, train_tokenizer
from zoo.devices import choose_device
from zoo.errors import CheckpointError, ConfigError, ZooError
from zoo.files import make_folder
from zoo.generation.prompts import Generation, prepare
from zoo.generation.sampling import Sampling
from zoo.loading import load_model, model_task

__all__ = ["run_chat", "run_generate", "run_tokenizer"]

MAX_THREADS = 1024  # a hundred times as many end the process


def run_generate(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    prompt = as_text(_read_input()) if args.prompt == "-" else args.prompt
    model, tokenizer = _load(args)
    run = _prepare(args, model, tokenizer, tokenizer.encode(prompt, bos=tokenizer.adds_bos), sampling, args.stop)
    if args.json:
        for _ in run:
            pass
        speed = {"prompt_seconds": run.prompt_seconds, "tokens_per_second": run.tokens_per_second}
        counts = {"prompt_tokens": run.prompt_tokens, "new_tokens": run.new_tokens, "ended": run.ended[0]}
        answer = {"model": args.model, "prompt": prompt, "text": run.texts[0], "tokens": run.tokens[0]}
        print(json.dumps({**answer, **counts, **speed, "engine": args.engine}, indent=2))
        return
    _say(run)
    print()
    _note(_speed(run))


def run_chat(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    model, tokenizer = _load(args, for_chat=True)
    before = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(before)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _note("/clear begins anew, /exit ends, Ctrl-C cuts an answer short.")
    for said in _turns(is_terminal):
        if said.strip() == "/exit":
            return
        if said.strip() == "/clear":
            messages = list(before)
            continue
        if not said.strip():
            continue
        turn = [*messages, {"role": "user", "content": as_text(said)}]
        try:
            run = _prepare(args, model, tokenizer, tokenizer.apply_chat(turn), sampling, ())
        except ZooError as error:
            if not is_terminal:
                raise
            _note(f"error: {error}")
            continue
        try:
            _say(run)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
        print()
        if is_terminal:
            _note(_speed(run))
        messages = [*turn, {"role": "assistant", "content": run.texts[0]}]


def _turns(is_terminal: bool) -> Iterator[str]:
    """What the user says, turn by turn, until there is no more; Ctrl-C ends it, too."""
    while True:
        try:
            said = input("> ") if is_terminal else sys.stdin.readline()
        except UnicodeDecodeError as error:
            as_text(error.object)
            return
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not said and not is_terminal:
            return
        yield said.removesuffix("\n")


def run_tokenizer(args: argparse.Namespace) -> None:
    if args.action == "train":
        _train_tokenizer(args)
        return
    tokenizer = create_tokenizer(args.tokenizer)
    ids = tokenizer.encode(as_text(_read_input()) if args.text == "-" else args.text)
    if args.json:
        print(json.dumps([{"id": number, "token": tokenizer.token(number)} for number in ids], indent=2))
    else:
        print(*ids)


def _train_tokenizer(args: argparse.Namespace) -> None:
    there = [name for name in VOCABULARIES if os.path.exists(os.path.join(args.output, name))]
    if there and not args.overwrite:
        raise ConfigError(f"{args.output!r} holds a tokenizer ({there[0]}): give another folder, or pass --overwrite.")
    folder = make_folder(args.output)
    texts = iterate_texts(args.files, args.column)
    tokenizer = train_tokenizer(texts, args.vocab_size, progress=sys.stderr.isatty(), name=str(folder))
    tokenizer.save(folder)
    print(f"{folder}: {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < args.vocab_size:
        _note(f"The text has no more to join than that: fewer tokens than the {args.vocab_size:,} asked for.")


# --------------------------------------------------------------------------------------------------- what they share


def _sampling(args: argparse.Namespace) -> Sampling:
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{key: getattr(args, key) for key in keys})


def _load(args: argparse.Namespace, for_chat: bool = False) -> tuple[Any, Tokenizer]:
    """The model, as the options want it, and its tokenizer."""
    args.engine = args.engine or ("torch" if args.compile else "native")
    if args.engine == "llama.cpp" and (args.quantize or args.compile):
        raise ConfigError("llama.cpp knows neither --quantize nor --compile: leave them out.")
    if args.engine == "torch" and args.quantize:
        raise ConfigError("Weights in 8 and 4 bits are of the native engine: leave out --engine torch.")
    if args.compile and (args.quantize or args.engine == "native"):
        raise ConfigError("Steps of --engine native and of --quantize are compiled already: leave out --compile.")
    if args.threads is not None:
        if not 1 <= args.threads <= MAX_THREADS:
            raise ConfigError(f"--threads must be from 1 to {MAX_THREADS}, not {args.threads}.")
        torch.set_num_threads(args.threads)
    _check_language(args.model)
    if args.random:
        if args.tokenizer is None:
            raise ConfigError("Random weights have no tokenizer of their own: say which, such as --tokenizer bytes.")
        if args.checkpoint is not None:
            raise ConfigError("Weights are random or come from a checkpoint: give --random or --checkpoint.")
        tokenizer = create_tokenizer(args.tokenizer)
        model: Any = zoo.create_model(args.model, pretrained=False, vocab_size=tokenizer.vocab_size)
        _note("The weights are random: what follows means nothing.")
    else:
        model = load_model(args.model, args.checkpoint)
        tokenizer = _tokenizer(args)
    check_fits(tokenizer, model)
    if for_chat:
        tokenizer.check_chat()
    model.to(device=choose_device(model, args.device), dtype=getattr(torch, args.dtype))
    model.eval()
    if args.quantize:
        model = zoo.quantize(model, args.quantize)
    elif args.engine == "native":
        model = zoo.optimize_for_inference(model, inplace=True)
    return model, tokenizer


def _check_language(name: str) -> None:
    """Say that a model is none of language before its weights are fetched."""
    task = "language"
    with contextlib.suppress(ZooError):  # what cannot be found is said when it is loaded
        task = model_task(name)
    if task != "language":
        raise ConfigError(f"{name} is made for {task}, not for language.")


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer is not None:
        return create_tokenizer(args.tokenizer)
    if args.checkpoint is not None:
        try:
            return create_tokenizer(args.checkpoint)
        except CheckpointError:  # a bare file of weights
            pass
    return create_tokenizer(args.model)


def _prepare(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling, stop: Any
) -> Generation:
    return prepare(
        model,
        [prompt],
        tokenizer=tokenizer,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=stop or (),
        engine="llama.cpp" if args.engine == "llama.cpp" else "torch",
        compile=args.compile,
    )


def _say(run: Generation) -> None:
    for piece in run:
        if piece.text:
            print(piece.text, end="", flush=True)


def _speed(run: Generation) -> str:
    speed = run.tokens_per_second
    return f"{run.prompt_tokens} tokens of prompt in {run.prompt_seconds:.2f} s, {run.new_tokens} new ones" + (
        f" at {speed:.1f} tokens/s." if speed else "."
    )


def _read_input() -> bytes:
    """Standard input, without the newline at its end that shells put there."""
    return sys.stdin.buffer.read().removesuffix(b"\n")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
