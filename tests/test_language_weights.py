"""Published weights of language models, on a Hub on loopback: gated ones, and those that lie in several files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import zoo
from tests.hub_stub import Hub
from tests.language import SMALL, small
from tests.launcher import python
from zoo.errors import UnknownModelError

SIZES = {**SMALL, "vocab_size": 257, "context_length": 128}
LATENT = {**SIZES, "num_kv_heads": None, "q_rank": 12, "kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 4}
SCRIPT = """
import json, os, torch, zoo
from zoo.errors import ZooError

sizes, latent = json.loads(os.environ["SIZES"])
found = {}

def create(key, name, sizes, **options):
    try:
        model = zoo.create_model(name, pretrained=True, **sizes, **options).eval()
        with torch.no_grad():
            found[key] = model(torch.arange(9)[None])[0, -1].tolist()
    except ZooError as error:
        found[key] = f"{type(error).__name__}: {error}"

create("nobody", "mobilellm_125m", sizes)
create("outsider", "mobilellm_ls_125m", sizes, token="hf_outsider")
create("member", "mobilellm_125m", sizes, token="hf_member")
create("member, again", "mobilellm_125m", sizes)
create("shards", "youtu_llm_2b", latent)
create("a tag", "smollm_135m.instruct", sizes)
create("a shard is missing", "youtu_llm_2b_base", latent)
print(json.dumps(found))
"""


def weights(model: Any) -> bytes:
    return safetensors.torch.save(model.state_dict())


def shards(model: Any) -> dict[str, bytes]:
    """A checkpoint in two files, as transformers writes it."""
    state = model.state_dict()
    keys = list(state)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    files = {name: safetensors.torch.save({key: state[key] for key in chosen}) for name, chosen in parts.items()}
    index = {"metadata": {}, "weight_map": {key: name for name, chosen in parts.items() for key in chosen}}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    plain = small("mobilellm_125m", init_std=0.3)
    latent = zoo.create_model("youtu_llm_2b", pretrained=False, **LATENT, init_std=0.3).eval()
    return {"plain": plain, "latent": latent, "chat": small("smollm_135m", init_std=0.3)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any]) -> dict[str, Any]:
    with Hub() as hub:
        for name in ("facebook/MobileLLM-125M", "facebook/MobileLLM-125M-layer-share"):
            hub.repo(name, {"model.safetensors": weights(models["plain"])}, gated=True)
        hub.repo("tencent/Youtu-LLM-2B", shards(models["latent"]))
        files = shards(models["latent"])
        del files["model-00002-of-00002.safetensors"]
        hub.repo("tencent/Youtu-LLM-2B-Base", files)
        hub.repo("HuggingFaceTB/SmolLM-135M-Instruct", {"model.safetensors": weights(models["chat"])})
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment = {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment |= {"SIZES": json.dumps([SIZES, LATENT])}
        run = python("-c", SCRIPT, env=environment, cwd=Path(__file__).resolve().parents[1])
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(9)[None])[0, -1]


def test_gated_weights_without_access_say_where_the_terms_are(found):
    assert found["nobody"].startswith("DownloadError: facebook/MobileLLM-125M is gated: accept its terms at ")
    for words in ("https://huggingface.co/facebook/MobileLLM-125M,", "`hf auth login`", "token="):
        assert words in found["nobody"]


def test_an_account_without_access_is_told_so(found):
    assert "your account is not among those with access" in found["outsider"]
    assert "https://huggingface.co/facebook/MobileLLM-125M-layer-share" in found["outsider"]


def test_with_access_they_are_loaded_and_kept(found, models):
    torch.testing.assert_close(torch.tensor(found["member"]), logits(models["plain"]))
    assert found["member, again"] == found["member"]  # from the cache: no token is asked for


def test_checkpoints_in_several_files_are_fetched_whole(found, models):
    torch.testing.assert_close(torch.tensor(found["shards"]), logits(models["latent"]))
    assert "tencent/Youtu-LLM-2B-Base has no model-00002-of-00002.safetensors" in found["a shard is missing"]


def test_a_tag_chooses_its_repository(found, models):
    torch.testing.assert_close(torch.tensor(found["a tag"]), logits(models["chat"]))


def test_models_without_published_weights_say_so():
    with pytest.raises(UnknownModelError, match="mobilellm_ls_600m has no published weights"):
        zoo.create_model("mobilellm_ls_600m", pretrained=True)
