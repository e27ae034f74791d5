"""Documents as sequences of one length: tokenised, laid end to end, cut, and handed out in batches.

A document is `bos text eos` where the tokenizer has both, `eos text` where one token is both, and `text eos` where
there is no `bos` or its models do not expect it. Token numbers are taken as they are. Of a chat, the answers alone are
learned. Sequence i holds tokens i * length to (i + 1) * length, and its targets are the tokens one further on, so that
every token but the first is learned once in an epoch.

With document masks, positions begin at zero with each document (`Decoder.forward` then lets tokens see their own
document alone), and what would have to be guessed from another document is no target.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import huggingface_hub.constants
import numpy as np
import torch
from torch import Tensor

from zoo.data.text import Damaged, Document, TextSource
from zoo.errors import ConfigError, DataError, ZooError
from zoo.files import make_folder, whole_file
from zoo.layers.token_loss import IGNORED

__all__ = [
    "PackedLoader",
    "PackedTokens",
    "StreamLoader",
    "TokenBatch",
    "document_ends",
    "encode_document",
    "evaluation_batches",
    "prepare_tokens",
]

CHARACTERS_AT_ONCE = 1 << 22  # tokenised in one go
POSITIONS_KEPT = 16
FORMAT = 1  # of the cached files


class Tokenizes(Protocol):
    """What is needed of a tokenizer; `zoo.data.tokenizers.Tokenizer` has it."""

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]: ...
    def encode(self, text: str) -> list[int]: ...
    def chat_text(self, messages: Any, *, add_generation_prompt: bool = True) -> str: ...
    def save(self, folder: str | Path) -> object: ...


class TokenBatch(NamedTuple):
    """(B, S) each, int64: tokens, the ones that come next (-100 where none is learned), and positions or None."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None


class _Encoded(NamedTuple):
    ids: np.ndarray
    counted: np.ndarray | None  # (N,) bool: what is learned; None: all


# ----------------------------------------------------------------------------------------------------------- documents


def encode_document(document: Document, tokenizer: Tokenizes | None) -> _Encoded:
    """The tokens of one document, and which of them are learned. Raises ConfigError for text without a tokenizer."""
    return next(_encode([document], tokenizer))


def _encode(documents: Sequence[Document], tokenizer: Tokenizes | None) -> Iterator[_Encoded]:
    texts = [document for document in documents if isinstance(document, str)]
    if tokenizer is None and any(not _is_tokenised(document) for document in documents):
        raise ConfigError("The data are texts, and tokenizer.name is null, which is for token numbers: name one.")
    ids = iter(tokenizer.encode_batch(texts, special=False) if tokenizer and texts else [])
    for document in documents:
        if _is_tokenised(document):
            yield _Encoded(np.array(document, dtype=np.uint32), None)
            continue
        assert tokenizer is not None
        if isinstance(document, str):
            before, after = document_ends(tokenizer)
            yield _Encoded(np.array([*before, *next(ids), *after], dtype=np.uint32), None)
        else:
            yield _encode_chat(typing.cast(list[dict[str, Any]], document), tokenizer)


def _is_tokenised(document: Document) -> bool:
    return isinstance(document, list) and all(type(item) is int for item in document)


