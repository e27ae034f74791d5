"""Tokenizers: exact round trips, what transformers makes of the same files, chat templates, streams, the Hub."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.hub_stub import Hub
from tests.language import small
from tests.launcher import python
from zoo.data import train_tokenizer
from zoo.data.tokenizers import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer, check_fits
from zoo.errors import CheckpointError, ConfigError, DataError, DownloadError, UnknownModelError

TEXTS = [
    "",
    "hello",
    " hello  world\n\n\ttabs ",
    "Grüße, 日本語, ελληνικά, עברית, 🦊👩‍👩‍👧",
    "e\u0301 \u00e9 \ufffd \x00\x7f\x80",
    "def f(x):\n    return x ** 2  # 12345\n",
    "tomorrow and tomorrow and tomorrow",
]
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a lazy dog sleeps under the brown tree",
    "tomorrow and tomorrow and tomorrow creeps in this petty pace",
    "Grüße aus Köln: schöne Brücken, grüne Bäume",
] * 20
LLAMA_STYLE = (
    "{% if messages[0]['role'] == 'system' %}{{ bos_token }}[{{ messages[0]['content'] }}]{% endif %}\n"
    "{% for m in messages %}\n"
    "    {% if m['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('Who is ' + m['role'] + '?') }}"
    "{% endif %}\n"
    "    {% generation %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}\n"
    "    {% if loop.index > 98 %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{{ strftime_now('%Y') | length }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sentencepiece_model() -> bytes:
    """A small vocabulary made as Llama's was: BPE, bytes for what it does not know, a space before each text."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=9,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    zoo.create_tokenizer("bytes").save(root / "bytes")
    train_tokenizer(SENTENCES, 320).save(root / "json")
    (root / "sentencepiece").mkdir()
    (root / "sentencepiece" / "tokenizer.model").write_bytes(sentencepiece_model())
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    config |= {"add_bos_token": True, "add_eos_token": False, "legacy": True, "clean_up_tokenization_spaces": False}
    (root / "sentencepiece" / "tokenizer_config.json").write_text(json.dumps(config))
    return {path.name: path for path in root.iterdir()}


KINDS = {"bytes": ByteTokenizer, "json": JsonTokenizer, "sentencepiece": SentencePieceTokenizer}


