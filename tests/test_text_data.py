"""Texts: read from every kind of file, tokenised once, packed, and handed out in an order that nothing disturbs."""

from __future__ import annotations

import gzip
import itertools
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from tests.language import small
from zoo.data.packing import PackedLoader, StreamLoader, encode_document, evaluation_batches, prepare_tokens
from zoo.data.text import Damaged, Document, FileTexts, TextDataConfig, find_texts, iterate_texts, load_texts
from zoo.data.tokenizers import create_tokenizer, train_tokenizer
from zoo.errors import ConfigError, DataError

BYTES = create_tokenizer("bytes")
TEXTS = ["one two", "drei vier fünf", "", "six", *(f"text number {i} of several\n" * (i % 5 + 1) for i in range(30))]


def write_jsonl(path: Path, rows: list[Any], column: str = "text") -> Path:
    data = "".join(json.dumps({"number": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: list[Any], column: str = "text") -> Path:
    table = pyarrow.table({"title": [str(i) for i in range(len(rows))], column: rows})
    pyarrow.parquet.write_table(table, path, row_group_size=8)
    return path


def tokens_of(texts: list[str]) -> list[int]:
    return [token for text in texts if text for token in (256, *text.encode())] + [256]


class Endless:
    """A stream that numbers its documents, and remembers which it was asked for."""

    name = "endless"

    def __init__(self, documents: int | None = None) -> None:
        self.asked: list[int] = []
        self.length = documents

    def documents(self, first: int = 0) -> Iterator[Document | Damaged]:
        for number in itertools.count(first):
            if number == self.length:
                return
            self.asked.append(number)
            yield Damaged(f"document {number}") if number % 17 == 16 else f"document {number} " * (number % 7 + 1)

    def fingerprint(self) -> str:
        return "endless"


# ------------------------------------------------------------------------------------------------------------- sources


def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path):
    texts = [text for text in TEXTS if text]
    files = [
        write_jsonl(tmp_path / "a.jsonl", texts),
        write_jsonl(tmp_path / "b.jsonl.gz", texts),
        write_parquet(tmp_path / "c.parquet", texts),
    ]
    for file in files:
        assert list(iterate_texts(file)) == texts
        for first in (0, 1, 8, 20, len(texts)):
            assert list(FileTexts([str(file)], None).documents(first)) == texts[first:]
    assert list(iterate_texts(files)) == texts * 3
    assert list(iterate_texts(files[2], "title")) == [str(i) for i in range(len(texts))]
    together = FileTexts([str(file) for file in files], None)
    for first in (5, len(texts), len(texts) + 3, 3 * len(texts) - 1):
        assert list(together.documents(first)) == (texts * 3)[first:]


def test_a_folder_and_patterns(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("# A")
    (tmp_path / "deep" / "b.txt").write_text("bé", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(iterate_texts(tmp_path)) == ["# A", "bé"]
    assert list(iterate_texts(str(tmp_path / "**/*.txt"))) == ["bé"]
    assert find_texts(f"{tmp_path}/{{a.md,deep/b.txt}}") == [str(tmp_path / "a.md"), str(tmp_path / "deep" / "b.txt")]
    topics = list(iterate_texts("pydoc"))
    assert len(topics) > 50
    assert any('The "if" statement' in topic for topic in topics)


def test_splits_of_a_folder(tmp_path: Path):
    for name in ("train-00", "train-01", "validation", "other"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = TextDataConfig(path=str(tmp_path))
    assert list(load_texts(config, True).documents()) == ["train-00", "train-01"]
    assert list(load_texts(config, False).documents()) == ["validation"]
    named = TextDataConfig(path=str(tmp_path), train_split="other", val_split="train")
    assert list(load_texts(named, True).documents()) == ["other"]
    assert list(load_texts(named, False).documents()) == ["train-00", "train-01"]
    alone = TextDataConfig(path=str(tmp_path / "other.txt"))
    with pytest.raises(ConfigError, match=r"no texts to evaluate on.*data\.val_path"):
        load_texts(alone, False)
    both = TextDataConfig(path=str(tmp_path / "other.txt"), val_path=str(tmp_path / "validation.txt"))
    assert list(load_texts(both, False).documents()) == ["validation"]
    within = TextDataConfig(path=str(tmp_path / "*.txt"), val_path=str(tmp_path / "other.txt"), train_split="none")
    assert list(load_texts(within, True).documents()) == ["train-00", "train-01"]
    same = TextDataConfig(path=str(tmp_path), val_path=str(tmp_path))
    assert list(load_texts(same, True).documents()) == ["other", "train-00", "train-01"]
    train, val = (set(load_texts(TextDataConfig(name="pydoc"), part).documents()) for part in (True, False))
    assert not train & val


def test_a_data_set_in_the_hubs_layout(tmp_path: Path):
    """By `datasets`, from a folder, which it treats as a repository: at once, or streamed from any document on."""
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [f"{split} {i}" for i in range(20)])
    for streaming in (False, True):
        config = TextDataConfig(name="hub", path=str(tmp_path), streaming=streaming, tokens_per_epoch=100)
        train, test = load_texts(config, True), load_texts(config, False)
        assert list(train.documents(17)) == ["train 17", "train 18", "train 19"]
        assert next(iter(test.documents())) == "test 0"
        assert len(train.fingerprint()) == 64
    assert list(iterate_texts(f"hub:{tmp_path}#test"))[-1] == "test 19"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("latin.txt", "Größe".encode("latin-1"), "is not UTF-8 text: byte 2 is 0xf6"),
        ("line.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "document 1 is not JSON"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', "document 1 is not a JSON object"),
        ("column.jsonl", b'{"text": "a"}\n{"texts": "b"}\n', "1 has no column 'text', but texts. Did you mean texts"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 7}\n', "document 1: 'text' is neither text, token numbers nor"),
        ("cut.parquet", b"PAR1 and no more", "cut.parquet cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "cut.jsonl.gz cannot be read"),
    ],
    ids=["encoding", "json", "row", "column", "value", "parquet", "gzip"],
)
def test_damage_is_named_or_skipped_and_counted(tmp_path: Path, name: str, content: bytes, problem: str):
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        list(iterate_texts(tmp_path))
    assert "good text" in list(iterate_texts(tmp_path, strict=False))
    source = FileTexts(find_texts(str(tmp_path)), None)
    packed = prepare_tokens(source, BYTES, cache_dir=str(tmp_path / "cache"))
    assert len(packed.damaged) == 1
    assert problem in packed.damaged[0]
    with pytest.raises(DataError, match=problem):
        prepare_tokens(source, BYTES, cache_dir=str(tmp_path / "cache"), strict=True)


def test_a_damaged_part_of_a_parquet_file(tmp_path: Path):
    """The documents of other parts keep their numbers."""
    texts = ["".join(map(chr, np.random.default_rng(i).integers(97, 123, 300))) for i in range(24)]
    path = write_parquet(tmp_path / "a.parquet", texts)
    data = bytearray(path.read_bytes())
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    path.write_bytes(data)
    found = list(FileTexts([str(path)], None).documents())
    assert [isinstance(document, Damaged) for document in found] == [False] * 8 + [True] * 8 + [False] * 8
    assert found[20] == texts[20]
    assert "documents 8 to 15 cannot be read" in found[8].problem  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "pydok"}, "data.name is 'pydok'.*Did you mean pydoc"),
        ({"batch_size": 0}, "data.batch_size must be a whole number from 1 up"),
        ({"name": "pydoc", "path": "x"}, "comes with Python: leave out data.path"),
        ({"path": "x", "streaming": True}, "Set data.tokens_per_epoch"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        TextDataConfig(**changes)


def test_what_is_not_there(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("a")
    write_jsonl(tmp_path / "a.jsonl", ["x"], "body")
    write_parquet(tmp_path / "b.parquet", ["x"], "body")
    (tmp_path / "none").mkdir()
    for path, column, message in (
        ("corpsu.txt", None, r"There are no texts at .* Did you mean .*corpus\.txt"),
        ("none", None, "holds no texts"),
        ("a.jsonl", None, "has no text or token_ids or messages or content, but number, body"),
        ("b.parquet", "bodi", "has no column 'bodi'.* Did you mean body"),
    ):
        with pytest.raises(DataError, match=message):
            list(iterate_texts(tmp_path / path, column))
    with pytest.raises(ConfigError, match=r"say where the texts lie with data\.path"):
        load_texts(TextDataConfig(), True)
    (tmp_path / "none" / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        prepare_tokens(FileTexts([str(tmp_path / "none" / "empty.txt")], None), BYTES, cache_dir=str(tmp_path / "c"))


# ------------------------------------------------------------------------------------------------------------- packing


def test_packed_tokens_are_the_documents_end_to_end(tmp_path: Path):
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], None)
    packed = prepare_tokens(source, BYTES, cache_dir=str(tmp_path / "cache"))
    assert packed.tokens.tolist() == tokens_of(TEXTS)
    assert packed.bytes == sum(len(text.encode()) for text in TEXTS)
    tokens, targets, positions = packed.window(3, 50, masks=False)
    assert tokens.tolist() == tokens_of(TEXTS)[3:53]
    assert targets.tolist() == tokens_of(TEXTS)[4:54]
    assert positions is None
    _, targets, positions = packed.window(3, 50, masks=True)
    assert positions is not None
    assert targets.tolist() == tokens_of(TEXTS)[4:54]  # what ends a document is its own to guess
    expected, place = [], -1
    for number, token in enumerate(tokens_of(TEXTS)[3:53]):
        place = 0 if token == 256 or number == 0 else place + 1
        expected.append(place)
    assert positions.tolist() == expected


def test_documents_with_ends_of_their_own(tmp_path: Path):
    """Where a document's last token is not the next one's first, no document guesses how another begins."""
    tokenizer = train_tokenizer(TEXTS, 300, special_tokens=("<s>", "</s>"))
    tokenizer.eos_id, tokenizer.adds_bos = 1, True
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], None)
    packed = prepare_tokens(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    whole = [[0, *tokenizer.encode(text), 1] for text in TEXTS if text]
    assert packed.tokens.tolist() == [*itertools.chain(*whole)]
    _, targets, positions = packed.window(0, len(packed) - 1, masks=True)
    assert positions is not None
    assert positions.tolist() == [*itertools.chain(*(range(len(document)) for document in whole))][:-1]
    assert (targets == -100).sum() == len(whole) - 1
    assert (np.flatnonzero(targets == -100) == np.cumsum([len(document) for document in whole])[:-1] - 1).all()


def test_document_masks_hide_other_documents(tmp_path: Path):
    """The loss over packed documents is that of each document by itself."""
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", TEXTS[:4]))], None)
    packed = prepare_tokens(source, BYTES, cache_dir=str(tmp_path / "cache"))
    (batch,) = evaluation_batches(packed, length=100, batch_size=1, masks=True)
    model = small()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        together = model(batch.tokens, targets=batch.targets, positions=batch.positions)
        parts = [torch.tensor([[256, *text.encode(), 256]]) for text in TEXTS[:4] if text]
        losses = [model(part[:, :-1], targets=part[:, 1:]) * (part.shape[1] - 1) for part in parts]
    torch.testing.assert_close(together, sum(losses) / sum(part.shape[1] - 1 for part in parts))


def test_tokenised_data_are_taken_as_they_are(tmp_path: Path):
    rows = [[5, 6, 7], [70000, 1], [2]]
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", rows, "token_ids"))], None)
    packed = prepare_tokens(source, None, cache_dir=str(tmp_path / "cache"))
    assert packed.tokens.tolist() == [5, 6, 7, 70000, 1, 2]
    assert packed.starts.tolist() == [0, 3, 5]
    assert (packed.largest, packed.bytes) == (70000, None)
    with pytest.raises(ConfigError, match=r"tokenizer\.name is null, which is for token numbers"):
        encode_document("text", None)


def test_of_a_chat_the_answers_are_learned(tmp_path: Path):
    tokenizer = train_tokenizer(["hello how are you fine"], 300, special_tokens=("<|end|>",))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "how are you"},
        {"role": "user", "content": "fine"},
        {"role": "assistant", "content": "fine"},
    ]
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", [messages] * 3, "messages"))], None)
    packed = prepare_tokens(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    tokens, targets, _ = packed.window(0, len(packed.tokens) // 3, masks=True)
    learned = tokenizer.decode(targets[targets != -100], skip_special=False)
    assert learned == "how are you<|end|>fine<|end|>"
    assert tokenizer.decode(tokens, skip_special=False).count("[user]") == 2
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not write turn 1 of a conversation as it writes it without"):
        encode_document(messages, tokenizer)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, -3], "document 0: there is no token -3"),
        ([1, 2**40], f"there is no token {2**40}"),
        ([{"role": "user", "content": "hello"}], "there is no message of the assistant's, of which to learn"),
        ([{"role": "assistant", "content": None}], "the content of message 0 is no text, but NoneType"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [1]}], "message 1 is no text, but list"),
    ],
)
def test_documents_that_nothing_can_be_learned_of(tmp_path: Path, value: list[Any], message: str):
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", [value, value], "messages"))], "messages")
    found = list(source.documents())
    assert all(isinstance(document, Damaged) and message.replace("document 0", f"document {i}") in document.problem
               for i, document in enumerate(found))  # fmt: skip


