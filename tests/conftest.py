"""What all tests share: a quiet offline process, fresh random state, and tiny random models of real architectures."""

from __future__ import annotations

import os

# Read when the libraries are imported, so set before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pyro
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

# The same examples in every run, as few as a busy machine has time for, and none kept between runs.
hypothesis.settings.register_profile("tests", derandomize=True, max_examples=25, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _fresh_random_state():
    with pyro.validation_enabled(True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        yield
    pyro.clear_param_store()


@dataclass(frozen=True)
class Architecture:
    """A tiny random model of a real architecture, and what its site groups must be.

    Attributes:
        build: Makes the base model.
        lora: Arguments of its LoraConfig.
        sites: Site name to its event shape and the names of its layers, in order; written by hand.
        inputs: A batch for its forward pass.
    """

    build: Callable[[], torch.nn.Module]
    lora: Mapping[str, Any]
    sites: Mapping[str, tuple[tuple[int, ...], list[str]]]
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: TEXT)

    def base(self, seed: int = 0) -> torch.nn.Module:
        """The base model alone, the same for the same seed, in evaluation mode."""
        torch.manual_seed(seed)
        return self.build().eval()

    def config(self) -> LoraConfig:
        return LoraConfig(**{"r": 2, "lora_alpha": 6, **self.lora})

    def inject(self, seed: int = 0, *, adapter: str = "default", checkpointing: bool = False) -> PeftModel:
        """The base model with PEFT's adapters, all of them random (PEFT starts B at zero), in evaluation mode."""
        base = self.base(seed)
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = get_peft_model(base, self.config(), adapter_name=adapter)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        return model.eval()


_IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 3, 2, 0]])
TEXT = {"input_ids": _IDS, "attention_mask": (_IDS != 0).long()}
_ENCODER = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
# Special tokens are given because defaults lie outside so small a vocabulary.
_DECODER = {**_ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}


def _classifier(family: str, **config: Any) -> Callable[[], torch.nn.Module]:
    kind = "ImageClassification" if family == "ViT" else "SequenceClassification"

    def build() -> torch.nn.Module:
        return getattr(transformers, f"{family}For{kind}")(getattr(transformers, f"{family}Config")(**config))

    return build


def _pair(kind: str, shape_a: tuple[int, int], shape_b: tuple[int, int], layers: list[str]) -> dict[str, Any]:
    return {f"lora.{kind}.A": (shape_a, layers), f"lora.{kind}.B": (shape_b, layers)}


def _stack(pattern: str, depth: int = 3) -> list[str]:
    return [pattern.format(i) for i in range(depth)]


def _linear_head(name: str, width: int = 16, bias: bool = True) -> dict[str, Any]:
    weight = {f"head.{name}.weight": ((3, width), [name])}
    return {**weight, f"head.{name}.bias": ((3,), [name])} if bias else weight


def _two_linear_head(first: str, last: str, layer: tuple[str, str]) -> dict[str, Any]:
    return {
        f"head.{first}.weight": ((16, 16), [layer[0]]),
        f"head.{first}.bias": ((16,), [layer[0]]),
        f"head.{last}.weight": ((3, 16), [layer[1]]),
        f"head.{last}.bias": ((3,), [layer[1]]),
    }


def _causal(family: str, value_features: int = 8, config: Mapping[str, Any] = _GROUPED) -> Architecture:
    """Decoders that name their projections as Llama does."""
    return Architecture(
        build=_classifier(family, **config),
        lora={"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"},
        sites={
            **_pair("q_proj", (2, 16), (16, 2), _stack("model.layers.{}.self_attn.q_proj")),
            **_pair("v_proj", (2, 16), (value_features, 2), _stack("model.layers.{}.self_attn.v_proj")),
            **_linear_head("score", bias=False),
        },
    )


