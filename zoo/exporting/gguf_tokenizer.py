"""A tokenizer inside a GGUF file: llama.cpp's own code then cuts text into the same tokens, or this is an error.

Two kinds of it are meant here: `gpt2`, byte-level byte-pair encoding, which cuts text by one of a list of patterns that
have names; and `llama`, SentencePiece's byte-pair encoding, which joins the pair whose piece has the highest score.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, MissingDependencyError

__all__ = ["add_tokenizer"]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# what text is cut by before pairs are joined, and whether a word that is a token is taken whole; llama.cpp's name
PATTERNS = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((LLAMA3.replace("{1,3}", ""),), False): "qwen2",
    ((GPT4O,), False): "gpt-4o",
}


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write the tokenizer into the file's metadata, filled up to the model's vocabulary.

    Raises ConfigError for one that llama.cpp does not compute.
    """
    with tempfile.TemporaryDirectory(prefix="zoo-gguf-") as scratch:
        tokenizer.save(scratch)
        names = {path.name: path for path in Path(scratch).iterdir()}
        if "tokenizer.model" in names:
            _add_sentencepiece(writer, names, tokenizer, vocab_size)
        elif "tokenizer.json" in names:
            _add_json(writer, json.loads(names["tokenizer.json"].read_bytes()), tokenizer, vocab_size)
        else:
            raise _unknown(tokenizer, "it has neither a tokenizer.json nor a tokenizer.model")
    for kind in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{kind}_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    others = [number for number in tokenizer.eos_ids if number != tokenizer.eos_id]
    for kind, number in zip(("eot", "eom"), others, strict=False):  # what else ends a turn
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _unknown(tokenizer: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"llama.cpp would cut text otherwise than the tokenizer {tokenizer.name}: {reason}. Without a tokenizer the "
        "file is written for token numbers alone."
    )


def _add_tokens(
    writer: Any, tokens: dict[int, tuple[str | bytes, Any]], vocab_size: int, scores: dict[int, float] | None = None
) -> None:
    """The list of tokens, with unused ones where numbers are free."""
    from gguf import TokenType

    free = [(f"[PAD{i}]", TokenType.UNUSED) for i in range(vocab_size)]
    listed = [tokens.get(i, free[i]) for i in range(vocab_size)]
    writer.add_token_list([text for text, _ in listed])
    if scores is not None:
        writer.add_token_scores([scores.get(i, -1e4) for i in range(vocab_size)])
    writer.add_token_types([int(kind) for _, kind in listed])


# ------------------------------------------------------------------------------------------------------ tokenizer.json


def _add_json(writer: Any, spec: dict[str, Any], tokenizer: Any, vocab_size: int) -> None:
    from gguf import TokenType

    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise _unknown(tokenizer, f"it is a {model['type']} model, and not byte-pair encoding")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens: dict[int, tuple[str | bytes, Any]] = {i: (text, TokenType.NORMAL) for text, i in model["vocab"].items()}
    for added in spec.get("added_tokens") or ():
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    if model.get("byte_fallback"):
        prefix = _sentencepiece_prefix(spec, tokenizer)
        for i, (text, kind) in tokens.items():
            if kind == TokenType.NORMAL and len(str(text)) == 6 and str(text).startswith("<0x"):
                tokens[i] = (text, TokenType.BYTE)
        unknown = model["vocab"].get(model.get("unk_token"))
        if unknown is not None:
            tokens[unknown] = (tokens[unknown][0], TokenType.UNKNOWN)
            writer.add_unk_token_id(unknown)
        scores: dict[int, float] = {}
        for rank, (left, right) in enumerate(merges):
            scores.setdefault(model["vocab"][left + right], -float(rank))
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        _add_tokens(writer, tokens, vocab_size, scores)
        writer.add_add_space_prefix(prefix)
        return
    if spec.get("normalizer") is not None:
        raise _unknown(tokenizer, f"it normalises text first ({spec['normalizer'].get('type')})")
    parts, ignore_merges = _cuts(spec.get("pre_tokenizer"), tokenizer), bool(model.get("ignore_merges"))
    name = PATTERNS.get((parts, ignore_merges)) if merges else "gpt-2"  # where nothing is joined, nothing need be cut
    if name is None:
        raise _unknown(tokenizer, "it cuts words by a pattern that llama.cpp has no name for")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    _add_tokens(writer, tokens, vocab_size)
    # a list of merges there must be: where there are none, one that no text can need
    writer.add_token_merges([" ".join(merge) for merge in merges] or ["[PAD] [PAD]"])


