"""Tokenizers: from text to the numbers of its tokens, and back.

Three kinds: bytes, for machines without any file; `tokenizer.json` of the library `tokenizers`; and `tokenizer.model`
of SentencePiece. `create_tokenizer` finds out which.
"""

from __future__ import annotations

import abc
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.data.chat import Messages, render
from zoo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DownloadError,
    MissingDependencyError,
    UnknownModelError,
    did_you_mean,
)
from zoo.files import checkpoint_places, make_folder, whole_file

__all__ = [
    "ByteTokenizer",
    "DecodeStream",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "as_text",
    "check_fits",
    "create_tokenizer",
    "train_tokenizer",
]

VOCABULARIES = ("tokenizer.json", "tokenizer.model")  # in a repository or folder, the first that is there
CONFIG, SPECIAL, GENERATION, TEMPLATE, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
)
BESIDE = (CONFIG, SPECIAL, GENERATION, TEMPLATE, ADDED)  # what may lie beside them
END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\ufffd"

Files = Mapping[str, bytes]


class Tokenizer(abc.ABC):
    """What every tokenizer can do.

    Attributes:
        name: what it was made from.
        vocab_size: how many tokens there are, special ones among them.
        bos_id, eos_id, pad_id: the tokens that begin, end and fill up a text, or None.
        eos_ids: all that end a generation: `eos_id`, and what generation_config.json names besides.
        adds_bos: whether the models of this tokenizer expect `bos_id` before each text.
        chat_template: the Jinja template of its models' conversations, or None.
    """

    name: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    adds_bos: bool = False
    chat_template: str | None = None

    @abc.abstractmethod
    def _encode(self, text: str, special: bool) -> list[int]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int], skip_special: bool) -> str: ...

    @abc.abstractmethod
    def _files(self) -> Files: ...

    def encode(self, text: str | bytes, *, bos: bool = False, eos: bool = False, special: bool = True) -> list[int]:
        """The tokens of a text, `bytes` being UTF-8, with `bos_id` before and `eos_id` behind it where asked for.

        Where the text holds the name of a special token, that token stands for it, as in transformers; with
        `special=False` it is text as any other. Raises DataError for what is not text, ConfigError for a token that
        the tokenizer does not have.
        """
        ids = self._encode(as_text(text), special)
        if bos:
            ids = [self._need("bos"), *ids]
        return [*ids, self._need("eos")] if eos else ids

    def encode_batch(
        self, texts: Sequence[str | bytes], *, bos: bool = False, eos: bool = False, special: bool = True
    ) -> list[list[int]]:
        """`encode` for each of `texts`, faster than one by one where the tokenizer can."""
        return [self.encode(text, bos=bos, eos=eos, special=special) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of tokens (numbers, or a tensor of one axis), without special ones unless asked for.

        Bytes that are not UTF-8 become U+FFFD. A number that the tokenizer does not have stands for nothing. Raises
        ConfigError for a negative one.
        """
        ids = _numbers(ids)
        return self._decode([i for i in ids if i < self.vocab_size], skip_special)

    def apply_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, **template_options: Any
    ) -> list[int]:
        """The tokens of a conversation, written as the published template has it.

        `messages` are mappings with "role" ("system", "user", "assistant") and "content"; `template_options` is what
        else the template asks for (`tools`, `enable_thinking`). With `add_generation_prompt` the assistant is about to
        speak. Raises ConfigError where there is no template, DataError for messages that it does not take.
        """
        return self.encode(self.chat_text(messages, add_generation_prompt=add_generation_prompt, **template_options))

    def chat_text(self, messages: Messages, *, add_generation_prompt: bool = True, **template_options: Any) -> str:
        """The text that `apply_chat` gives the tokens of."""
        template = self.check_chat()
        names = {
            f"{kind}_token": self.token(number)
            for kind, number in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id))
            if number is not None
        }
        options = {"tools": None, "documents": None, **names, **template_options}
        return render(template, messages, add_generation_prompt=add_generation_prompt, **options)

    def check_chat(self) -> str:
        """The chat template. Raises ConfigError where there is none."""
        if self.chat_template is None:
            raise ConfigError(
                f"The tokenizer {self.name} has no chat template: its models continue text and were not trained on "
                "conversations. Give the text itself, or take an instruction model's tokenizer."
            )
        return self.chat_template

    @abc.abstractmethod
    def token(self, number: int) -> str:
        """The name of a token, as its vocabulary has it."""

    def stream(self, context: Sequence[int] = ()) -> DecodeStream:
        """A decoder for tokens that come one by one, after those of `context`."""
        return DecodeStream(self, context)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the tokenizer's files, which `create_tokenizer(folder)` and transformers' AutoTokenizer read.

        Raises ConfigError for a folder that cannot be written to.
        """
        folder = make_folder(folder)
        written = []
        for name, content in self._files().items():
            with whole_file(folder / name) as file:
                file.write(content)
            written.append(folder / name)
        return written

    def _need(self, kind: str) -> int:
        number: int | None = getattr(self, f"{kind}_id")
        if number is None:
            what = {"bos": "begins", "eos": "ends"}[kind]
            raise ConfigError(f"The tokenizer {self.name} has no token that {what} a text: leave out {kind}=True.")
        return number

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size})"


