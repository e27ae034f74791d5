"""Exports: what transformers, llama.cpp and ONNX Runtime make of them is the model; and folders are whole or not there.

What needs llama-cpp-python is skipped without it; the files are read with the package gguf in any case.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from tests.language import small
from zoo import cli
from zoo.data.tokenizers import Tokenizer, create_tokenizer, train_tokenizer
from zoo.errors import CheckpointError, ConfigError
from zoo.exporting import checked
from zoo.exporting.checked import check_input
from zoo.exporting.gguf import gguf_architecture, rounded, write_gguf
from zoo.exporting.onnx import image_size
from zoo.exporting.transformers import decoder_args, is_stock, transformers_config
from zoo.layers.decoder import DecoderConfig
from zoo.registry import get_entry, list_models

LATENT = {"num_kv_heads": None, "q_rank": 24, "kv_rank": 32, "nope_head_dim": 32, "rope_head_dim": 8, "v_head_dim": 32}
FORMS: dict[str, dict[str, Any]] = {
    "mobilellm_125m": {},
    "mobilellm_ls_125m": {"layer_map": (0, 0, 1, 1)},
    "smollm_135m": {"tie_embeddings": False},
    "mobilellm_r1_140m": {},
    "mobilellm_pro": {"sliding_window": 16, "global_layers": (0,)},
    "youtu_llm_2b": LATENT,
}
TEXT = topics.topics["identifiers"][:1500] + " Grüße, 世界! 1234 567  \n\n\tdef f(x): I'll it's 😀   end"


def make(name: str, **args: Any) -> Any:
    """A small decoder whose every weight matters."""
    torch.manual_seed(0)
    model = small(name, **{"depth": 2, **FORMS[name], **args})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.2)
    return model


def tokens_of(length: int = 24) -> torch.Tensor:
    return torch.randint(257, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(list(topics.topics.values())[:20], 500)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece's byte-pair encoding, with the settings of Llama's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    train_pieces(sentencepiece, folder)
    return create_tokenizer(folder)


def train_pieces(sentencepiece: Any, folder: Path, **options: Any) -> None:
    lines = [line for text in list(topics.topics.values())[:20] for line in text.splitlines() if line.strip()]
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        minloglevel=2,
        **{**settings, **options},
    )


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", FORMS)
def test_transformers_opens_it_and_computes_the_same(name: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = make(name)
    done = zoo.export(model, tmp_path / "out", to="transformers", tokenizer="bytes")
    assert done.max_error is not None
    assert done.max_error < 1e-5
    assert "transformers" in done.check
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = tokens_of()
    with torch.no_grad():
        ours, answer = model(tokens), theirs(tokens).logits
    assert ((answer - ours).abs().max() / ours.abs().max()).item() < 1e-5
    written = theirs.generate(tokens[:, :8], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(written[:, 8:], zoo.generate(model, tokens[:, :8], max_new_tokens=12))
    assert theirs.generation_config.eos_token_id == 256
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("é").input_ids == [256, 195, 169]
    again: Any = zoo.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.no_grad():
        assert ((again(tokens) - ours).abs().max() / ours.abs().max()).item() < 1e-5
    assert create_tokenizer(tmp_path / "out").encode("é") == [195, 169]


@pytest.mark.parametrize("name", ["mobilellm_125m", "mobilellm_ls_125m", "mobilellm_pro", "youtu_llm_2b"])
def test_layers_of_different_width_are_filled_up_with_zeros(name: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = make(name, hidden_dim=(24, 64))
    assert not is_stock(model.config)
    assert "model_type" not in json.loads((zoo.save_pretrained(model, tmp_path / "own") / "config.json").read_text())
    done = zoo.export(model, tmp_path / "out", to="transformers")
    assert done.max_error is not None
    assert done.max_error < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.intermediate_size == 64
    tokens = tokens_of()
    with torch.no_grad():
        ours, answer = model(tokens), theirs(tokens).logits
    assert ((answer - ours).abs().max() / ours.abs().max()).item() < 1e-5
    assert model.config.hidden_dim == (24, 64)


def test_what_shares_layers_takes_its_unrolled_weights_back_if_they_are_still_the_same(tmp_path: Path):
    import safetensors.torch

    model = make("mobilellm_ls_125m")
    zoo.export(model, tmp_path / "out", to="transformers")
    again = small("mobilellm_ls_125m", depth=2, layer_map=(0, 0, 1, 1))
    zoo.load_checkpoint(again, tmp_path / "out")
    assert torch.equal(again(tokens_of()), model(tokens_of()))
    path = tmp_path / "out" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match="other weights for each time that a layer runs"):
        zoo.load_checkpoint(again, tmp_path / "out")


def test_what_was_written_with_another_pairing_goes_back_into_its_own_model(tmp_path: Path):
    model = make("mobilellm_pro")
    zoo.export(model, tmp_path / "out", to="transformers")  # as Qwen3, which pairs by halves, with norms of weights
    again = make("mobilellm_pro")
    for parameter in again.parameters():
        parameter.data.zero_()
    zoo.load_checkpoint(again, tmp_path / "out")
    assert torch.equal(again(tokens_of()), model(tokens_of()))


def test_a_model_that_transformers_trained_opens_here(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=64, rope_theta=5e4, rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = zoo.create_model(f"local-dir:{tmp_path / 'theirs'}").eval()
    assert not ours.config.tie_embeddings
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    with torch.no_grad():
        error = (ours(tokens_of()) - theirs(tokens_of()).logits).abs().max()
    assert error.item() < 1e-5
    zoo.save_pretrained(ours, tmp_path / "ours")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.num_key_value_heads == 1


def more_tokens(theirs: Any) -> None:
    theirs.resize_token_embeddings(300)


def other_rotation(theirs: Any) -> None:
    theirs.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}


def fewer_layers(theirs: Any) -> None:
    theirs.config.num_hidden_layers = 1
    theirs.model.layers = theirs.model.layers[:1]


def other_norms_and_context(theirs: Any) -> None:
    theirs.config.rms_norm_eps, theirs.config.max_position_embeddings = 1e-3, 64


@pytest.mark.parametrize("change", [more_tokens, other_rotation, fewer_layers, other_norms_and_context])
@torch.no_grad()
def test_what_transformers_changed_in_a_saved_model_is_read(change: Any, tmp_path: Path):
    """The description that was written first is still beside what transformers wrote."""
    transformers = pytest.importorskip("transformers")
    model = make("smollm_135m", init_std=0.5, layer_map=[0, 1])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(zoo.save_pretrained(model, tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "same")
    same: Any = zoo.create_model(f"local-dir:{tmp_path / 'same'}")
    assert (same.config, same.pretrained_cfg["architecture"]) == (model.config, "smollm_135m")
    change(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()(tokens_of()).logits
    ours: Any = zoo.create_model(f"local-dir:{tmp_path / 'theirs'}").eval()
    assert (ours(tokens_of()) - wanted).abs().max() < 1e-4
    assert ours.config.context_length == theirs.config.max_position_embeddings
    assert ours.pretrained_cfg["architecture"] == "smollm_135m"


@pytest.mark.parametrize("name", list_models(task="language"))
def test_every_entry_goes_to_transformers_and_back(name: str):
    config = DecoderConfig(**get_entry(name).args)
    written = transformers_config(config, dtype=torch.bfloat16)
    found = decoder_args(json.loads(json.dumps(written)), "it")
    assert found is not None
    again = DecoderConfig(**{**get_entry(found[0]).args, **found[1]})
    for field in (
        *("vocab_size", "dim", "num_heads", "kv_heads", "hidden_dim", "context_length", "norm_eps", "rope_theta"),
        *("qk_norm", "sliding_window", "q_rank", "kv_rank", "tie_embeddings", "head_dim"),
    ):
        assert getattr(again, field) == getattr(config, field), field
    assert again.depth == len(config.executed)
    assert [again.window(i) for i in range(again.depth)] == [config.window(i) for i in range(again.depth)]
    if is_stock(config):
        assert found == (name.removesuffix("_base") if name.startswith("youtu") else name, {})
    if name == "mobilellm_pro":
        with pytest.raises(ConfigError, match="windows of 512 tokens"):
            gguf_architecture(config)
    else:
        gguf_architecture(config)


def test_published_configurations_are_understood():
    published = {
        "model_type": "mobilellm", "vocab_size": 32000, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "share_embedding": True,
        "tie_word_embeddings": False,
    }  # fmt: skip
    assert decoder_args(published, "it") == ("mobilellm_125m", {})
    assert decoder_args({**published, "layer_sharing": True}, "it") == ("mobilellm_ls_125m", {})
    llama = {**published, "model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}
    assert decoder_args(llama, "it") == ("smollm_135m", {})
    assert decoder_args({"model_type": "gpt2"}, "it") is None
    for wrong, what in (
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled rotary positions"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 1}, "mixture of experts"),
        ({"model_type": "llama4_text", "moe_layers": []}, "without rotary positions"),
    ):
        with pytest.raises(CheckpointError, match=what):
            decoder_args({**llama, **wrong}, "it")


def test_a_folder_of_an_unknown_model_says_so(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    with pytest.raises(CheckpointError, match="'gpt2' model, which the zoo does not have"):
        zoo.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    with pytest.raises(CheckpointError, match="it lacks 'num_hidden_layers'"):
        zoo.create_model(f"local-dir:{tmp_path}")


# ---------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", [name for name in FORMS if name != "mobilellm_pro"])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = make(name)
    done = zoo.export(model, tmp_path / "out", to="gguf")
    assert list(done.files) == [f"{name}-f32.gguf"]
    assert done.max_error is not None
    assert done.max_error < 1e-4
    assert done.same_top == 1
    assert done.rounding_error == 0
    coarse = zoo.export(model, tmp_path / "coarse", to="gguf", dtype="q8_0")
    assert coarse.max_error is not None
    assert coarse.rounding_error is not None
    assert coarse.max_error < 0.1  # llama.cpp rounds activations to 8 bits, too
    assert 1e-3 < coarse.rounding_error < 0.2
    prompt = tokens_of()[0].tolist()
    ours = zoo.generate(model, prompt, max_new_tokens=24)
    assert zoo.generate(model, prompt, max_new_tokens=24, engine="llama.cpp") == ours


@pytest.mark.parametrize("kind", ["bytes", "bpe", "pieces"])
def test_llama_cpp_cuts_text_and_writes_as_the_zoo_does(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer = create_tokenizer("bytes") if kind == "bytes" else request.getfixturevalue(kind)
    model = make("mobilellm_125m", vocab_size=tokenizer.vocab_size + 3)
    path = write_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    theirs = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False, type_k=0, type_v=0)
    special = kind != "bytes"  # whose end of text is text within one
    for text in (TEXT, "hello", " two  spaces ", "", "a</s>b<|endoftext|>c"):
        assert theirs.tokenize(text.encode(), add_bos=False, special=special) == tokenizer.encode(text), text
    assert theirs.token_bos() == tokenizer.bos_id
    assert theirs.token_eos() == tokenizer.eos_id
    written = theirs.create_completion("The name", max_tokens=24, temperature=0)["choices"][0]["text"]
    ours = zoo.generate(model, "The name", tokenizer=tokenizer, max_new_tokens=24)
    assert written == ours.replace("\ufffd", "")  # what is no UTF-8 the package leaves out
    theirs.close()


def test_a_sentencepiece_model_as_tokenizer_json_is_cut_alike(pieces: Tokenizer, tmp_path: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    transformers = pytest.importorskip("transformers")
    pieces.save(tmp_path / "slow")
    transformers.LlamaTokenizer.from_pretrained(tmp_path / "slow").save_pretrained(tmp_path / "json")
    tokenizer = create_tokenizer(tmp_path / "json" / "tokenizer.json")
    model = make("mobilellm_125m", vocab_size=tokenizer.vocab_size)
    path = write_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    theirs = llama_cpp.Llama(str(path), n_ctx=32, n_threads=1, verbose=False)
    assert theirs.tokenize(TEXT.encode(), add_bos=False, special=True) == tokenizer.encode(TEXT)
    theirs.close()


@pytest.mark.parametrize(
    ("dtype", "error"), [("f32", 0), ("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 1 / 254 + 5e-4), ("q4_0", 1 / 8)]
)
def test_the_file_holds_the_weights(dtype: str, error: float, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    model = make("smollm_135m")
    path = write_gguf(model, tmp_path / "model.gguf", dtype=dtype)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layer = model.model.layers[1]
    for name, weight in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("output.weight", model.lm_head.weight),
        ("blk.1.ffn_down.weight", layer.mlp.down_proj.weight),
        ("blk.1.attn_v.weight", layer.self_attn.v_proj.weight),
    ):
        read = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        wanted = weight.detach().numpy()
        blocks = np.abs(wanted.reshape(-1, 32)).max(1).repeat(32).reshape(wanted.shape)
        assert np.all(np.abs(read - wanted) <= error * 1.01 * blocks), name
        assert tensors[name].tensor_type.name == dtype.upper()
    norm = tensors["blk.1.attn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    assert np.array_equal(norm.data, layer.input_layernorm.weight.detach().numpy())
    assert reader.get_field("llama.context_length").contents() == 128
    # rows of the other pairing: the first pair of head 0 is what were rows 0 and width / 2
    query = gguf.quants.dequantize(tensors["blk.1.attn_q.weight"].data, tensors["blk.1.attn_q.weight"].tensor_type)
    assert np.abs(query[1] - layer.self_attn.q_proj.weight.detach().numpy()[4]).max() <= max(error, 1e-6)


def test_layers_of_different_width_are_as_wide_as_the_widest_in_a_file(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    model = make("mobilellm_125m", hidden_dim=(24, 64))
    reader = gguf.GGUFReader(write_gguf(model, tmp_path / "model.gguf"))
    assert reader.get_field("llama.feed_forward_length").contents() == 64
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, linear in (("up", "up_proj"), ("gate", "gate_proj")):
        weight = getattr(model.model.layers[0].mlp, linear).weight.detach().numpy()
        written = tensors[f"blk.0.ffn_{name}.weight"].astype(np.float32)
        assert np.abs(written[:24] - weight).max() < 1e-3
        assert not written[24:].any()
    assert not tensors["blk.0.ffn_down.weight"][:, 24:].any()


@pytest.mark.parametrize("widths", [40, (24, 39)])
def test_hidden_channels_fill_whole_blocks(widths: Any, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    model = make("mobilellm_125m", hidden_dim=widths)
    reader = gguf.GGUFReader(write_gguf(model, tmp_path / "model.gguf", dtype="q8_0"))
    assert reader.get_field("llama.feed_forward_length").contents() == 64
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for i, width in enumerate(model.config.hidden_dims):
        down = tensors[f"blk.{i}.ffn_down.weight"]
        assert down.tensor_type.name == "Q8_0"
        weight = model.model.layers[i].mlp.down_proj.weight.detach().numpy()
        written = gguf.quants.dequantize(down.data, down.tensor_type)
        assert np.abs(written[:, :width] - weight).max() <= 0.01 * np.abs(weight).max()
        assert not written[:, width:].any()
    tokens = torch.randint(257, (1, 12))
    with torch.no_grad():
        found, expected = rounded(model, "q8_0")(tokens), model(tokens)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_matrix_whose_rows_have_no_blocks_stays_in_16_bits(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    path = write_gguf(make("mobilellm_125m", dim=40), tmp_path / "model.gguf", dtype="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_tokenizers_that_llama_cpp_does_not_have_are_errors(bpe: Tokenizer, pieces: Tokenizer, tmp_path: Path):
    pytest.importorskip("gguf")
    sentencepiece = pytest.importorskip("sentencepiece")
    model = make("mobilellm_125m", vocab_size=600)
    bpe.save(tmp_path / "bpe")
    path = tmp_path / "bpe" / "tokenizer.json"
    spec = json.loads(path.read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    for change, what in (
        ({"normalizer": {"type": "Lowercase"}}, "normalises text first"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}, "has no name for"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "'WhitespaceSplit'"),
    ):
        path.write_text(json.dumps({**spec, **change}))
        with pytest.raises(ConfigError, match=what):
            write_gguf(model, tmp_path / "model.gguf", tokenizer=create_tokenizer(tmp_path / "bpe"))
    train_pieces(sentencepiece, tmp_path, model_type="unigram")
    with pytest.raises(ConfigError, match="unigram"):
        write_gguf(model, tmp_path / "model.gguf", tokenizer=create_tokenizer(tmp_path / "tokenizer.model"))
    with pytest.raises(ConfigError, match="another model's tokenizer"):
        write_gguf(make("mobilellm_125m"), tmp_path / "model.gguf", tokenizer=pieces)
    assert not (tmp_path / "model.gguf").exists()


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx") / "out"
    done = zoo.export(make("mobilellm_125m", depth=1, sliding_window=16), folder, to="onnx", tokenizer="bytes")
    assert done.max_error is not None
    assert done.max_error < 1e-5
    assert set(done.files) >= {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"}
    return folder


def test_onnx_runtime_goes_on_from_any_past_with_padding_and_without(onnx_folder: Path):
    import onnxruntime

    from zoo.exporting.onnx import decoder_feeds, empty_past

    model = make("mobilellm_125m", depth=1, sliding_window=16)
    session = onnxruntime.InferenceSession(str(onnx_folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokens = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(tokens).numpy()
    past, found, start = empty_past(model, 3), [], 0
    for count in (17, 1, 4, 1, 17):
        logits, *past = session.run(None, decoder_feeds(tokens[:, start : start + count].numpy(), past))
        found.append(logits)
        start += count
    assert np.abs(np.concatenate(found, 1) - wanted).max() < 1e-5 * np.abs(wanted).max()
    feeds = decoder_feeds(tokens[:1, :12].numpy(), empty_past(model, 1))
    feeds["attention_mask"][:, :5] = 0
    feeds["position_ids"] = np.maximum(feeds["position_ids"] - 5, 0)
    padded = session.run(None, feeds)[0][:, 5:]
    with torch.no_grad():
        alone = model(tokens[:1, 5:12]).numpy()
    assert np.abs(padded - alone).max() < 1e-5 * np.abs(wanted).max()


def test_a_vision_model_goes_to_onnx(tmp_path: Path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    args: dict[str, Any] = {"depths": (1, 1), "dims": (8, 16), "num_classes": 5}
    model = zoo.create_model("poolformer_s12", pretrained=False, **args)
    done = zoo.export(model, tmp_path / "out", to="onnx")
    assert done.max_error is not None
    assert done.max_error < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        wanted = model.eval()(images).numpy()
    assert np.abs(session.run(None, {"pixel_values": images.numpy()})[0] - wanted).max() < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "poolformer_s12"
    assert config["pretrained_cfg"]["mean"]


def test_a_graph_takes_images_as_the_model_does(tmp_path: Path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model = zoo.create_model("simplenet_test", in_chans=1, global_pool="avg")  # torch 2.11 has no maximum of a map
    zoo.export(model, tmp_path / "out", to="onnx", input_size=(1, 64, 96))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 64, 96]
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [side.dim_value for side in graph.input[0].type.tensor_type.shape.dim][1:] == [1, 64, 96]
    assert image_size(zoo.create_model("simplenet_test", in_chans=1)) == (1, 64, 64)
    assert image_size(zoo.create_model("sret_test", img_size=96)) == (3, 96, 96)
    stitched = zoo.create_model("snnet_test", in_chans=2, device="meta")  # which has no in_chans of its own
    assert image_size(stitched) == (2, 64, 64)


def test_why_torch_cannot_export_a_model_is_said_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("onnxscript")

    class Fickle(torch.nn.Module):
        def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model: Any = zoo.create_model("simplenet_test")
    model.head = Fickle()
    with pytest.raises(ConfigError, match="to ONNX: Could not guard on data-dependent"):
        zoo.export(model, tmp_path / "out", to="onnx")
    assert not capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_defaults_of_torch_change_nothing(tmp_path: Path):
    pytest.importorskip("onnxscript")
    model = zoo.create_model("simplenet_test", global_pool="avg")  # torch 2.11 has no maximum of a map
    torch.set_default_dtype(torch.float64)
    try:
        zoo.export(model, tmp_path / "out", to="onnx")
        with torch.device("meta"):
            assert check_input(model).device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)


def test_sizes_that_cannot_be_are_errors(tmp_path: Path):
    fixed = zoo.create_model("poolformer_s12", depths=(1,), dims=(8,), token_mixers="random")
    for size, what in (
        ((3, 64, 64), "MetaFormer cannot run on images of 3x64x64: .* hold for one input size"),
        ((1, 64, 64), "takes images of 3 channels, not 1"),
        ((64, 64), r"input_size is \(channels, height, width\)"),
    ):
        with pytest.raises(ConfigError, match=what):
            zoo.export(fixed, tmp_path / "out", to="onnx", input_size=size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes tokens"):
        zoo.export(make("mobilellm_125m"), tmp_path / "out", to="onnx", input_size=(3, 64, 64))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilellm_ls_125m", "mobilellm_pro", "youtu_llm_2b"])
def test_onnx_runtime_computes_the_same(name: str, tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = zoo.export(make(name), tmp_path / "out", to="onnx")
    assert done.max_error is not None
    assert done.max_error < 1e-5
    assert "onnxruntime" in done.check


# ----------------------------------------------------------------------------------------------------------- the folder


def test_each_part_of_the_model_keeps_its_mode(tmp_path: Path):
    pytest.importorskip("gguf")
    model = make("mobilellm_125m").train()
    model.model.layers[0].eval()
    zoo.export(model, tmp_path / "out", to="gguf")
    assert model.training
    assert model.model.layers[1].training
    assert not any(module.training for module in model.model.layers[0].modules())


def test_a_folder_that_is_not_empty_is_left_alone_and_nothing_else_in_it_is_lost(tmp_path: Path):
    pytest.importorskip("gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        zoo.export(make("mobilellm_125m"), folder, to="gguf")
    done = zoo.export(make("mobilellm_125m"), folder, to="gguf", dtype=torch.bfloat16, overwrite=True)
    assert set(done.files) == {"notes.txt", "mobilellm_125m-bf16.gguf"}
    assert (folder / "notes.txt").read_text() == "mine"
    zoo.export(make("mobilellm_125m"), folder, to="gguf", dtype="q8_0", overwrite=True)
    assert (folder / "mobilellm_125m-bf16.gguf").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_current_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    zoo.export(make("mobilellm_125m"), ".", to="gguf")
    zoo.save_pretrained(make("mobilellm_125m"), ".", overwrite=True)
    assert sorted(path.name for path in Path.cwd().iterdir()) == [
        *("config.json", "mobilellm_125m-f32.gguf", "model.safetensors")
    ]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"to": "gguff"}, "Did you mean gguf"),
        ({"to": "gguf", "dtype": "q8"}, "Did you mean q8_0"),
        ({"to": "transformers", "dtype": "q8_0"}, "It has f32, f16, bf16"),
        ({"to": "gguf", "folder": "nowhere/out"}, "there is no folder"),
    ],
)
def test_what_cannot_be_is_an_error_and_leaves_nothing(options: dict[str, Any], what: str, tmp_path: Path):
    folder = tmp_path / options.pop("folder", "out")
    with pytest.raises(ConfigError, match=what):
        zoo.export(make("mobilellm_125m"), folder, **options)
    assert not list(tmp_path.iterdir())


def test_models_that_a_format_has_no_place_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="windows of 16 tokens"):
        zoo.export(make("mobilellm_pro"), tmp_path / "out", to="gguf")
    vision = zoo.create_model("poolformer_s12", pretrained=False, depths=(1,), dims=(8,))
    with pytest.raises(ConfigError, match="for language models"):
        zoo.export(vision, tmp_path / "out", to="gguf")
    with pytest.raises(ConfigError, match="none"):
        zoo.export(vision, tmp_path / "out", to="onnx", tokenizer="bytes")
    with pytest.raises(ConfigError, match="the model that it was made from"):
        zoo.export(zoo.optimize_for_inference(make("mobilellm_125m")), tmp_path / "out", to="transformers")
    with pytest.raises(ConfigError, match="meta device"):
        zoo.export(zoo.create_model("mobilellm_125m", device="meta"), tmp_path / "out", to="transformers")
    for model, what in (
        (zoo.optimize_for_inference(zoo.create_model("simplenet_test")), "^An export to onnx .* that it was made from"),
        (zoo.create_model("simplenet_test", features_only=True), "^An export to onnx .* leave out features_only=True"),
        (torch.nn.Linear(2, 2), "^An export to onnx takes a whole model as create_model makes it, not Linear"),
        (zoo.create_model("simplenet_test", device="meta"), "^An export to onnx needs weights"),
    ):
        monkeypatch.setattr(checked, "write_onnx", lambda *_, **__: pytest.fail("the work must not begin"))
        with pytest.raises(ConfigError, match=what):
            zoo.export(model, tmp_path / "out", to="onnx")
    with pytest.raises(ConfigError, match="not str"):
        zoo.export("simplenet_test", tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1e-6 built into norms"):
        zoo.export(make("youtu_llm_2b", norm_eps=1e-5), tmp_path / "out", to="transformers")
    assert not list(tmp_path.iterdir())


class Adapted(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("to", ["transformers", "gguf"])
def test_what_weights_alone_do_not_say_is_not_left_out(to: Any, tmp_path: Path):
    pytest.importorskip(to)
    adapted, hooked, patched = (make("mobilellm_125m") for _ in range(3))
    adapted.model.layers[1].mlp.up_proj.__class__ = Adapted
    hooked.model.norm.register_forward_hook(lambda module, inputs, output: output + 1)
    patched.model.norm.forward = torch.neg
    for model, what in (
        (adapted, r"model\.layers\.1\.mlp\.up_proj \(Adapted\) has .* a forward of its own: first merge"),
        (hooked, r"model\.norm \(RMSNorm\) has hooks"),
        (patched, r"model\.norm \(RMSNorm\) has .* a forward of its own"),
    ):
        with pytest.raises(ConfigError, match=what):
            zoo.export(model, tmp_path / "out", to=to, dtype="f16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["transformers", "gguf"])
def test_a_model_that_its_config_does_not_build_is_not_written(to: Any, tmp_path: Path):
    pytest.importorskip(to)
    cut, biased = make("mobilellm_125m"), make("mobilellm_125m")
    cut.model.layers = cut.model.layers[:1]
    projection = biased.model.layers[1].self_attn.o_proj
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features))
    for model, what in ((cut, r"model\.layers\.1\."), (biased, r"model\.layers\.1\.self_attn\.o_proj\.bias")):
        with pytest.raises(ConfigError, match=rf"as its config builds it, and {what}.* is another or missing"):
            zoo.export(model, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_what_another_program_computes_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")

    def damaged(model: Any, folder: Path, **options: Any) -> None:
        other = make("mobilellm_125m")
        other.model.norm.weight.data[0] += 1
        written(other, folder, **options)

    written = checked.write_transformers
    monkeypatch.setattr(checked, "write_transformers", damaged)
    with pytest.raises(CheckpointError, match="gives other logits"):
        zoo.export(make("mobilellm_125m"), tmp_path / "out", to="transformers")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("gguf")
    zoo.save_pretrained(make("mobilellm_125m"), tmp_path / "model", tokenizer=create_tokenizer("bytes"))
    to_gguf = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "gguf"]
    assert cli.main([*to_gguf, "--dtype", "f16"]) == 0
    said = capsys.readouterr()
    assert "mobilellm_125m-f16.gguf" in said.out
    assert "Checked with llama-cpp-python" in said.out or "Not checked" in said.out
    assert not said.err
    assert cli.main(to_gguf) == 1
    assert "not empty" in capsys.readouterr().err
    assert cli.main([*to_gguf, "--overwrite", "--input-size", "3", "64", "64"]) == 1
    assert "takes tokens" in capsys.readouterr().err
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert cli.main([*to_gguf, "--overwrite"]) == 0
    assert "no tokenizer beside the weights" in capsys.readouterr().err
    assert cli.main([*to_gguf, "--overwrite", "--tokenizer", "none"]) == 0
    assert not capsys.readouterr().err
