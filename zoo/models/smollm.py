"""SmolLM: Llama's architecture in MobileLLM's shapes, trained in the open.

Ben Allal et al., "SmolLM - blazingly fast and remarkably powerful", Hugging Face, July 2024 (a post, no paper); the
architecture is Llama's (Touvron et al., arXiv 2307.09288) with MobileLLM's depth and width (arXiv 2402.14905).
"""

from __future__ import annotations

from typing import Any

from zoo.layers.decoder import build_decoder, convert_published
from zoo.registry import Entry, Reported, Weights, register

BLOG = "https://huggingface.co/blog/smollm"
for size, depth, dim, heads, kv_heads, hidden, params in (
    ("135m", 30, 576, 9, 3, 1536, 135e6),
    ("360m", 32, 960, 15, 5, 2560, 360e6),
    ("1_7b", 24, 2048, 32, 32, 8192, 1.7e9),
):
    shape: dict[str, Any] = {
        "vocab_size": 49152,
        "depth": depth,
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_dim": hidden,
    }
    hub = f"HuggingFaceTB/SmolLM-{size.replace('_', '.').upper()}"
    register(
        Entry(
            name=f"smollm_{size}",
            build=build_decoder,
            args=shape,
            family="smollm",
            task="language",
            compact="MobileLLM's deep and thin shapes, trained on a curated corpus.",
            code_license="apache-2.0",
            code_url=BLOG,
            reported=Reported(params=params, source=BLOG),
            weights=(
                Weights(tag="smollm_corpus", hub_id=hub, license="apache-2.0", dataset="smollm-corpus"),
                Weights(
                    tag="instruct", hub_id=f"{hub}-Instruct", license="apache-2.0", dataset="", note="A chat model."
                ),
            ),
            convert=convert_published,
        )
    )