@pytest.fixture(params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def test_a_folder_gives_its_kind_and_special_tokens(folder: Path) -> None:
    tokenizer = zoo.create_tokenizer(folder)
    assert type(tokenizer) is KINDS[folder.name]
    assert (tokenizer.bos_id, tokenizer.eos_id) == {"bytes": (256, 256), "json": (0, 0), "sentencepiece": (1, 2)}[
        folder.name
    ]
    assert tokenizer.vocab_size == {"bytes": 257, "json": 320, "sentencepiece": 340}[folder.name]
    assert tokenizer.eos_ids == (tokenizer.eos_id,)
    assert tokenizer.pad_id is None
    assert tokenizer.adds_bos
    begun = tokenizer.encode("hello", bos=True, eos=True)
    assert begun == [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]
    assert tokenizer.decode(begun) == "hello"
    assert tokenizer.decode(torch.tensor(begun), skip_special=False).count("hello") == 1
    assert tokenizer.decode(begun, skip_special=False) != "hello"
    assert max(max(tokenizer.encode(text), default=0) for text in TEXTS) < tokenizer.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(folder: Path, text: str) -> None:
    tokenizer = zoo.create_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()) == ids
    assert tokenizer.encode_batch([text, "and another"], bos=True) == [
        tokenizer.encode(text, bos=True),
        tokenizer.encode("and another", bos=True),
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_opens_what_is_saved_and_agrees(folder: Path, tmp_path: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = zoo.create_tokenizer(folder)
    tokenizer.save(tmp_path)
    theirs = _opened(AutoTokenizer, str(folder))
    if folder.name == "sentencepiece":
        text = text.lstrip()  # their conversion drops one space at the beginning, SentencePiece itself does not
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size
    assert zoo.create_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


def _opened(kind: Any, folder: str, _cache: dict[str, Any] = {}) -> Any:  # noqa: B006
    if folder not in _cache:
        _cache[folder] = kind.from_pretrained(folder)
    return _cache[folder]


def test_any_bytes_come_back_from_the_byte_tokenizer(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = zoo.create_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    draw = random.Random(0)
    theirs = AutoTokenizer.from_pretrained(folders["bytes"])
    for _ in range(50):
        body = draw.randbytes(draw.randrange(40))
        assert tokenizer.decode_bytes(list(body)) == body
        assert tokenizer.decode(list(body)) == body.decode(errors="replace") == theirs.decode(list(body))
        text = "".join(chr(draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(9))
        assert tokenizer.encode(text) == list(text.encode()) == theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    named = "a <|endoftext|> in the text is text"
    assert tokenizer.encode(named) == list(named.encode()) == theirs(named, add_special_tokens=False)["input_ids"]


def test_names_of_special_tokens_stand_for_them_unless_they_are_text(folders: dict[str, Path]) -> None:
    tokenizer = zoo.create_tokenizer(folders["json"])
    assert tokenizer.encode("a<|endoftext|>a") == [*tokenizer.encode("a"), 0, *tokenizer.encode("a")]
    assert 0 not in tokenizer.encode("a<|endoftext|>a", special=False)
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>a", special=False)) == "a<|endoftext|>a"
    tokenizer = zoo.create_tokenizer(folders["sentencepiece"])
    assert tokenizer.encode("fox</s>dog") == [*tokenizer.encode("fox"), 2, *tokenizer.encode("dog")]
    assert 2 not in tokenizer.encode("fox</s>dog", special=False)


# -------------------------------------------------------------------------------------------------------- as it comes


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_splits_a_character(folder: Path, text: str) -> None:
    tokenizer = zoo.create_tokenizer(folder)
    whole = f"the fox {text}"
    ids = tokenizer.encode(whole)
    for split in (0, 1, len(ids) // 2):
        stream = tokenizer.stream(ids[:split])
        pieces = [stream.push([i]) for i in ids[split:]]
        last = stream.flush()
        if split <= 1 or "\ufffd" not in tokenizer.decode(ids[:split]):
            assert tokenizer.decode(ids[:split]) + "".join(pieces) + last == whole
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces)
            assert last == ""


def test_a_stream_of_broken_bytes_is_what_decoding_them_is() -> None:
    tokenizer = zoo.create_tokenizer("bytes")
    draw = random.Random(1)
    for length in (1, 30, 500):
        ids = list(draw.randbytes(length))
        stream = tokenizer.stream()
        pieces = [stream.push(ids[i : i + 3]) for i in range(0, length, 3)]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_a_space_before_a_streamed_word_stays(folders: dict[str, Path]) -> None:
    tokenizer = zoo.create_tokenizer(folders["sentencepiece"])
    ids = tokenizer.encode("brown fox")
    before = len(tokenizer.encode("brown"))
    assert tokenizer.decode(ids[before:]) == "fox"
    assert "".join(tokenizer.stream(ids[:before]).push([i]) for i in ids[before:][:1]).startswith(" ")


# --------------------------------------------------------------------------------------------------------------- chats


@pytest.fixture
def chatty(folders: dict[str, Path], tmp_path: Path) -> Path:
    train_tokenizer(SENTENCES, 300, special_tokens=("<|endoftext|>", "<user>", "<assistant>", "<|eot|>")).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAMA_STYLE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3], "pad_token_id": 2}')
    return tmp_path


def test_a_chat_is_written_as_transformers_writes_it(chatty: Path) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(chatty)
    tokenizer = zoo.create_tokenizer(chatty)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((0, 3), 2)
    messages = [
        {"role": "system", "content": "Be brief, für 🦊."},
        {"role": "user", "content": "  hello "},
        {"role": "assistant", "content": "<b>&</b>"},
        {"role": "user", "content": "bye"},
    ]
    for options in ({}, {"add_generation_prompt": False}, {"tools": [{"name": "f", "ü": "<&>'"}]}):
        wanted = theirs.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **options})
        assert tokenizer.chat_text(messages, **options) == wanted
        ids = tokenizer.apply_chat(messages, **options)
        assert ids == theirs(wanted, add_special_tokens=False)["input_ids"]
        assert ids.count(1) == 2  # <user>
    assert tokenizer.chat_text(messages).endswith("<user>bye<|endoftext|><assistant>")


def test_a_template_of_the_configuration_by_name(chatty: Path) -> None:
    (chatty / "chat_template.jinja").unlink()
    config = json.loads((chatty / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (chatty / "tokenizer_config.json").write_text(json.dumps(config))
    assert zoo.create_tokenizer(chatty).chat_text([{"role": "user", "content": "?"}]) == "yes"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "robot", "content": "x"}], "Who is robot"),
        ("hello", "list"),
        ([], "list"),
        ([{"role": "user"}], "Message 0"),
        (["hello"], "Message 0"),
    ],
)
def test_conversations_that_are_none(chatty: Path, messages: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        zoo.create_tokenizer(chatty).apply_chat(messages)


def test_templates_cannot_reach_out_and_may_be_broken(chatty: Path) -> None:
    template = chatty / "chat_template.jinja"
    template.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="unsafe"):
        zoo.create_tokenizer(chatty).apply_chat([{"role": "user", "content": "x"}])
    template.write_text("{% if %}")
    with pytest.raises(CheckpointError, match="line 1"):
        zoo.create_tokenizer(chatty).apply_chat([{"role": "user", "content": "x"}])