_T5_ATTENTION = [
    *_stack("transformer.encoder.block.{}.layer.0.SelfAttention", 2),
    "transformer.decoder.block.0.layer.0.SelfAttention",
    "transformer.decoder.block.0.layer.1.EncDecAttention",
    "transformer.decoder.block.1.layer.0.SelfAttention",
    "transformer.decoder.block.1.layer.1.EncDecAttention",
]
_MIXTRAL = {**_GROUPED, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        build=_classifier("Bert", **_ENCODER),
        lora={"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        sites={
            **_pair("query", (2, 16), (16, 2), _stack("bert.encoder.layer.{}.attention.self.query")),
            **_pair("value", (2, 16), (16, 2), _stack("bert.encoder.layer.{}.attention.self.value")),
            **_linear_head("classifier"),
        },
    ),
    "roberta": Architecture(
        build=_classifier("Roberta", **_ENCODER, pad_token_id=0),
        lora={"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
        sites={
            **_pair("query", (2, 16), (16, 2), _stack("roberta.encoder.layer.{}.attention.self.query")),
            **_pair("dense", (2, 16), (16, 2), _stack("roberta.encoder.layer.{}.attention.output.dense")),
            **_pair("dense.1", (2, 16), (20, 2), _stack("roberta.encoder.layer.{}.intermediate.dense")),
            **_pair("dense.2", (2, 20), (16, 2), _stack("roberta.encoder.layer.{}.output.dense")),
            **_two_linear_head("classifier.dense", "classifier.out_proj", ("classifier", "classifier")),
        },
    ),
    "distilbert": Architecture(
        build=_classifier(
            "DistilBert",
            vocab_size=24,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=20,
            max_position_embeddings=16,
            num_labels=3,
        ),
        lora={"target_modules": ["q_lin"], "task_type": "SEQ_CLS", "modules_to_save": ["pre_classifier"]},
        sites={
            **_pair("q_lin", (2, 16), (16, 2), _stack("distilbert.transformer.layer.{}.attention.q_lin", 2)),
            **_two_linear_head("pre_classifier", "classifier", ("pre_classifier", "classifier")),
        },
    ),
    "llama": _causal("Llama"),
    # An embedding, and one layer of another rank.
    "llama-embeddings": Architecture(
        build=_classifier("Llama", **_GROUPED),
        lora={
            "target_modules": ["embed_tokens", "q_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3},
            "task_type": "SEQ_CLS",
        },
        sites={
            **_pair("embed_tokens", (2, 24), (16, 2), ["model.embed_tokens"]),
            **_pair("q_proj", (2, 16), (16, 2), ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]),
            **_pair("q_proj.1", (3, 16), (16, 3), ["model.layers.1.self_attn.q_proj"]),
            **_linear_head("score", bias=False),
        },
    ),
    "qwen2": _causal("Qwen2", config={**_DECODER, "num_key_value_heads": 1}),
    "qwen3": _causal("Qwen3"),
    "mistral": _causal("Mistral"),
    "gemma": _causal("Gemma"),
    "phi": _causal("Phi", 16, config=_DECODER),
    "qwen3-moe": _causal(
        "Qwen3Moe", config={**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    ),
    "gpt2": Architecture(
        build=_classifier(
            "GPT2",
            vocab_size=24,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            num_labels=3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        # Conv1D, whose weight is the transpose of a linear layer's; the adapters are not transposed.
        lora={"target_modules": ["c_attn", "mlp.c_proj"], "task_type": "SEQ_CLS", "fan_in_fan_out": True},
        sites={
            **_pair("c_attn", (2, 16), (48, 2), _stack("transformer.h.{}.attn.c_attn", 2)),
            **_pair("c_proj", (2, 64), (16, 2), _stack("transformer.h.{}.mlp.c_proj", 2)),
            **_linear_head("score", bias=False),
        },
    ),
    "gpt-neox": Architecture(
        build=_classifier("GPTNeoX", **_DECODER),
        lora={"target_modules": ["query_key_value"], "task_type": "SEQ_CLS"},
        sites={
            **_pair("query_key_value", (2, 16), (48, 2), _stack("gpt_neox.layers.{}.attention.query_key_value")),
            **_linear_head("score", bias=False),
        },
    ),
    "opt": Architecture(
        build=_classifier("OPT", **{**_DECODER, "ffn_dim": 20, "word_embed_proj_dim": 16}),
        lora={"target_modules": ["q_proj", "fc1"], "task_type": "SEQ_CLS"},
        sites={
            **_pair("q_proj", (2, 16), (16, 2), _stack("model.decoder.layers.{}.self_attn.q_proj")),
            **_pair("fc1", (2, 16), (20, 2), _stack("model.decoder.layers.{}.fc1")),
            **_linear_head("score", bias=False),
        },
    ),
    "mixtral-experts": Architecture(
        build=_classifier("Mixtral", **_MIXTRAL),
        lora={
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "task_type": "SEQ_CLS",
        },
        sites={
            **_pair("q_proj", (2, 16), (16, 2), _stack("model.layers.{}.self_attn.q_proj", 2)),
            # 4 experts of rank 2 in one matrix of rank 8.
            **_pair("experts.down_proj", (8, 20), (16, 8), _stack("model.layers.{}.mlp.experts", 2)),
            **_pair("experts.gate_up_proj", (8, 16), (40, 8), _stack("model.layers.{}.mlp.experts", 2)),
            **_linear_head("score", bias=False),
        },
    ),
    "t5": Architecture(
        build=_classifier(
            "T5",
            vocab_size=24,
            d_model=16,
            d_kv=8,
            d_ff=20,
            num_layers=2,
            num_heads=2,
            num_labels=3,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        ),
        lora={"target_modules": ["q", "v"], "modules_to_save": ["classification_head"], "task_type": "SEQ_CLS"},
        sites={
            **_pair("q", (2, 16), (16, 2), [f"{name}.q" for name in _T5_ATTENTION]),
            **_pair("v", (2, 16), (16, 2), [f"{name}.v" for name in _T5_ATTENTION]),
            **_two_linear_head(
                "classification_head.dense",
                "classification_head.out_proj",
                ("classification_head", "classification_head"),
            ),
        },
    ),
    "vit": Architecture(
        build=_classifier(
            "ViT",
            **{key: value for key, value in _ENCODER.items() if key not in ("vocab_size", "max_position_embeddings")},
            image_size=16,
            patch_size=8,
        ),
        lora={"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        sites={
            **_pair("q_proj", (2, 16), (16, 2), _stack("vit.layers.{}.attention.q_proj")),
            **_pair("v_proj", (2, 16), (16, 2), _stack("vit.layers.{}.attention.v_proj")),
            **_linear_head("classifier"),
        },
        inputs={"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)},
    ),
}


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Each architecture in turn; choose some with ``parametrize("architecture", ["bert"], indirect=True)``."""
    return ARCHITECTURES[request.param]
