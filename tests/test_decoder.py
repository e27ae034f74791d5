"""The decoder of language models, its memory and its loss, on models of a few thousand weights."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zoo
from tests.language import small
from zoo.errors import CheckpointError, ConfigError
from zoo.layers import token_loss
from zoo.layers.decoder import DecoderConfig
from zoo.layers.token_loss import mean_token_loss, token_losses

LATENT = {
    "name": "youtu_llm_2b",
    "num_kv_heads": None,
    "q_rank": 12,
    "kv_rank": 16,
    "nope_head_dim": 8,
    "rope_head_dim": 4,
    "v_head_dim": 6,
}
FORMS = {
    "grouped": {},
    "shared": {"layer_map": (0, 0, 2, 1, 1)},
    "window": {"sliding_window": 5, "global_layers": (1,)},
    "all windows": {"sliding_window": 4},
    "llama4": {"name": "mobilellm_r1_140m"},
    "latent": LATENT,
}


def make(form="grouped", **args):
    """A small model in float64, with weights large enough that every token is felt."""
    torch.manual_seed(0)
    return small(**{"init_std": 0.3, "embed_init_std": 1.0, **FORMS[form], **args}).double().requires_grad_(False)


def tokens_of(*shape, vocab_size=257):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))


def assert_close(got, wanted, tolerance=1e-10):
    assert got.shape == wanted.shape
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() < tolerance


def seen_by(model, count, **options):
    """(count, count): whether place i changes when token j does."""
    tokens = tokens_of(1, count)
    plain = model.forward_features(tokens, **options)
    rows = []
    for j in range(count):
        other = tokens.clone()
        other[0, j] = (other[0, j] + 1) % 257
        rows.append((model.forward_features(other, **options) != plain).any(-1)[0])
    return torch.stack(rows, 1)


# ------------------------------------------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("form", ["grouped", "llama4", "latent"])
def test_a_token_sees_itself_and_all_before(form):
    assert torch.equal(seen_by(make(form), 7), torch.ones(7, 7).tril().bool())


@pytest.mark.parametrize("window", [1, 3, 6])
def test_a_window_holds_so_many_tokens_itself_among_them(window):
    distance = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(seen_by(make(depth=1, sliding_window=window), 9), (distance >= 0) & (distance < window))
    assert torch.equal(seen_by(make(depth=2, sliding_window=window, global_layers=(1,)), 9), distance >= 0)


@pytest.mark.parametrize("form", FORMS)
def test_documents_in_one_row_do_not_see_each_other(form):
    model = make(form)
    lengths = (4, 9, 1, 6)
    tokens = tokens_of(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(tokens, positions=positions)
    alone = torch.cat([model(document) for document in tokens.split(lengths, 1)], 1)
    assert_close(packed, alone)


def test_a_row_may_begin_in_the_middle_of_a_document():
    model = make()
    tokens = tokens_of(1, 8)
    moved = model(tokens, positions=torch.tensor([[5, 6, 7, 0, 1, 2, 3, 4]]))
    assert_close(moved[:, :3], model(tokens[:, :3]), 1e-6)  # rotations are relative; their tables are in float32
    assert_close(moved[:, 3:], model(tokens[:, 3:]))


def padded(prompts):
    """Rows of one length, filled up from the left, and their positions."""
    longest = max(map(len, prompts))
    tokens = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    positions = torch.stack([torch.arange(longest) - (longest - len(prompt)) for prompt in prompts]).clamp(min=-1)
    return tokens, positions


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_padded_rows_compute_what_each_would_alone(form, static_shapes):
    model = make(form)
    texts = list(tokens_of(3, 19))
    prompts = [texts[0][:3], texts[1][:11], texts[2][:8]]
    tokens, positions = padded(prompts)
    cache = model.make_cache(3, 19, static_shapes=static_shapes)
    got = [model(tokens, cache=cache, positions=positions)]
    for step in range(8):  # without positions: each row goes on after its own last token
        following = torch.stack([text[len(prompt) + step] for text, prompt in zip(texts, prompts, strict=True)])
        got.append(model(following[:, None], cache=cache))
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        wanted = model(text[None, : len(prompt) + 8])[0, len(prompt) - 1 :]
        assert_close(torch.cat(got, 1)[row], wanted)
    without_cache = model(tokens, positions=positions)
    assert_close(without_cache[0, -3:], model(prompts[0][None])[0])
    assert without_cache.isfinite().all()


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("form", ["grouped", "window"])
def test_tokens_behind_padding_on_the_right(form, static_shapes):
    """Layers with windows keep the last tokens alone, padding or not: what it took the place of is missed later on."""
    model = make(form)
    texts = tokens_of(2, 19)
    positions = torch.stack([torch.arange(12), torch.arange(12).where(torch.arange(12) < 8, -1)])
    cache = model.make_cache(2, 19, static_shapes=static_shapes)
    got = model(texts[:, :12], cache=cache, positions=positions, logits_to_keep=12)
    assert_close(got[1, :8], model(texts[1:, :8])[0])
    if form == "window":
        with pytest.raises(ConfigError, match=r"Padding behind tokens .*: pad on the left"):
            model(texts[:, 12:13], cache=cache)
        cache.reset()
        assert_close(model(texts, cache=cache, logits_to_keep=19), model(texts))
    else:
        alone = torch.cat((texts[1:, :8], texts[1:, 12:13]), 1)
        assert_close(model(texts[:, 12:13], cache=cache)[1], model(alone)[0, -1:])


def continued(model, calls, static_shapes):
    """What a model says of rows whose tokens come in `calls`, lists of positions a row, and of each row alone."""
    rows, total = len(calls[0]), sum(len(call[0]) for call in calls)
    texts = tokens_of(rows, total)
    cache = model.make_cache(rows, total, static_shapes=static_shapes)
    places = [torch.tensor(call) for call in calls]
    got = []
    for place in places:
        tokens = texts.gather(1, place.clamp(min=0))
        got.append(model(tokens, cache=cache, positions=place, logits_to_keep=place.shape[1]))
    whole, real = torch.cat(got, 1), torch.cat(places, 1) >= 0
    return [(whole[i][real[i]], model(texts[i : i + 1, : int(real[i].sum())])[0]) for i in range(rows)]


def places(start, *ends, tokens):
    """Positions of `tokens` columns: each row goes on from `start`, up to an end of its own, then padding."""
    return [[i if i < end else -1 for i in range(start, start + tokens)] for end in ends]


PADDED_BEHIND = {
    "nothing overwritten": (32, [[[*range(8)], [*range(5), -1, -1, -1]], [[*range(8, 12)], [*range(5, 9)]]]),
    "a row that is over": (4, [places(0, 9, 5, tokens=9), places(9, 15, 5, tokens=6), places(15, 19, 5, tokens=4)]),
    "long before the window": (4, [[[*range(14)], [0, 1, -1, -1, *range(2, 12)]], [[14, 15, 16], [12, 13, 14]]]),
    "the last place of the window": (4, [[[*range(3)], [0, 1, -1]], [[3], [2]], [[4], [-1]]]),
}


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("case", PADDED_BEHIND)
def test_padding_that_takes_no_seen_place_is_no_matter(case, static_shapes):
    window, calls = PADDED_BEHIND[case]
    for got, alone in continued(make(sliding_window=window, global_layers=(1,)), calls, static_shapes):
        assert_close(got, alone)


OVERWRITTEN = {
    "single steps of padding": [places(0, 6, 6, tokens=6), [[6], [-1]], [[7], [-1]], [[8], [-1]], [[9, 10], [6, 7]]],
    "a single step of padding": [places(0, 6, 6, tokens=6), [[6], [-1]], [[7], [6]]],
    "a single token behind": [places(0, 5, 3, tokens=5), [[5], [3]]],
    "later": [[[*range(3)], [0, 1, -1]], [[3], [2]], [[4], [3]]],
}


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("case", OVERWRITTEN)
def test_padding_that_took_a_seen_place_is_refused(case, static_shapes):
    model, calls = make(sliding_window=4, global_layers=(1,)), OVERWRITTEN[case]
    continued(model, calls[:-1], static_shapes)
    with pytest.raises(ConfigError, match=r"Padding behind tokens took the place .* keep 4 tokens: pad on the left"):
        continued(model, calls, static_shapes)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize(
    "parts", [(1,) * 23, (9, *(1,) * 14), (3, 1, 8, 1, 1, 7, 2), (23,), (4, 4, 4, 4, 4, 3)], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_memory_changes_nothing(form, parts, static_shapes):
    """Windows of 4 and 5 are shorter than prompts, and the ring goes round several times."""
    model = make(form)
    tokens = tokens_of(2, 23)
    cache = model.make_cache(2, 23, static_shapes=static_shapes)
    got = torch.cat([model(part, cache=cache, logits_to_keep=23) for part in tokens.split(parts, 1)], 1)
    assert_close(got, model(tokens))
    assert cache.length == 23
    assert cache.index is None or cache.index.item() == 23


def test_a_window_remembers_no_more_than_it_sees():
    model = make("window")
    assert model.make_cache(np.int64(2), np.int32(100)).nbytes == model.make_cache(2, 100).nbytes
    cache = model.make_cache(2, 100)
    assert [layer.tensors[0].shape for layer in cache.layers] == [(2, 2, 5, 8), (2, 2, 100, 8), (2, 2, 5, 8)]
    assert cache.nbytes == 2 * 8 * model.config.kv_elements(100)
    assert model.config.kv_elements(100) == (5 + 100 + 5) * 2 * 2 * 8
    assert model.config.kv_elements(3) == 3 * model.config.kv_elements_per_token


def test_latent_memory_is_one_narrow_vector_a_token():
    model = make("latent")
    cache = model.make_cache(1, 10)
    assert [tensor.shape for tensor in cache.layers[0].tensors] == [(1, 1, 10, 16), (1, 1, 10, 4)]
    assert model.config.kv_elements_per_token == 3 * (16 + 4)


def test_only_the_last_logits_are_made_with_a_memory():
    model = make()
    tokens = tokens_of(1, 6)
    assert model(tokens, cache=model.make_cache(1, 6)).shape == (1, 1, 257)
    assert model(tokens, logits_to_keep=2).shape == (1, 2, 257)
    assert_close(model(tokens, logits_to_keep=2), model(tokens)[:, -2:])


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("form", ["grouped", "window", "latent"])
def test_a_memory_is_as_new_after_reset(form, static_shapes):
    model = make(form)
    cache = model.make_cache(2, 20, static_shapes=static_shapes)
    places = padded(list(tokens_of(2, 12).unbind(0)))[1]
    model(tokens_of(2, 12), cache=cache, positions=places - 2)
    storage = cache.layers[0].tensors[0].data_ptr()
    cache.reset()
    tokens = tokens_of(2, 20).flip(1)
    got = torch.cat([model(part, cache=cache, logits_to_keep=20) for part in tokens.split((9, *(1,) * 11), 1)], 1)
    assert_close(got, model(tokens))
    assert cache.layers[0].tensors[0].data_ptr() == storage


def test_memory_in_another_precision_than_the_model():
    model = make().to(torch.bfloat16)
    tokens = tokens_of(1, 12)
    wanted = model(tokens).double()
    for dtype in (None, torch.float32, torch.bfloat16):
        cache = model.make_cache(1, 12, dtype=dtype)
        assert cache.layers[0].tensors[0].dtype == (dtype or torch.bfloat16)
        got = torch.cat([model(part, cache=cache) for part in tokens.split(1, 1)], 1)
        assert got.dtype == torch.bfloat16
        assert_close(got.double(), wanted, 0.05)
    exact = make()
    cache = exact.make_cache(1, 12, dtype=torch.float16)
    got = torch.cat([exact(part, cache=cache) for part in tokens.split(1, 1)], 1)
    assert got.dtype == torch.float64
    assert_close(got, exact(tokens), 0.02)


def test_memory_keeps_no_graph():
    model = small()
    cache = model.make_cache(1, 4)
    model(tokens_of(1, 2), cache=cache)  # gradients are on
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors)


@pytest.mark.parametrize("form", ["window", "latent"])
def test_a_step_compiles_to_one_graph_for_all_places(form):
    model = make(form)
    tokens = tokens_of(1, 25)
    cache = model.make_cache(1, 25, static_shapes=True)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        got = [model(tokens[:, :4], cache=cache, logits_to_keep=4)]
        for i in range(4, 24):
            got.append(step(tokens[:, i : i + 1], cache=cache))
            cache.length += 1  # which a compiled step leaves to its caller
        got.append(model(tokens[:, 24:], cache=cache))  # and on without
    torch._dynamo.reset()
    assert_close(torch.cat(got, 1), model(tokens))
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_compiled_step_computes_the_same():
    model = make("window")
    tokens = tokens_of(2, 12)
    cache = model.make_cache(2, 12, static_shapes=True)
    step = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        got = torch.cat([step(part, cache=cache) for part in tokens.split(1, 1)], 1)
    assert_close(got, model(tokens))


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("layer_map", [(0, 0, 1, 1), (2, 0), (1, 1, 1), (0, 1, 2, 0, 1, 2)], ids=str)
def test_sharing_is_running_copies(layer_map):
    shared = make(layer_map=layer_map)
    unrolled = make(depth=len(layer_map))
    state = shared.state_dict()
    for i, stored in enumerate(layer_map):
        for key in [key for key in state if key.startswith(f"model.layers.{stored}.")]:
            unrolled.state_dict()[key.replace(f"layers.{stored}.", f"layers.{i}.", 1)].copy_(state[key])
    for key in ("model.embed_tokens.weight", "model.norm.weight"):
        unrolled.state_dict()[key].copy_(state[key])
    tokens = tokens_of(2, 9)
    assert_close(shared(tokens), unrolled(tokens))
    assert len(shared.make_cache(1, 9).layers) == len(layer_map)
    assert shared.config.kv_elements_per_token == unrolled.config.kv_elements_per_token


def test_grouped_heads_are_repeated_ones():
    grouped, full = make(), make(num_kv_heads=4)
    state = grouped.state_dict()
    for key, tensor in full.state_dict().items():
        same = state[key]
        if "k_proj" in key or "v_proj" in key:
            same = same.view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)
        tensor.copy_(same)
    tokens = tokens_of(1, 9)
    assert_close(grouped(tokens), full(tokens))


def test_interleaved_pairs_are_half_split_ones_in_another_order():
    interleaved, half = make(rope_interleaved=True), make()
    order = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2)))
    for key, tensor in half.state_dict().items():
        same = interleaved.state_dict()[key]
        if "q_proj" in key or "k_proj" in key:
            same = same.view(-1, 8, same.shape[1])[:, order].flatten(0, 1)
        tensor.copy_(same)
    tokens = tokens_of(1, 30)
    assert_close(interleaved(tokens), half(tokens))


def test_rotary_tables_are_right_however_a_model_is_made(tmp_path):
    def is_right(model):
        table = model.model.rotary
        j, places = torch.arange(4, dtype=torch.float64), torch.arange(128, dtype=torch.float64)
        angles = places[:, None] * 1e4 ** (-j / 4)
        assert table.cos.dtype == table.sin.dtype == torch.float32
        assert (table.cos - angles.cos()).abs().max() < 2e-5
        assert (table.sin - angles.sin()).abs().max() < 2e-5
        assert not any("rotary" in key for key in model.state_dict())

    model = small()
    is_right(model)
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    for dtype in (None, torch.bfloat16, torch.float64):
        loaded = zoo.create_model(f"local-dir:{folder}", dtype=dtype)
        is_right(loaded)
        assert loaded.head_weight.dtype == (dtype or torch.float32)
        is_right(small(dtype=dtype))
    is_right(small().to(torch.bfloat16).to(torch.float32))
    is_right(small().half().to("cpu"))
    is_right(small(device="meta", dtype=torch.bfloat16).to_empty(device="cpu"))
    assert small(device="meta").to(torch.bfloat16).model.rotary.cos.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "linear", "embedding"),
    [("mobilellm_125m", 0.02, 0.02), ("youtu_llm_2b", 2 / (5 * 2048) ** 0.5, 4 / (5 * 2048) ** 0.5)],
)
def test_initialised_as_published(name, linear, embedding):
    sizes = {"depth": 1, "dim": 256, "hidden_dim": 256, "vocab_size": 300, "context_length": 16, "num_heads": 4}
    model = zoo.create_model(name, pretrained=False, num_kv_heads=None, tie_embeddings=False, **sizes)
    for key, tensor in model.state_dict().items():
        if key.endswith("norm.weight"):
            assert (tensor == 1).all(), key
            continue
        wanted = embedding if "embed_tokens" in key else linear
        assert math.isclose(tensor.std().item(), wanted, rel_tol=0.03), key
        assert abs(tensor.mean().item()) < 0.05 * wanted, key


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("elements", [1, 5 * 11, 2**25], ids=["one token at once", "five", "all"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, elements, z_loss, ignored):
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", elements)
    torch.manual_seed(2)
    hidden = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (13,))
    targets[{"none": slice(0, 0), "some": slice(0, 13, 3), "all": slice(None)}[ignored]] = -100
    counted = max(1, int((targets != -100).sum()))
    logits = hidden @ weight.T
    wanted = F.cross_entropy(logits, targets, reduction="sum") / counted
    wanted = wanted + z_loss * (logits.logsumexp(-1)[targets != -100] ** 2).sum() / counted
    slopes = torch.autograd.grad(3 * wanted, (hidden, weight))
    loss = mean_token_loss(hidden, weight, targets, z_loss)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, slopes, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(mean_token_loss(hidden, weight, targets, z_loss), wanted, rtol=1e-12, atol=1e-12)
    losses = token_losses(hidden, weight, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none").float())


def test_loss_in_half_precision_has_the_weights_gradient_in_their_own():
    torch.manual_seed(3)
    hidden, weight = torch.randn(40, 16), torch.randn(30, 16)
    targets = torch.randint(0, 30, (40,))

    def slopes(h, w, enabled):
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = mean_token_loss(h, w, targets)
        assert loss.dtype == torch.float32
        return loss, *torch.autograd.grad(loss, (h, w))

    exact = slopes(hidden, weight, False)
    for h, w, enabled in ((hidden, weight, True), (hidden.bfloat16(), weight.bfloat16(), False)):
        got = slopes(h, w, enabled)
        assert (got[1].dtype, got[2].dtype) == (h.dtype, w.dtype)
        for a, b in zip(got, exact, strict=True):
            assert (a.float() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_loss_is_that_of_its_logits(tied):
    model = make(tie_embeddings=tied).requires_grad_()
    tokens, targets = tokens_of(2, 10), tokens_of(2, 10).roll(1, 1)
    targets[0, :4] = -100
    loss = model(tokens, targets.int())
    wanted = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    got, slopes = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, wanted))
    torch.testing.assert_close(got, slopes, rtol=1e-8, atol=1e-14)
    assert ("lm_head.weight" in model.state_dict()) != tied


def test_nothing_to_learn_is_a_loss_of_zero():
    model = make().requires_grad_()
    loss = model(tokens_of(1, 5), torch.full((1, 5), -100))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("form", ["grouped", "shared", "latent"])
def test_gradient_checkpointing_changes_nothing_but_memory(form):
    model = make(form).requires_grad_().train()
    tokens = tokens_of(2, 9)
    wanted = torch.autograd.grad(model(tokens, tokens), list(model.parameters()))
    model.set_grad_checkpointing()
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    got = torch.autograd.grad(model(tokens, tokens), list(model.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
    assert len(runs) == 2 * model.config.executed.count(0)  # forward, and again in the backward pass
    model.set_grad_checkpointing(False)
    model(tokens, tokens).backward()
    assert len(runs) == 3 * model.config.executed.count(0)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def published(model):
    """The model's weights with what published files hold beside them."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for i in range(model.config.depth):
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return state