def _cuts(pre_tokenizer: dict[str, Any] | None, tokenizer: Any) -> tuple[str, ...]:
    """The patterns that cut text, in order."""
    steps = pre_tokenizer or {}
    parts: list[str] = []
    for step in steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            parts += ["gpt2"] if step.get("use_regex", True) else []
            continue
        if kind == "Digits" and step.get("individual_digits"):
            parts.append("digits")
        elif kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated" and not step["invert"]:
            parts.append({r"\p{N}": "digits", r"\d": "digits"}.get(step["pattern"]["Regex"], step["pattern"]["Regex"]))
        else:
            raise _unknown(tokenizer, f"its step {kind or 'none'!r} before byte-pair encoding is none of llama.cpp's")
    return tuple(parts)


def _sentencepiece_prefix(spec: dict[str, Any], tokenizer: Any) -> bool:
    """Whether a space goes before a text, in a tokenizer.json that was made of a SentencePiece model."""
    normalizer, cut = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer] if normalizer else []
    if cut.get("type") == "Metaspace" and not cut.get("split", True) and not steps:
        return cut.get("prepend_scheme", "always") != "never"
    kinds = [step.get("type") for step in steps]
    if not cut and kinds in (["Prepend", "Replace"], ["Replace"]):
        return kinds[0] == "Prepend"
    raise _unknown(tokenizer, "it prepares text otherwise than SentencePiece models do")


# ------------------------------------------------------------------------------------------------------- SentencePiece


def _add_sentencepiece(writer: Any, files: dict[str, Path], tokenizer: Any, vocab_size: int) -> None:
    from gguf import TokenType

    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise MissingDependencyError(
            'SentencePiece models need sentencepiece and protobuf: pip install "backbone-zoo[export,text]".'
        ) from error
    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(files["tokenizer.model"].read_bytes())
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise _unknown(tokenizer, "it is a unigram model, and not byte-pair encoding")
    if normalizer.name != "identity" or normalizer.remove_extra_whitespaces:
        raise _unknown(tokenizer, f"it normalises text first ({normalizer.name or 'with a table of its own'})")
    kinds = {
        1: TokenType.NORMAL,
        2: TokenType.UNKNOWN,
        3: TokenType.CONTROL,
        4: TokenType.USER_DEFINED,
        5: TokenType.UNUSED,
        6: TokenType.BYTE,
    }
    tokens: dict[int, tuple[str | bytes, Any]] = {i: (p.piece, kinds[p.type]) for i, p in enumerate(proto.pieces)}
    scores = {i: piece.score for i, piece in enumerate(proto.pieces)}
    added: dict[int, tuple[str, bool]] = {}
    if "added_tokens.json" in files:
        for text, number in json.loads(files["added_tokens.json"].read_bytes()).items():
            added[int(number)] = (text, False)
    if "tokenizer_config.json" in files:
        decoder = json.loads(files["tokenizer_config.json"].read_bytes()).get("added_tokens_decoder") or {}
        for number, token in decoder.items():
            added[int(number)] = (token["content"], bool(token.get("special")))
    for i, (text, special) in added.items():
        if i not in tokens or tokens[i][1] == TokenType.UNUSED:
            tokens[i] = (text, TokenType.CONTROL if special else TokenType.USER_DEFINED)
            scores[i] = -1e3
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    _add_tokens(writer, tokens, vocab_size, scores)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_add_space_prefix(normalizer.add_dummy_prefix)