def test_a_padding_token_that_is_not_there_is_none(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["json"] / "tokenizer_config.json").read_text())
    zoo.create_tokenizer(folders["json"]).save(tmp_path)
    for pad, number in (("[PAD]", None), ({"content": "<|endoftext|>"}, 0)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}))
        assert zoo.create_tokenizer(tmp_path).pad_id == number


def test_no_template_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        zoo.create_tokenizer("bytes").apply_chat([{"role": "user", "content": "x"}])


# ------------------------------------------------------------------------------------------------------------- training


def test_training_gives_the_same_tokenizer_each_time(tmp_path: Path) -> None:
    texts = [f"{a} {b}" for a in SENTENCES[:4] for b in SENTENCES[:4]]
    program = (
        "import json, sys; from zoo.data import train_tokenizer; "
        "train_tokenizer(json.load(sys.stdin), 400).save(sys.argv[1])"
    )
    assert python("-c", program, tmp_path, input=json.dumps(texts)).returncode == 0
    tokenizer = train_tokenizer(iter(texts), 400)
    tokenizer.save(tmp_path / "here")
    written = (tmp_path / "tokenizer.json").read_bytes()
    assert (tmp_path / "here" / "tokenizer.json").read_bytes() == written
    assert len(tokenizer.encode(SENTENCES[0])) < len(SENTENCES[0]) / 2
    other = train_tokenizer(texts[::-1], 400, special_tokens=("<end>", "<pad>"))
    assert other.encode("<pad><end>") == [1, 0]