@pytest.mark.parametrize("theirs", ["mlp", "feed_forward"])
@pytest.mark.parametrize("ours", ["mlp", "feed_forward"])
def test_both_names_of_the_feed_forward_and_rotary_tables_are_read(ours, theirs):
    source, model = make(mlp_name=theirs), make(mlp_name=ours, init_std=0.1)
    report = zoo.load_checkpoint(model, published(source))
    assert not report.fresh
    tokens = tokens_of(1, 5)
    assert torch.equal(model(tokens), source(tokens))


def test_a_head_that_is_the_embedding_is_read_and_another_refused():
    model, state = make(), published(make(init_std=0.1))
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    zoo.load_checkpoint(model, state)
    state["lm_head.weight"][3, 4] += 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not its embedding.*tie_embeddings=False"):
        zoo.load_checkpoint(make(), state)
    untied = make(tie_embeddings=False)
    zoo.load_checkpoint(untied, state)
    assert torch.equal(untied.head_weight, state["lm_head.weight"])
    del state["lm_head.weight"]
    with pytest.raises(CheckpointError, match=re.escape("lm_head.weight")):
        zoo.load_checkpoint(make(tie_embeddings=False), state)


@pytest.mark.parametrize("form", ["grouped", "window", "latent"])
def test_exports_with_any_length(form):
    model = make(form)
    shortest = 6 if form == "window" else 2  # what fits into a window needs no mask, and is another program
    length = torch.export.Dim("length", min=shortest, max=128)
    program = torch.export.export(model, (tokens_of(1, 9),), dynamic_shapes={"tokens": {1: length}})
    for count in (9, 17):
        assert_close(program.module()(tokens_of(1, count)), model(tokens_of(1, count)))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 0}, "depth must be a whole number from 1 up, not 0"),
        ({"tie_embeddings": "false"}, "tie_embeddings must be True or False, not 'false'"),
        ({"qk_norm": 1}, "qk_norm must be True or False, not 1"),
        ({"global_layers": 1}, "global_layers must be numbers of layers, not 1"),
        ({"global_layers": (0, "1")}, r"global_layers must be numbers of layers, not \(0, '1'\)"),
        ({"dim": 32.0}, "dim must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a whole number from 1 up"),
        ({"layer_map": (0, 3)}, r"layer_map names stored layers, 0 to 2 with this depth: it is \(0, 3\)"),
        ({"layer_map": (0, "1")}, "layer_map names stored layers"),
        ({"layer_map": ()}, "layer_map names no layer at all"),
        ({"sliding_window": 0}, "sliding_window must be a whole number from 1 up"),
        ({"kv_rank": 8}, r"Latent attention \(kv_rank\) needs q_rank"),
        ({"kv_rank": 8, "q_rank": 8, "qk_norm": True}, "neither sliding_window nor qk_norm"),
        ({"head_dim": 7}, "the width of a head must be even, not 7"),
        ({"rope_theta": 0}, "rope_theta must be a number above zero, not 0"),
        ({"norm_eps": math.inf}, "norm_eps must be a number above zero"),
        ({"mlp_name": "a.b"}, "mlp_name must be a Python name"),
        ({"num_head": 4}, "has no argument 'num_head'. Did you mean num_heads"),
    ],
)
def test_an_architecture_that_cannot_be(args, message):
    with pytest.raises(ConfigError, match=message):
        small(**args)