def document_ends(tokenizer: Tokenizes) -> tuple[list[int], list[int]]:
    """The tokens that training puts before and behind a text."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is not None and bos == eos:
        return [bos], []
    return [bos] if bos is not None and tokenizer.adds_bos else [], [] if eos is None else [eos]


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Tokenizes) -> _Encoded:
    """A conversation as the tokenizer's template writes it; what the assistant says is learned.

    Each answer is tokenised apart from what is before it, as it is when the model gives it.
    """
    whole = tokenizer.chat_text(messages, add_generation_prompt=False)
    ids: list[int] = []
    counted: list[bool] = []
    done = 0

    def add(end: int, learned: bool) -> None:
        nonlocal done
        new = tokenizer.encode(whole[done:end])
        ids.extend(new)
        counted.extend([learned] * len(new))
        done = end

    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.chat_text(messages[:turn], add_generation_prompt=True)
        answered = tokenizer.chat_text(messages[: turn + 1], add_generation_prompt=False)
        if not (whole.startswith(answered) and answered.startswith(asked)):
            raise DataError(
                f"The chat template of {tokenizer.name} does not write turn {turn} of a conversation as it writes it "
                "without those that follow: which tokens are the assistant's cannot be told."
            )
        add(len(asked), False)
        add(len(answered), True)
    add(len(whole), False)
    return _Encoded(np.array(ids, dtype=np.uint32), np.array(counted, dtype=bool))


def _separator(tokenizer: Tokenizes | None) -> list[int]:
    """What ends the last document where a document's end is the beginning of the next."""
    before, after = ([], []) if tokenizer is None else document_ends(tokenizer)
    return [] if after else before


# ------------------------------------------------------------------------------------------------------ tokens on disk


