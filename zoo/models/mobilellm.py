"""MobileLLM, its layer-sharing form, and its successors MobileLLM-R1 and MobileLLM-Pro.

Liu et al., "MobileLLM: Optimizing Sub-billion Parameter Language Models for On-Device Use Cases", ICML 2024, arXiv
2402.14905. Zhao et al., "MobileLLM-R1: Exploring the Limits of Sub-Billion Language Model Reasoners with Open Training
Recipes", arXiv 2509.24945. Huber et al., "MobileLLM-Pro Technical Report", arXiv 2511.06719.

What makes them compact: many narrow layers instead of few wide ones, one matrix for embedding and head, and few heads
for keys and values; in the LS form each stored layer runs twice in a row, while its weights are still in the cache of
the processor. In Pro, 21 of 30 layers see a window of 512 tokens alone, and remember no more than that.

Where this file departs from the published code: under layer sharing each of a layer's two runs has its own place in the
cache of keys and values. Theirs writes both to one place, so that only its `use_cache=False` is the model.

Not known of Pro, whose published configuration could not be read to its end: whether it normalises queries and keys,
the base of its rotary positions, and whether all layers have these. The values here are those of its kin; `qk_norm` and
`rope_theta` are arguments.
"""

from __future__ import annotations

from typing import Any

from zoo.layers.decoder import build_decoder, convert_published
from zoo.registry import Entry, Paper, Reported, Weights, register

MOBILELLM = Paper(
    title="MobileLLM: Optimizing Sub-billion Parameter Language Models for On-Device Use Cases",
    authors="Zechun Liu, Changsheng Zhao, Forrest Iandola, Chen Lai, Yuandong Tian, Igor Fedorov, et al.",
    venue="ICML 2024",
    arxiv="2402.14905",
)
R1 = Paper(
    title="MobileLLM-R1: Exploring the Limits of Sub-Billion Language Model Reasoners with Open Training Recipes",
    authors="Changsheng Zhao, Ernie Chang, Zechun Liu, Chia-Jung Chang, Wei Wen, Chen Lai, et al.",
    venue="arXiv 2025",
    arxiv="2509.24945",
)
PRO = Paper(
    title="MobileLLM-Pro Technical Report",
    authors="Patrick Huber, Ernie Chang, Wei Wen, Igor Fedorov, Tarek Elgamal, Hanxian Huang, Naveen Suda, et al.",
    venue="arXiv 2025",
    arxiv="2511.06719",
)
LICENSE = "fair-noncommercial-research-license"

# as the authors state them, percent: the mean over eight tasks of common sense, without examples
COMMON_SENSE = {
    "125m": 46.3, "350m": 51.3, "600m": 54.3, "1b": 57.3, "1_5b": 59.4, "ls_125m": 47.0, "ls_350m": 52.1,
    "r1_140m_base": 44.3, "r1_360m_base": 51.0, "r1_950m_base": 58.6,
}  # fmt: skip
REASONING = {"140m": (6.2, 4.1), "360m": (28.4, 24.5), "950m": (74.0, 67.5)}  # MATH500 and GSM8K, likewise


def _register(
    name: str, args: dict[str, Any], paper: Paper, compact: str, code_url: str, params: float, hub_id: str | None,
    note: str = "", weights_note: str | None = None,
) -> None:  # fmt: skip
    mean = COMMON_SENSE.get(name.removeprefix("mobilellm_"))
    if mean is not None:
        weights_note = f"As the authors state: {mean}% on average over eight zero-shot tasks of common sense."
    weights = () if hub_id is None else (_weights(hub_id, weights_note),)
    register(
        Entry(
            name=name,
            build=build_decoder,
            args=args,
            family="mobilellm",
            task="language",
            paper=paper,
            compact=compact,
            code_license=LICENSE,
            code_url=code_url,
            reported=Reported(params=params, source=f"arXiv {paper.arxiv}"),
            weights=weights,
            convert=convert_published,
            note=note,
        )
    )


def _weights(hub_id: str, note: str | None) -> Weights:
    return Weights(tag="meta", hub_id=hub_id, license=LICENSE, gated=True, dataset="", note=note)