def test_a_configuration_cannot_be_changed_by_accident():
    config = make().config
    with pytest.raises(AttributeError):
        setattr(config, "depth", 5)  # noqa: B010
    assert isinstance(config, DecoderConfig)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[0, 257]])), "Token 257 is outside the vocabulary, 0 to 256: is it another model's"),
        (lambda m: m(torch.tensor([[-1, 2]])), "Token -1 is outside the vocabulary"),
        (lambda m: m(torch.tensor([1, 2])), r"shape \(batch, length\), both from 1 up, not int64 \(2,\)"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), r"not int64 \(1, 0\)"),
        (lambda m: m(torch.ones(1, 3)), r"not float32 \(1, 3\)"),
        (lambda m: m(torch.ones(1, 3, dtype=torch.bool)), r"not bool \(1, 3\)"),
        (lambda m: m(tokens_of(1, 129)), "129 tokens are more than the model's context, 128: give it less text"),
        (lambda m: m(tokens_of(1, 3), positions=torch.tensor([[126, 127, 128]])), "129 tokens are more than"),
        (lambda m: m(tokens_of(1, 3), positions=torch.arange(3)), r"positions must be .* shape, \(1, 3\), not \(3,\)"),
        (lambda m: m(tokens_of(1, 3), tokens_of(1, 4)), r"targets are \(1, 4\) and tokens \(1, 3\): they differ"),
        (lambda m: m(tokens_of(1, 2), torch.tensor([[-1, 3]])), "Target -1 is outside the vocabulary, 0 to 256; -100 "),
        (lambda m: m(tokens_of(1, 2), torch.tensor([[257, 3]])), "Target 257 is outside the vocabulary"),
        (lambda m: m(tokens_of(1, 2), logits_to_keep=0), "logits_to_keep must be from 1 up, not 0"),
        (lambda m: m.make_cache(1, 129), "A cache for 129 tokens cannot be: the model's context has 128"),
        (lambda m: m.make_cache(1, 0), "A cache for 0 tokens cannot be"),
        (lambda m: m.make_cache(0), "A cache is for a batch of 1 up, not 0"),
        (lambda m: m(tokens_of(2, 3), cache=m.make_cache(1, 9)), "made for a batch of 1, not 2"),
        (
            lambda m: m(tokens_of(1, 3), cache=m.make_cache(1, 2)),
            "room for 2 tokens: it holds 0, and 3 more do not fit",
        ),
        (lambda m: m(tokens_of(1, 3), cache=make("shared").make_cache(1, 9)), "it has 5 layers, and this one runs 3"),
        (lambda m: m(tokens_of(1, 3), cache=make("latent").make_cache(1, 9)), "another model's: its layers keep other"),
        (lambda m: m(tokens_of(1, 3), cache=make("window").make_cache(1, 9)), "another model's: its layers keep other"),
        (lambda m: m(tokens_of(1, 2), logits_to_keep=1.5), r"logits_to_keep must be from 1 up, not 1\.5"),
        (lambda m: m.make_cache(1, "a"), "A cache for 'a' tokens cannot be"),
    ],
)
def test_input_that_cannot_be(call, message):
    with pytest.raises(ConfigError, match=message):
        call(make())