class PackedTokens:
    """Documents as one long row of tokens, in memory only where they are looked at.

    `starts` are the places at which documents begin, `bytes` is the length of their text in UTF-8 (None where it is not
    known), `damaged` says what was left out.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "facts.json").read_text())
        shape = (facts["tokens"],)
        sizes = {"tokens": np.dtype(facts["dtype"]).itemsize * facts["tokens"], "starts": 8 * facts["documents"]}
        sizes |= {"counted": facts["tokens"]} if facts["counted"] else {}
        for name, size in sizes.items():
            found = (folder / f"{name}.bin").stat().st_size
            if found != size:
                raise DataError(f"{folder / name}.bin has {found:,} bytes and should have {size:,}: remove {folder}.")
        self.tokens = np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r", shape=shape)
        self.starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
        self.counted: np.ndarray | None = None
        if facts["counted"]:
            self.counted = np.memmap(folder / "counted.bin", dtype=bool, mode="r", shape=shape)
        self.bytes: int | None = facts["bytes"]
        self.damaged: list[str] = facts["damaged"]
        self.largest: int = facts["largest"]
        self.ends_are_shared: bool = facts["ends_are_shared"]

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, begin: int, length: int, masks: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """`length` tokens from place `begin` on, their targets, and, with `masks`, their positions; int64."""
        span = slice(begin, begin + length + 1)
        first, last = np.searchsorted(self.starts, (begin, begin + length + 1))
        return _window(
            self.tokens[span],
            None if self.counted is None else self.counted[span],
            self.starts[first:last] - begin,
            masks,
            self.ends_are_shared,
        )


def _window(
    tokens: np.ndarray, counted: np.ndarray | None, starts: np.ndarray, masks: bool, ends_are_shared: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """From S + 1 `tokens`, at places `starts` of which documents begin: tokens, targets and positions, (S,) each.

    Where `ends_are_shared`, the token that begins a document ends the one before, which has to guess it.
    """
    tokens = tokens.astype(np.int64)
    targets, positions = tokens[1:].copy(), None
    if counted is not None:
        targets[~counted[1:]] = IGNORED
    if masks:
        places = np.arange(len(targets))
        begins = np.zeros(len(targets), dtype=np.int64)
        begins[starts[starts < len(targets)]] = starts[starts < len(targets)]
        positions = places - np.maximum.accumulate(begins)
        if not ends_are_shared:
            targets[starts[starts > 0] - 1] = IGNORED
    return tokens[:-1], targets, positions


def prepare_tokens(
    source: TextSource,
    tokenizer: Tokenizes | None,
    *,
    cache_dir: str | None = None,
    strict: bool = False,
    max_tokens: int | None = None,
) -> PackedTokens:
    """Tokenise `source`, or find it tokenised by an earlier run: what it holds and the tokenizer decide, not names.

    With `max_tokens` the first documents alone that hold so many. Of several processes one does it, the others wait.
    Raises DataError where there is no token, no room to keep them, a source that cannot be read, or, when `strict`,
    something damaged.
    """
    home = make_folder(cache_dir or Path(huggingface_hub.constants.HF_HUB_CACHE).parent / "zoo" / "tokens")
    key = f"{FORMAT}\0{source.fingerprint()}\0{_tokenizer_fingerprint(tokenizer)}\0{max_tokens}"
    folder = home / hashlib.sha256(key.encode()).hexdigest()[:32]
    with _lock(home / f"{folder.name}.lock"):
        packed = _cached(folder)
        if packed is None:
            fresh = Path(tempfile.mkdtemp(dir=home, prefix=f".{folder.name}."))
            try:
                _write(fresh, source, tokenizer, strict, max_tokens)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(fresh, folder)
            except ZooError:
                raise
            except OSError as error:
                raise DataError(
                    f"The tokens of {source.name} cannot be kept in {str(home)!r}: {error.strerror or error}. Make "
                    "room there, or choose another data.cache_dir."
                ) from error
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            packed = PackedTokens(folder)
    if strict and packed.damaged:
        raise DataError(f"{packed.damaged[0]} Leave data.strict at false to skip such documents.")
    return packed


def _cached(folder: Path) -> PackedTokens | None:
    """What lies there, if it is whole."""
    try:
        return PackedTokens(folder)
    except (OSError, ValueError, KeyError):  # DataError is a ValueError
        return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` for this process alone. It is let go when the process ends, however that is."""
    try:
        import fcntl
    except ImportError:  # not on Windows; two processes then do the same work, and the later replaces the earlier
        yield
        return
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tokenizer_fingerprint(tokenizer: Tokenizes | None) -> str:
    if tokenizer is None:
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        digest = hashlib.sha256(f"{tokenizer.vocab_size} {document_ends(tokenizer)}".encode())
        for file in sorted(Path(scratch).iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _write(folder: Path, source: TextSource, tokenizer: Tokenizes | None, strict: bool, max_tokens: int | None) -> None:
    dtype = np.uint16 if tokenizer is not None and tokenizer.vocab_size <= 1 << 16 else np.uint32
    starts: list[int] = []
    damaged: list[str] = []
    total = largest = 0
    text_bytes: int | None = 0
    any_uncounted = False
    with open(folder / "tokens.bin", "wb") as file, open(folder / "counted.bin", "wb") as counted_file:

        def add(ids: np.ndarray, counted: np.ndarray | None) -> None:
            nonlocal total, largest, any_uncounted
            file.write(ids.astype(dtype).data)  # not `tofile`, which does not say when the disk is full
            counted_file.write((np.ones(len(ids), dtype=bool) if counted is None else counted).data)
            any_uncounted |= counted is not None
            largest = max(largest, int(ids.max(initial=0)))
            total += len(ids)

        for group in _in_groups(_sound(_read(source), damaged, strict)):
            for document, encoded in zip(group, _encode(group, tokenizer), strict=True):
                if max_tokens is not None and total >= max_tokens:
                    break
                starts.append(total)
                add(*encoded)
                if isinstance(document, str) and text_bytes is not None:
                    text_bytes += len(document.encode())
                else:
                    text_bytes = None
            if max_tokens is not None and total >= max_tokens:
                break
        if total and (end := _separator(tokenizer)):
            starts.append(total)
            add(np.array(end, dtype=np.uint32), None)
    if total < 2:
        raise DataError(f"{source.name} holds no text." + (f" {damaged[0]}" if damaged else ""))
    if not any_uncounted:
        (folder / "counted.bin").unlink()
    (folder / "starts.bin").write_bytes(np.array(starts, dtype=np.int64).data)
    facts = {
        "source": source.name,
        "tokenizer": tokenizer.name if tokenizer is not None else None,
        "dtype": np.dtype(dtype).name,
        "tokens": total,
        "documents": len(starts),
        "bytes": text_bytes,
        "counted": any_uncounted,
        "largest": largest,
        "ends_are_shared": bool(_separator(tokenizer)) and text_bytes is not None,
        "damaged": damaged,
    }
    with whole_file(folder / "facts.json") as out:
        out.write(json.dumps(facts, indent=2).encode())


def _read(source: TextSource) -> Iterator[Document | Damaged]:
    try:
        yield from source.documents()
    except ZooError:
        raise
    except OSError as error:  # no lack of room, as those of what is written here
        raise DataError(f"{source.name} cannot be read: {error.strerror or error}.") from error


def _sound(documents: Iterable[Document | Damaged], damaged: list[str], strict: bool) -> Iterator[Document]:
    """The documents that hold something; what is damaged is noted."""
    for document in documents:
        if isinstance(document, Damaged):
            damaged.append(document.problem)
            if strict:
                raise DataError(f"{document.problem} Leave data.strict at false to skip such documents.")
        elif document:
            yield document


def _in_groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Some documents at a time: tokenizers work on several at once."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


# ------------------------------------------------------------------------------------------------------------- loading


def _stack(windows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> TokenBatch:
    tokens, targets, positions = zip(*windows, strict=True)
    return TokenBatch(
        torch.from_numpy(np.stack(tokens)),
        torch.from_numpy(np.stack(targets)),
        None if positions[0] is None else torch.from_numpy(np.stack(positions)),
    )


class PackedLoader:
    """Batches of sequences of a shuffled `PackedTokens`: each pass over it has an order of its own, drawn from `seed`.

    An epoch has `tokens_per_epoch` tokens, or all; epochs that are no whole passes go on where the one before ended.
    The `i`-th batches of all processes together are sequences i * batch_size * processes and on. Raises ConfigError
    when there is not one sequence.
    """

    def __init__(
        self,
        data: PackedTokens,
        *,
        length: int,
        batch_size: int,
        masks: bool = False,
        tokens_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.data, self.length, self.masks, self.seed = data, length, masks, seed
        self.batch_size, self.rank, self.processes = batch_size, rank, processes
        self.sequences = (len(data) - 1) // length
        if not self.sequences:
            raise ConfigError(
                f"The training data hold {len(data):,} tokens, too few for one sequence of {length}: lower "
                "data.sequence_length."
            )
        self.per_epoch = self.sequences if tokens_per_epoch is None else max(1, tokens_per_epoch // length)
        self.batches_per_epoch = self.per_epoch // (batch_size * processes)
        self._order: tuple[int, np.ndarray] | None = None

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The sequence that comes as number `number` of the whole run."""
        turn, place = divmod(number, self.sequences)
        if self._order is None or self._order[0] != turn:
            self._order = turn, np.random.default_rng([self.seed, turn]).permutation(self.sequences)
        return self.data.window(int(self._order[1][place]) * self.length, self.length, self.masks)

    def batches(self, epoch: int, start: int) -> Iterator[TokenBatch]:
        for number in range(start, self.batches_per_epoch):
            first = epoch * self.per_epoch + (number * self.processes + self.rank) * self.batch_size
            yield _stack([self._window(first + i) for i in range(self.batch_size)])


class StreamLoader:
    """The same of a stream, read once from front to back, and shuffled within blocks of `shuffle_buffer` sequences.

    `positions` says at which document and token of it some sequences begin: a run that goes on there reads from there,
    and not from the first document. Every process reads and tokenises the whole stream, and takes its share.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Tokenizes | None,
        *,
        length: int,
        batch_size: int,
        tokens_per_epoch: int,
        masks: bool = False,
        shuffle_buffer: int = 1000,
        strict: bool = False,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.length, self.masks, self.strict, self.seed = length, masks, strict, seed
        self.batch_size, self.rank, self.processes = batch_size, rank, processes
        self.block = shuffle_buffer
        self.per_epoch = max(1, tokens_per_epoch // length)
        self.batches_per_epoch = self.per_epoch // (batch_size * processes)
        self.positions: dict[int, tuple[int, int]] = {0: (0, 0)}
        self.of_text = True
        self.damaged: dict[str, None] = {}

    def batches(self, epoch: int, start: int) -> Iterator[TokenBatch]:
        together = self.batch_size * self.processes
        first = start * together
        blocks = range(first // self.block * self.block, self.per_epoch, self.block)
        begin = epoch * self.per_epoch
        windows = self._windows(begin + blocks.start) if blocks else iter(())
        held: list[Any] = []
        number = start
        skip = first - blocks.start if blocks else 0
        for place in blocks:
            size = min(self.block, self.per_epoch - place)
            order = np.random.default_rng([self.seed, epoch, place]).permutation(size)
            block = [next(windows) for _ in range(size)]
            held += [block[i] for i in order][skip:]
            skip = 0
            while len(held) >= together and number < self.batches_per_epoch:
                mine = held[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                held = held[together:]
                number += 1
                yield _stack(mine)

    def _windows(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """The sequences of the stream from `number` on. Raises DataError where it ends."""
        at = max(known for known in self.positions if known <= number)
        document, offset = self.positions[at]
        tokens, counted = np.empty(0, dtype=np.uint32), np.empty(0, dtype=bool)
        begins: list[tuple[int, int, int]] = []  # place in `tokens`, and which token of which document lies there
        some_uncounted = False
        for number_of, encoded in self._encoded(document):
            ids, learned = encoded.ids[offset:], encoded.counted
            begins.append((len(tokens), number_of, offset))
            tokens = np.concatenate((tokens, ids))
            some_uncounted |= learned is not None
            counted = np.concatenate((counted, np.ones(len(ids), dtype=bool) if learned is None else learned[offset:]))
            offset = 0
            while len(tokens) > self.length:
                if at % self.per_epoch % self.block == 0:
                    self._note(at, begins[0][1], begins[0][2] - begins[0][0])
                if at >= number:
                    starts = np.array([place for place, _, token in begins if token == 0], dtype=np.int64)
                    whole = slice(0, self.length + 1)
                    yield _window(
                        tokens[whole],
                        counted[whole] if some_uncounted else None,
                        starts[starts <= self.length],
                        self.masks,
                        bool(_separator(self.tokenizer)) and self.of_text,
                    )
                tokens, counted = tokens[self.length :], counted[self.length :]
                at += 1
                begins = _moved(begins, self.length)
        raise DataError(
            f"The stream {self.source.name} ended after {at * self.length + len(tokens):,} tokens, before the run did: "
            "lower scheduler.epochs or data.tokens_per_epoch. The last checkpoint is whole."
        )

    def _encoded(self, first: int) -> Iterator[tuple[int, _Encoded]]:
        for number, document in enumerate(self.source.documents(first), first):
            if isinstance(document, Damaged):
                if self.strict:
                    raise DataError(f"{document.problem} Leave data.strict at false to skip such documents.")
                self.damaged[document.problem] = None
            elif document:
                self.of_text = isinstance(document, str)
                yield number, encode_document(document, self.tokenizer)

    def _note(self, sequence: int, document: int, token: int) -> None:
        self.positions[sequence] = document, token
        for old in sorted(self.positions)[1:-POSITIONS_KEPT]:
            del self.positions[old]


def _moved(begins: list[tuple[int, int, int]], by: int) -> list[tuple[int, int, int]]:
    """The same when the first `by` tokens are gone: of the documents before, the one that is not over is kept."""
    last = max(i for i, (place, _, _) in enumerate(begins) if place <= by)
    place, document, token = begins[last]
    return [(0, document, token + by - place), *((p - by, d, t) for p, d, t in begins[last + 1 :])]


def evaluation_batches(
    data: PackedTokens, *, length: int, batch_size: int, masks: bool = False, rank: int = 0, processes: int = 1
) -> Iterator[TokenBatch]:
    """Every token of `data` but the first, once, in order; this process's share. The last batch may be short."""
    places = list(range(0, len(data) - 1, length))
    whole = [place for place in places if place + length < len(data)]
    rest = places[len(whole) :]
    groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)] + ([rest] if rest else [])
    for group in groups[rank::processes]:
        yield _stack([data.window(place, min(length, len(data) - 1 - place), masks) for place in group])
