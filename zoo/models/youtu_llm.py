"""Youtu-LLM: two billion parameters with multi-head latent attention.

Lu et al., "Youtu-LLM: Unlocking the Native Agentic Potential for Lightweight Large Language Models", arXiv 2512.24618.

What makes it compact: a dense model of Llama's blocks with the attention of DeepSeek-V2 (arXiv 2405.04434), whose keys
and values come of one vector of 512 a token, beside one rotary key of 64: 576 numbers remembered a layer, instead of
5,120. New tokens are compared with that memory in its own space, which is the same function.
"""

from __future__ import annotations

from zoo.layers.decoder import build_decoder, convert_published
from zoo.registry import Entry, Paper, Reported, Weights, register

PAPER = Paper(
    title="Youtu-LLM: Unlocking the Native Agentic Potential for Lightweight Large Language Models",
    authors="Junru Lu, Jiarui Qin, Lingfeng Qiao, Yinghui Li, Xinyi Dai, Bo Ke, Jianfeng He, et al.",
    venue="arXiv 2025",
    arxiv="2512.24618",
)
LINEAR_STD = 2 / (5 * 2048) ** 0.5

CHAT = (
    "The instruction model, which reasons on demand. As the authors state: 93.7% of MATH-500, 95.9% of HumanEval and "
    "81.2% of IFEval."
)
BASE = (
    "The pre-trained model. As the authors state: 77.6% of GSM8K with 8 examples, 64.6% of HumanEval without any and "
    "66.6% of MBPP with 3."
)
for suffix, kind in (("", CHAT), ("_base", BASE)):
    register(
        Entry(
            name=f"youtu_llm_2b{suffix}",
            build=build_decoder,
            args={
                "vocab_size": 128256,
                "depth": 32,
                "dim": 2048,
                "num_heads": 16,
                "hidden_dim": 6144,
                "context_length": 131072,
                "norm_eps": 1e-6,
                "rope_theta": 1.6e6,
                "rope_interleaved": True,
                "q_rank": 1536,
                "kv_rank": 512,
                "nope_head_dim": 128,
                "rope_head_dim": 64,
                "v_head_dim": 128,
                "init_std": LINEAR_STD,
                "embed_init_std": 2 * LINEAR_STD,
            },
            family="youtu_llm",
            task="language",
            paper=PAPER,
            compact="Multi-head latent attention: 576 numbers remembered for a token and layer, instead of 5,120.",
            code_license="apache-2.0",
            code_url="https://github.com/TencentCloudADP/youtu-tip",
            reported=Reported(params=1.96e9, source="arXiv 2512.24618"),
            weights=(
                Weights(
                    tag="tencent",
                    hub_id=f"tencent/Youtu-LLM-2B{suffix.replace('_base', '-Base')}",
                    license="other",
                    dataset="",
                    note=f"{kind} Read the youtu-llm licence in the repository before passing the weights on.",
                ),
            ),
            convert=convert_published,
        )
    )