# ------------------------------------------------------------------------------------------------------------ MobileLLM

COMPACT = "Deep and thin, with one matrix for embedding and head and few heads for keys and values."
SHARED = f"{COMPACT} Each stored layer runs twice in a row."
for size, depth, dim, heads, kv_heads, hidden, params, shared_hub in (
    ("125m", 30, 576, 9, 3, 1536, 124.6e6, "facebook/MobileLLM-125M-layer-share"),
    ("350m", 32, 960, 15, 5, 2560, 345.3e6, "facebook/MobileLLM-350M-layer-share"),
    ("600m", 40, 1152, 18, 6, 3072, 603.1e6, None),
    ("1b", 54, 1280, 20, 5, 3584, 1.01e9, None),
    ("1_5b", 54, 1600, 25, 5, 4352, 1.51e9, None),
):
    shape: dict[str, Any] = {
        "vocab_size": 32000,
        "depth": depth,
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_dim": hidden,
    }
    url = "https://github.com/facebookresearch/MobileLLM"
    hub = f"facebook/MobileLLM-{size.replace('_', '.').upper()}"
    _register(f"mobilellm_{size}", shape, MOBILELLM, COMPACT, url, params, hub)
    if size in ("125m", "350m", "600m"):
        twice = tuple(stored for stored in range(depth) for _ in range(2))
        _register(f"mobilellm_ls_{size}", {**shape, "layer_map": twice}, MOBILELLM, SHARED, url, params, shared_hub)

# --------------------------------------------------------------------------------------------------------- MobileLLM-R1

REASONER = "A small reasoner: few layers under a large vocabulary, one matrix for embedding and head."
for size, depth, dim, heads, kv_heads, hidden, params in (
    ("140m", 15, 576, 9, 3, 2048, 140e6),
    ("360m", 15, 1024, 16, 4, 4096, 359e6),
    ("950m", 22, 1536, 24, 6, 6144, 949e6),
):
    shape = {
        "vocab_size": 128256,
        "depth": depth,
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_dim": hidden,
        "rope_interleaved": True,
        "qk_norm": True,
        "mlp_name": "feed_forward",
    }
    url = "https://github.com/facebookresearch/MobileLLM-R1"
    final = {**shape, "rope_theta": 8e6, "context_length": 32768}
    base = {**shape, "rope_theta": 1e6, "context_length": 4096}
    hub = f"facebook/MobileLLM-R1-{size.upper()}"
    math500, gsm8k = REASONING[size]
    claim = f"As the authors state: {math500}% of MATH500 and {gsm8k}% of GSM8K, without examples."
    _register(f"mobilellm_r1_{size}", final, R1, REASONER, url, params, hub, weights_note=claim)
    _register(
        f"mobilellm_r1_{size}_base",
        base,
        R1,
        REASONER,
        url,
        params,
        f"{hub}-base",
        note="The base of the rotary positions, 1e6, is inferred: the authors write that it grew eightfold to 8e6.",
    )

# -------------------------------------------------------------------------------------------------------- MobileLLM-Pro

_register(
    "mobilellm_pro",
    {
        "vocab_size": 202048,
        "depth": 30,
        "dim": 1280,
        "num_heads": 20,
        "num_kv_heads": 4,
        "hidden_dim": 6144,
        "context_length": 131072,
        "rope_theta": 5e5,
        "rope_interleaved": True,
        "qk_norm": True,
        "sliding_window": 512,
        "global_layers": (0, 4, 8, 12, 16, 20, 24, 28, 29),
        "mlp_name": "feed_forward",
    },
    PRO,
    "Most layers see a window of 512 tokens alone, and remember no more.",
    "https://huggingface.co/facebook/MobileLLM-Pro",
    1.08e9,
    "facebook/MobileLLM-Pro",
    note=(
        "qk_norm, rope_theta and rotary positions in every layer are assumed, as the published configuration could not "
        "be read to its end: set them from the repository's config.json."
    ),
    weights_note="As the authors state: 59.8% of HumanEval, 46.8% of MBPP, 44.8% of MMLU and 62.0% of IFEval.",
)
