"""What `zoo export` does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo.data.tokenizers import create_tokenizer
from zoo.exporting.checked import Export, export
from zoo.files import check_folder
from zoo.hub import tokenizer_beside
from zoo.loading import check_is_whole, load_model

__all__ = ["run"]


def run(args: argparse.Namespace, say: Any) -> Export:
    """Export what the arguments name; `say` is called with a line when there is something to know."""
    check_folder(Path(args.folder).expanduser().absolute(), args.overwrite)
    model = load_model(args.source, args.checkpoint)
    check_is_whole(model)
    tokenizer = _tokenizer(args) if hasattr(model, "make_cache") else args.tokenizer
    if hasattr(model, "make_cache") and tokenizer is None and args.tokenizer != "none":
        say("There is no tokenizer beside the weights: what is written takes and gives token numbers alone.")
    return export(
        model,
        args.folder,
        to=args.to,
        tokenizer=tokenizer,
        dtype=args.dtype,
        input_size=None if args.input_size is None else tuple(args.input_size),
        overwrite=args.overwrite,
    )


def _tokenizer(args: argparse.Namespace) -> Any:
    if args.tokenizer is not None:
        return None if args.tokenizer == "none" else create_tokenizer(args.tokenizer)
    place = args.checkpoint or args.source
    if Path(place.removeprefix("local-dir:")).expanduser().exists():
        return tokenizer_beside(place)
    return create_tokenizer(place)