@pytest.mark.parametrize(
    ("texts", "options", "error", "says"),
    [
        (["a"], {"vocab_size": 256}, ConfigError, "257"),
        ([], {"vocab_size": 300}, DataError, "no text"),
        (["", ""], {"vocab_size": 300}, DataError, "no text"),
        ("abc", {"vocab_size": 300}, ConfigError, "list"),
        (["\ud800"], {"vocab_size": 300}, DataError, "UTF-8"),
        (["a"], {"vocab_size": 300, "special_tokens": ()}, ConfigError, "special_tokens"),
    ],
)
def test_training_on_what_cannot_be(texts: Any, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        train_tokenizer(texts, **options)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_text_that_is_not_utf8(folder: Path) -> None:
    tokenizer = zoo.create_tokenizer(folder)
    with pytest.raises(DataError, match=r"byte 2 is 0xfc"):
        tokenizer.encode("Früh".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        tokenizer.encode("a\udcfc")
    with pytest.raises(DataError, match="not int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_numbers_that_are_no_tokens(folder: Path) -> None:
    tokenizer = zoo.create_tokenizer(folder)
    hello = tokenizer.encode("hello")
    assert tokenizer.decode([*hello, 10**6]) == "hello"
    with pytest.raises(ConfigError, match="-1"):
        tokenizer.decode([*hello, -1])
    with pytest.raises(ConfigError, match="one text"):
        tokenizer.decode([[1, 2]])  # type: ignore[list-item]


def test_a_tokenizer_that_does_not_fit(folders: dict[str, Path]) -> None:
    model = small()
    check_fits(zoo.create_tokenizer("bytes"), model)
    with pytest.raises(ConfigError, match="320 tokens and the model 257"):
        check_fits(zoo.create_tokenizer(folders["json"]), model)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.json": b""}, "empty"),
        ({"tokenizer.json": b"{"}, "damaged"),
        ({"tokenizer.json": b'{"model": {}}'}, "damaged"),
        ({"tokenizer.json": b"version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
        ({"tokenizer.model": b"not a model"}, "damaged"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"{"}, "not valid JSON"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"[]"}, "no JSON object"),
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"bos_token": "<none>"}'}, "no token '<none>'"),
    ],
)
def test_damaged_files(folders: dict[str, Path], tmp_path: Path, files: dict[str, bytes | None], says: str) -> None:
    for name, body in files.items():
        (tmp_path / name).write_bytes((folders["json"] / name).read_bytes() if body is None else body)
    with pytest.raises(CheckpointError, match=says):
        zoo.create_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("byte", UnknownModelError, "Did you mean bytes"),
        ("mobilelm_125m", UnknownModelError, "Did you mean mobilellm_125m"),
        ("poolformer_s12", ConfigError, "made for vision"),
        ("mobilellm_ls_600m", ConfigError, "No tokenizer was published"),
        ("nowhere/tokenizer.json", CheckpointError, "There is no tokenizer"),
        ("owner/name", CheckpointError, "hf-hub:owner/name"),
        (3, ConfigError, "not by int"),
    ],
)
def test_names_that_mean_nothing(name: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        zoo.create_tokenizer(name)


def test_files_and_runs_are_found(folders: dict[str, Path], tmp_path: Path) -> None:
    zoo.create_tokenizer(folders["json"]).save(tmp_path / "run" / "last")
    (tmp_path / "run" / "last" / "model.safetensors").write_bytes(b"weights")
    names = ("run", "run/last", "run/last/tokenizer.json", "run/last/model.safetensors")
    sources: list[str | Path] = [*(tmp_path / name for name in names), f"local-dir:{tmp_path}/run"]
    for source in sources:
        assert zoo.create_tokenizer(source).vocab_size == 320
    zoo.create_tokenizer("bytes").save(tmp_path / "run" / "best")
    assert zoo.create_tokenizer(tmp_path / "run").vocab_size == 257
    (tmp_path / "mine.json").write_bytes((folders["json"] / "tokenizer.json").read_bytes())
    assert zoo.create_tokenizer(tmp_path / "mine.json").vocab_size == 320


def test_saving_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        zoo.create_tokenizer("bytes").save(tmp_path / "file")
    written = [path.name for path in zoo.create_tokenizer("bytes").save(tmp_path / "new" / "folder")]
    assert sorted(written) == sorted(os.listdir(tmp_path / "new" / "folder"))


# -------------------------------------------------------------------------------------------------------------- the Hub

HUB = """
import json, sys
import zoo
from zoo.errors import ZooError
for name, options in json.load(sys.stdin):
    try:
        t = zoo.create_tokenizer(name, **options)
        print(json.dumps([t.vocab_size, t.encode("the fox"), t.chat_template]))
    except ZooError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_tokenizers_of_the_hub(folders: dict[str, Path], tmp_path: Path) -> None:
    """Fetched once; what a repository lacks is not asked for again; gated ones say so."""
    cases: list[list[Any]] = [
        ["hf-hub:me/json", {}],
        ["hf-hub:me/sentencepiece", {}],
        ["hf-hub:me/gated", {}],
        ["hf-hub:me/gated", {"token": "hf_member"}],
        ["mobilellm_125m", {"token": "hf_member"}],
        ["hf-hub:me/none", {}],
    ]
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)

    def ask(cases: list[list[Any]], **more: str) -> list[Any]:
        run = python("-c", HUB, input=json.dumps(cases), env={**env, **more})
        assert run.returncode == 0, run.stderr
        return [json.loads(line) for line in run.stdout.splitlines()]

    with Hub() as hub:
        env["HF_ENDPOINT"] = hub.url
        content = {kind: {path.name: path.read_bytes() for path in folders[kind].iterdir()} for kind in KINDS}
        hub.repo("me/json", {**content["json"], "chat_template.jinja": b"hello"})
        hub.repo("me/sentencepiece", content["sentencepiece"])
        hub.repo("me/gated", content["json"], gated=True)
        hub.repo("facebook/MobileLLM-125M", content["sentencepiece"], gated=True)
        hub.repo("me/none", {"README.md": b"nothing"})
        *found, again, and_again = ask([*cases, cases[0], cases[4]])
        for repo in ("me/json", "facebook/MobileLLM-125M"):
            asked = [request[:2] for request in hub.requests if repo in request[1]]
            assert asked
            assert len(asked) == len(set(asked))
        offline = ask([cases[0], ["hf-hub:me/other", {}]], HF_HUB_OFFLINE="1")
    the_json = zoo.create_tokenizer(folders["json"])
    piece = zoo.create_tokenizer(folders["sentencepiece"])
    assert found[0] == [320, the_json.encode("the fox"), "hello"] == again == offline[0]
    assert found[1] == found[4] == and_again == [340, piece.encode("the fox"), None]
    assert found[2][0] == "DownloadError" == DownloadError.__name__
    assert "gated" in found[2][1]
    assert found[3] == [320, the_json.encode("the fox"), None]
    assert found[5][0] == offline[1][0] == "DownloadError"
    assert "tokenizer.json or tokenizer.model" in found[5][1]
    assert offline[1][1].endswith(", or name a folder or file of your own.")


def test_a_tokenizer_says_what_it_is() -> None:
    assert repr(zoo.create_tokenizer("bytes")) == "ByteTokenizer('bytes', vocab_size=257)"
    with pytest.raises(TypeError):
        Tokenizer()  # type: ignore[abstract]