def as_text(text: str | bytes) -> str:
    """A text, `bytes` being UTF-8. Raises DataError for what is not."""
    if isinstance(text, bytes | bytearray):
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"The text is not UTF-8: byte {error.start} is 0x{text[error.start]:02x}. Convert it first."
            ) from None
    if not isinstance(text, str):
        raise DataError(f"A text is a str, or bytes in UTF-8, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text cannot be written as UTF-8: character {error.start} is half of a surrogate pair "
            f"(U+{ord(text[error.start]):04X}). Was it read with another encoding than it has?"
        ) from None
    return text


def _numbers(ids: Iterable[int]) -> list[int]:
    try:
        values = [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise ConfigError(f"The tokens of one text are whole numbers in a row, not {ids!r}.") from None
    if values and min(values) < 0:
        raise ConfigError(f"Tokens are numbered from 0 up: there is no token {min(values)}.")
    return values


class DecodeStream:
    """Turns tokens into text as they come, without ever splitting a character.

    The pieces, joined, are what the new tokens add to the text of `context`.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # the last tokens are enough to see whether a word begins; they must not begin within a character
        start = max(0, len(context) - 8)
        while start and tokenizer.decode(context[start:]).startswith(REPLACEMENT):
            start -= 1
        self._ids = _numbers(context[start:])
        self._told = tokenizer.decode(self._ids)
        self._mark = len(self._ids)  # where the tokens begin that came after the last whole character

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens make certain."""
        self._ids += _numbers(ids)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(REPLACEMENT)  # at the end it may be the beginning of a character,
        if len(text) - len(whole) > 64:  # but not so many of them
            whole = text
        piece = whole[len(self._told) :]
        self._told += piece
        if piece and len(whole) == len(text):
            self._ids, self._mark = self._ids[self._mark :], len(self._ids) - self._mark
            self._told = self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """What is left, when no more tokens come."""
        piece = self._tokenizer.decode(self._ids)[len(self._told) :]
        self._told += piece
        return piece


# ---------------------------------------------------------------------------------------------------------------- bytes


class ByteTokenizer(Tokenizer):
    """Tokens 0 to 255 are the bytes of UTF-8, and 256 is <|endoftext|>, which begins and ends texts.

    The name of that token within a text is text. What is saved opens in transformers, and gives the same tokens there.
    """

    def __init__(self) -> None:
        self.name, self.vocab_size = BYTES, 257
        self.bos_id = self.eos_id = 256
        self.eos_ids = (256,)
        self.adds_bos = True

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(text.encode())

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        if skip_special:
            return self.decode_bytes(ids).decode(errors="replace")
        parts = "".join(map(chr, ids)).split(chr(256))
        return END_OF_TEXT.join(part.encode("latin-1").decode(errors="replace") for part in parts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of tokens, UTF-8 or not, without special ones."""
        return bytes(i for i in _numbers(ids) if i < 256)

    def token(self, number: int) -> str:
        return END_OF_TEXT if number == 256 else _BYTE_NAMES[number]

    def _files(self) -> Files:
        vocabulary = {name: number for number, name in enumerate(_BYTE_NAMES)}
        special = {"id": 256, "content": END_OF_TEXT, "normalized": False, "special": True}
        special |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        whole: dict[str, Any] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": _begins_with(END_OF_TEXT, 256),
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False, "fuse_unk": False},
        }
        config = _config_of(END_OF_TEXT) | {"split_special_tokens": True, MARK: BYTES}
        return {"tokenizer.json": _json(whole), CONFIG: _json(config)}


def _byte_names() -> list[str]:
    """The characters that byte-level vocabularies (GPT-2's) write bytes as: printable ones themselves, others above."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTES, MARK = "bytes", "zoo_tokenizer"
_BYTE_NAMES = _byte_names()


def _begins_with(token: str, number: int) -> dict[str, Any]:
    """The post-processor of tokenizer.json that puts a token before each text."""

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": name, "type_id": kind}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _config_of(end: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ----------------------------------------------------------------------------------------------------- files of others


class _FromFiles(Tokenizer):
    """What the two kinds that are read from files share: special tokens, chat template, and the files themselves."""

    def __init__(self, name: str, files: Files) -> None:
        self.name = name
        self._kept = {key: files[key] for key in files if files[key]}
        self._config = self._read(CONFIG)

    def _files(self) -> Files:
        return self._kept

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self._kept:
            return {}
        try:
            read = json.loads(self._kept[name])
        except ValueError as error:
            raise CheckpointError(f"{name} of the tokenizer {self.name} is not valid JSON: {error}.") from error
        if not isinstance(read, dict):
            raise CheckpointError(f"{name} of the tokenizer {self.name} holds no JSON object.")
        return read

    @abc.abstractmethod
    def _find(self, token: str) -> int | None:
        """The number of the token of that name."""

    def _set_special(self, **otherwise: int | None) -> None:
        """Set bos, eos, pad and the chat template from what lies beside the vocabulary; `otherwise`, from that."""
        named, generation = self._read(SPECIAL), self._read(GENERATION)
        for kind in ("bos", "eos", "pad"):
            token = _content(self._config.get(f"{kind}_token") or named.get(f"{kind}_token"))
            number = None if token is None else self._find(token)
            if token is not None and number is None and kind != "pad":  # transformers makes up a missing one of these
                raise CheckpointError(f"The tokenizer {self.name} has no token {token!r}, which its files name.")
            if number is None:
                stated = generation.get(f"{kind}_token_id")
                number = next((i for i in _listed(stated) if i < self.vocab_size), None)
            setattr(self, f"{kind}_id", otherwise.get(kind) if number is None else number)
        ends = [*([] if self.eos_id is None else [self.eos_id]), *_listed(generation.get("eos_token_id"))]
        self.eos_ids = tuple(dict.fromkeys(ends))
        self.chat_template = self._template()

    def _template(self) -> str | None:
        if TEMPLATE in self._kept:
            return as_text(self._kept[TEMPLATE])
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            by_name = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = by_name.get("default")
        return template if isinstance(template, str) else None


def _content(token: Any) -> str | None:
    """The name of a special token, which files hold bare or as one of several fields."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) and token else None


def _listed(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]


class JsonTokenizer(_FromFiles):
    """A `tokenizer.json` of the library `tokenizers`, with the files beside it."""

    def __init__(self, name: str, files: Files) -> None:
        super().__init__(name, files)
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependencyError(
                'A tokenizer.json needs the library tokenizers: pip install "backbone-zoo[text]".'
            ) from error
        try:
            self._library = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(
                f"tokenizer.json of the tokenizer {name} is damaged, or not of the library tokenizers: {error}."
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        self._set_special()
        stated = self._config.get("add_bos_token")
        if isinstance(stated, bool):
            self.adds_bos = stated and self.bos_id is not None
        else:
            self.adds_bos = self.bos_id is not None and self._library.encode("a").ids[:1] == [self.bos_id]

    def _find(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def token(self, number: int) -> str:
        return self._library.id_to_token(number) or ""

    def _encode(self, text: str, special: bool) -> list[int]:
        self._library.encode_special_tokens = not special
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(
        self, texts: Sequence[str | bytes], *, bos: bool = False, eos: bool = False, special: bool = True
    ) -> list[list[int]]:
        before, behind = ([self._need("bos")] if bos else []), ([self._need("eos")] if eos else [])
        self._library.encode_special_tokens = not special
        found = self._library.encode_batch_fast([as_text(text) for text in texts], add_special_tokens=False)
        return [[*before, *one.ids, *behind] for one in found]

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        return self._library.decode(ids, skip_special_tokens=skip_special)


class SentencePieceTokenizer(_FromFiles):
    """A `tokenizer.model` of SentencePiece, with the files beside it, read as those of Llama are.

    Each part of a text between special tokens is a text of its own and begins with a space, as in transformers with
    `legacy=True`.
    """

    def __init__(self, name: str, files: Files) -> None:
        super().__init__(name, files)
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingDependencyError(
                'A tokenizer.model needs sentencepiece: pip install "backbone-zoo[text]".'
            ) from error
        self._library = sentencepiece.SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(files["tokenizer.model"])
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"tokenizer.model of the tokenizer {name} is damaged, or not of SentencePiece."
            ) from error
        self._size = self._library.get_piece_size()
        self._added = self._added_tokens()
        self._names = {number: token for token, number in self._added.items()}
        control = (i for i in range(self._size) if self._library.IsControl(i))
        self._special = {self._library.id_to_piece(i): i for i in control} | self._added
        self._split = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))
        self.vocab_size = 1 + max((self._size - 1, *self._added.values()))
        own = {kind: getattr(self._library, f"{kind}_id")() for kind in ("bos", "eos", "pad")}
        self._set_special(**{kind: number if number >= 0 else None for kind, number in own.items()})
        self.adds_bos = self._config.get("add_bos_token") is not False and self.bos_id is not None

    def _added_tokens(self) -> dict[str, int]:
        """Tokens that the model file does not know."""
        found = {token: number for token, number in self._read(ADDED).items() if type(number) is int}
        listed = self._config.get("added_tokens_decoder")
        for number, token in (listed if isinstance(listed, dict) else {}).items():
            content = _content(token)
            if content is not None and number.isdecimal():
                found[content] = int(number)
        return {token: number for token, number in found.items() if number >= self._size}

    def _find(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        number = self._library.piece_to_id(token)
        return number if self._library.id_to_piece(number) == token else None

    def token(self, number: int) -> str:
        if number in self._names:
            return self._names[number]
        return self._library.id_to_piece(number) if number < self._size else ""

    def _encode(self, text: str, special: bool) -> list[int]:
        if not special or not self._special:
            return self._library.encode(text)
        ids: list[int] = []
        end = 0
        for match in self._split.finditer(text):
            ids += [*self._library.encode(text[end : match.start()]), self._special[match[0]]]
            end = match.end()
        return ids + self._library.encode(text[end:])

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        special = set(self._special.values())
        known = [i for i in ids if i < self._size or i in special]
        if skip_special:
            return self._library.decode([i for i in known if i not in special])
        text = ""
        part: list[int] = []
        for number in known:
            if number in special:
                text, part = text + self._library.decode(part) + self.token(number), []
            else:
                part.append(number)
        return text + self._library.decode(part)


# -------------------------------------------------------------------------------------------------- finding a tokenizer


def create_tokenizer(
    name_or_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    refresh: bool = False,
) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name_or_path: `"bytes"`; a folder or file (`tokenizer.json`, `tokenizer.model`), with or without `local-dir:`
            before it; the folder of a run (its best checkpoint's, else its last's); `"hf-hub:owner/name@revision"`; or
            the name of a model, for that of its published weights.
        cache_dir: where downloads are kept (the Hub's cache by default).
        token: for private and gated repositories (the one of `hf auth login` by default).
        refresh: ask the Hub whether what is cached is current.

    Raises UnknownModelError for a name that is none of these, CheckpointError for files that are missing or damaged,
    DownloadError, and MissingDependencyError where the library that reads the file is not installed.
    """
    from zoo.registry import HUB_PREFIXES
    from zoo.weights import split_hub_id

    if not isinstance(name_or_path, str | os.PathLike):
        raise ConfigError(f"A tokenizer is named by a str or a path, not by {type(name_or_path).__name__}.")
    text = os.fspath(name_or_path)
    where: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "refresh": refresh}
    if text == BYTES:
        return ByteTokenizer()
    if text.startswith(HUB_PREFIXES):
        repo, revision = split_hub_id(text)
        return _from_files(text, _fetch(repo, revision=revision, **where))
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if path.exists():
        return _from_files(text, _read_files(path))
    if os.sep in text or text.startswith("local-dir:") or path.suffix in (".json", ".model"):
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        if not near and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
            near = f" For the repository of that name on the Hub, write hf-hub:{text}."
        raise CheckpointError(f"There is no tokenizer {text!r}.{near}")
    return _of_model(text, where)


def _of_model(name: str, where: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the repository of a model's weights."""
    from zoo.registry import get_entry, split_name

    base, tag, revision = split_name(name)
    try:
        entry = get_entry(base)
    except UnknownModelError as error:
        near = did_you_mean(name, [BYTES]) or str(error).partition(".")[2]
        raise UnknownModelError(
            f"There is no tokenizer {name!r}: it is 'bytes', a folder or file, hf-hub:owner/name, or a model's "
            f"name.{near}"
        ) from None
    if entry.task != "language":
        raise ConfigError(f"{base} is made for {entry.task}: it reads no text and has no tokenizer.")
    weights = entry.find_weights(tag) if entry.weights or tag else None
    if weights is None or weights.hub_id is None:
        raise ConfigError(f"No tokenizer was published with {base}: take 'bytes', a folder, or hf-hub:owner/name.")
    return _from_files(name, _fetch(weights.hub_id, revision=revision or weights.revision, **where))


def _from_files(name: str, files: Files) -> Tokenizer:
    if "tokenizer.json" not in files:
        return SentencePieceTokenizer(name, files)
    config = files.get(CONFIG, b"")
    if f'"{MARK}"'.encode() in config and b'"chat_template"' not in config and TEMPLATE not in files:
        ours = ByteTokenizer()
        if files["tokenizer.json"] == ours._files()["tokenizer.json"]:  # which needs no library
            return ours
    return JsonTokenizer(name, files)


def _read_files(path: Path) -> Files:
    """The vocabulary that `path` means and the files beside it. Raises CheckpointError."""
    candidates = checkpoint_places(path)
    names = VOCABULARIES if path.is_dir() else (path.name,)
    if path.is_file() and path.suffix not in (".json", ".model"):
        names = VOCABULARIES  # beside a checkpoint
    for folder in candidates:
        for name in names:
            if (folder / name).is_file():
                kept = "tokenizer.model" if name.endswith(".model") else "tokenizer.json"
                beside = {other: _bytes_of(folder / other) for other in BESIDE if (folder / other).is_file()}
                return {kept: _bytes_of(folder / name), **beside}
    there = sorted(p.name for p in path.iterdir())[:20] if path.is_dir() else []
    holds = f" It holds {', '.join(there)}." if there else ""
    raise CheckpointError(f"There is no tokenizer ({' or '.join(VOCABULARIES)}) in {str(candidates[-1])!r}.{holds}")


def _bytes_of(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    if not content:
        raise CheckpointError(f"{str(path)!r} is empty.")
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{str(path)!r} is a Git LFS pointer: fetch the file itself with `git lfs pull`.")
    return content


def _fetch(repo: str, **where: Any) -> Files:
    """The tokenizer's files of a Hub repository. Raises DownloadError."""
    from zoo.weights import fetch_from_hub

    vocabulary = fetch_from_hub(repo, VOCABULARIES, **where)
    files = {vocabulary.name: _bytes_of(vocabulary)}
    for name in BESIDE:
        path = _fetch_optional(repo, name, **where)
        if path is not None:
            files[name] = _bytes_of(path)
    return files


def _fetch_optional(repo: str, name: str, **where: Any) -> Path | None:
    """A file that a repository may lack, as the cache can know; offline, one that is not cached is not there."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    from zoo.weights import fetch_from_hub

    if not where["refresh"]:
        known = huggingface_hub.try_to_load_from_cache(
            repo, name, revision=where["revision"], cache_dir=where["cache_dir"]
        )
        if known is not None and not isinstance(known, str):
            return None
    try:
        return fetch_from_hub(repo, (name,), **where)
    except DownloadError as error:
        absent = isinstance(error.__cause__, errors.EntryNotFoundError)
        if constants.HF_HUB_OFFLINE or (absent and not isinstance(error.__cause__, errors.LocalEntryNotFoundError)):
            return None
        raise


def check_fits(tokenizer: Tokenizer, model: Any) -> None:
    """Raise ConfigError if the tokenizer has tokens that the model's vocabulary, which may be larger, does not."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens and the model "
            f"{model.config.vocab_size:,}: it is another model's tokenizer."
        )


# ------------------------------------------------------------------------------------------------------------- training


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    min_frequency: int = 2,
    progress: bool = False,
    name: str = "trained",
) -> Tokenizer:
    """A byte-level BPE (GPT-2's: words and the spaces before them, any text exact) of the given texts.

    The same texts give the same tokenizer. The first of `special_tokens` begins and ends texts. `progress` shows how
    far the reading and the merging are. Raises ConfigError for a vocabulary too small for the 256 bytes and the special
    tokens, DataError where the texts hold nothing.
    """
    if type(vocab_size) is not int or vocab_size < 256 + len(special_tokens):
        raise ConfigError(
            f"vocab_size must be from {256 + len(special_tokens)} up, for all bytes and {len(special_tokens)} special "
            f"tokens: it is {vocab_size!r}."
        )
    if not special_tokens or len(set(special_tokens)) != len(special_tokens) or not all(special_tokens):
        raise ConfigError("special_tokens are one name or more, all different: the first begins and ends texts.")
    if isinstance(texts, str):
        raise ConfigError("texts are several: give a list of str, or an iterator.")
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            'Training a tokenizer needs the library tokenizers: pip install "backbone-zoo[text]".'
        ) from error
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=list(_BYTE_NAMES),
        show_progress=progress,
    )
    seen = 0

    def checked() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield as_text(text)

    library.train_from_iterator(checked(), trainer)
    if not seen:
        raise DataError("There is no text to train a tokenizer on.")
    end = special_tokens[0]
    whole = json.loads(library.to_str())
    whole["post_processor"] = _begins_with(end, 0)  # special tokens come first
    return JsonTokenizer(name, {"tokenizer.json": _json(whole), CONFIG: _json(_config_of(end))})