def test_data_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The content and the tokenizer decide: a copy elsewhere is known, a changed letter or vocabulary is not."""
    cache = tmp_path / "cache"
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def prepare(path: Path, tokenizer: Any = BYTES, **options: Any) -> list[int]:
        return prepare_tokens(FileTexts([str(path)], None), tokenizer, cache_dir=str(cache), **options).tokens.tolist()

    found = prepare(first)
    assert prepare(write_jsonl(tmp_path / "copy.jsonl", TEXTS)) == found
    folders = [path for path in cache.iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert prepare(write_jsonl(first, [*TEXTS[:-1], "changed"])) != found
    prepare(first, train_tokenizer(TEXTS, 300))
    some = prepare(first, max_tokens=20)
    assert some == tokens_of(TEXTS[:2])
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 4

    def broken(*_: Any) -> Any:
        raise DataError("broken off")

    monkeypatch.setattr("zoo.data.packing._separator", broken)
    with pytest.raises(DataError, match="broken off"):
        prepare(write_jsonl(first, ["other"]))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 4


def test_what_a_full_disk_cut_off_is_not_kept(tmp_path: Path):
    """No file may grow larger than some bytes, as on a disk without room."""
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", [[1, 2, 3]] * 100, "token_ids"))], None)
    cache = tmp_path / "cache"
    before, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited))
    try:
        with pytest.raises(DataError, match=r"tokens of .* cannot be kept in .*cache': File too large"):
            prepare_tokens(source, None, cache_dir=str(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, unlimited))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_source_that_breaks_off_is_not_told_as_a_full_disk(tmp_path: Path):
    class Flaky(FileTexts):
        def documents(self, first: int = 0) -> Iterator[Document | Damaged]:
            yield from itertools.islice(super().documents(first), 2)
            raise ConnectionError("the server hung up")

    source = Flaky([str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], None)
    with pytest.raises(DataError, match=r"a\.jsonl.* cannot be read: the server hung up\."):
        prepare_tokens(source, BYTES, cache_dir=str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "facts.json"])
def test_cached_tokens_that_are_not_whole_are_made_anew(tmp_path: Path, name: str):
    source = FileTexts([str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], None)
    cache = tmp_path / "cache"
    prepare_tokens(source, BYTES, cache_dir=str(cache))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-8], b""):
        (folder / name).write_bytes(damaged)
        assert prepare_tokens(source, BYTES, cache_dir=str(cache)).tokens.tolist() == tokens_of(TEXTS)
        assert (folder / name).read_bytes() == whole


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("packed")
    return prepare_tokens(FileTexts([str(write_jsonl(folder / "a.jsonl", TEXTS))], None), BYTES, cache_dir=str(folder))


def flat(loader: Any, epoch: int, start: int = 0) -> list[list[int]]:
    return [row for batch in loader.batches(epoch, start) for row in batch.tokens.tolist()]


def test_an_epoch_holds_each_sequence_once(packed: Any):
    loader = PackedLoader(packed, length=16, batch_size=3)
    whole = [packed.tokens[i * 16 : i * 16 + 16].tolist() for i in range(loader.sequences)]
    first, second = flat(loader, 0), flat(loader, 1)
    assert len(first) == loader.batches_per_epoch * 3
    assert first != second
    one_each = PackedLoader(packed, length=16, batch_size=1)
    assert sorted(flat(one_each, 4)) == sorted(whole)
    assert flat(PackedLoader(packed, length=16, batch_size=1, seed=1), 0) != flat(one_each, 0)
    with pytest.raises(ConfigError, match="too few for one sequence of 100000"):
        PackedLoader(packed, length=100000, batch_size=1)


def loader_of(kind: str, packed: Any, **options: Any) -> Any:
    if kind == "packed":
        return PackedLoader(packed, length=16, tokens_per_epoch=16 * 150, **options)
    return StreamLoader(Endless(), BYTES, length=16, tokens_per_epoch=16 * 150, shuffle_buffer=20, **options)


@pytest.mark.parametrize("kind", ["packed", "stream"])
@pytest.mark.parametrize("masks", [False, True])
def test_batches_do_not_depend_on_processes_or_on_where_they_began(packed: Any, kind: str, masks: bool):
    one = loader_of(kind, packed, batch_size=6, masks=masks)
    two = [loader_of(kind, packed, batch_size=3, masks=masks, rank=rank, processes=2) for rank in range(2)]
    for epoch in range(2):
        whole = list(one.batches(epoch, 0))
        assert len(whole) == one.batches_per_epoch == 25
        shares = [list(loader.batches(epoch, 0)) for loader in two]
        for batch, *parts in zip(whole, *shares, strict=True):
            for name in ("tokens", "targets", "positions"):
                pieces = [getattr(part, name) for part in parts]
                value = getattr(batch, name)
                assert (value is None) == (name == "positions" and not masks)
                assert value is None or torch.equal(torch.cat(pieces), value)
        for start in (1, 9, 24, 25):
            fresh = loader_of(kind, packed, batch_size=6, masks=masks)
            rest = list(fresh.batches(epoch, start))
            assert len(rest) == 25 - start
            assert all(torch.equal(a.targets, b.targets) for a, b in zip(rest, whole[start:], strict=True))


def test_a_stream_goes_on_without_reading_it_all_again():
    source = Endless()
    loader = StreamLoader(source, BYTES, length=16, batch_size=4, tokens_per_epoch=16 * 400, shuffle_buffer=20)
    whole = [batch.tokens for epoch in range(2) for batch in loader.batches(epoch, 0)]
    again = Endless()
    resumed = StreamLoader(again, BYTES, length=16, batch_size=4, tokens_per_epoch=16 * 400, shuffle_buffer=20)
    resumed.positions |= loader.positions
    rest = [batch.tokens for batch in resumed.batches(1, 90)]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[190:], strict=True))
    assert len(again.asked) < len(source.asked) / 10
    assert list(loader.damaged)[:2] == ["document 16", "document 33"]


def test_a_stream_that_ends_says_so():
    loader = StreamLoader(Endless(40), BYTES, length=16, batch_size=4, tokens_per_epoch=16 * 1000, shuffle_buffer=10)
    batches = loader.batches(0, 0)
    with pytest.raises(DataError, match=r"The stream endless ended after [\d,]+ tokens, before the run did"):
        list(batches)
    strict = StreamLoader(Endless(), BYTES, length=16, batch_size=4, tokens_per_epoch=16 * 200, strict=True)
    with pytest.raises(DataError, match=r"document 16 Leave data\.strict at false"):
        list(strict.batches(0, 0))


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_meets_every_token_once(packed: Any, processes: int):
    batches = [
        batch
        for rank in range(processes)
        for batch in evaluation_batches(packed, length=13, batch_size=4, rank=rank, processes=processes)
    ]
    assert sum(batch.targets.numel() for batch in batches) == len(packed) - 1
    if processes == 1:
        assert torch.cat([batch.targets.flatten() for batch in batches]).tolist() == packed.tokens[1:].tolist()


def test_text_with_the_name_of_a_special_token_stays_text():
    tokenizer = train_tokenizer(["a b c"], 300, special_tokens=("<|endoftext|>",))
    encoded = encode_document("a <|endoftext|> b", tokenizer)
    assert encoded.ids.tolist().count(0) == 1  # the one that begins the document