def test_targets_of_8_bits_do():
    model, tokens = make(), tokens_of(2, 7, vocab_size=200)
    assert torch.equal(model(tokens, tokens.to(torch.uint8)), model(tokens, tokens))


@pytest.mark.parametrize("static_shapes", [False, True])
def test_numbers_of_32_bits_do(static_shapes):
    model, tokens = make(), tokens_of(1, 6)
    positions = torch.arange(6)[None]
    wanted = model(tokens)
    assert torch.equal(model(tokens.int(), tokens.int()), model(tokens, tokens))
    cache = model.make_cache(1, 6, static_shapes=static_shapes)
    steps = zip(tokens.int().split(1, 1), positions.int().split(1, 1), strict=True)
    assert_close(torch.cat([model(token, cache=cache, positions=place) for token, place in steps], 1), wanted)


@pytest.mark.parametrize("static_shapes", [False, True])
def test_a_text_that_began_late_ends_with_the_context(static_shapes):
    model = make()
    cache = model.make_cache(1, 8, static_shapes=static_shapes)
    model(tokens_of(1, 2), cache=cache, positions=torch.tensor([[125, 126]]))
    model(tokens_of(1, 1), cache=cache)
    with pytest.raises(ConfigError, match="129 tokens are more than the model's context, 128"):
        model(tokens_of(1, 1), cache=cache)


def test_a_refused_token_leaves_the_memory_as_it_was():
    model = make()
    tokens = tokens_of(1, 8)
    for static_shapes in (False, True):
        cache = model.make_cache(1, 8, static_shapes=static_shapes)
        model(tokens[:, :5], cache=cache)
        for bad in (torch.tensor([[999]]), tokens_of(1, 4), tokens_of(2, 1)):
            with pytest.raises(ConfigError):
                model(bad, cache=cache)
        got = [model(tokens[:, i : i + 1], cache=cache) for i in range(5, 8)]
        assert_close(torch.cat(got, 1), model(tokens)[:, 5:])
