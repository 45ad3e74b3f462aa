from __future__ import annotations

import pytest
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn

from pyrolora.adapters.sites import AdapterError, SiteGroup, find_sites


def llama(**changes) -> nn.Module:
    config = {
        "vocab_size": 24,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 20,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes}))


def inject(model: nn.Module, **lora) -> PeftModel:
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **lora}))


def held(model: PeftModel, site: SiteGroup) -> list[nn.Parameter]:
    return [model.get_submodule(path)._parameters[key] for path, key in site.holders]


def test_groups_are_those_written_by_hand(architecture):
    """Law: one group per kind and shape, over exactly these layers in this order, with PEFT's shapes."""
    sites = find_sites(architecture.inject())
    found = {name: (tuple(site.event_shape), list(site.layers)) for name, site in sites.items()}
    assert found == architecture.sites
    assert all(site.num_layers == site.shape[0] == len(site.holders) == len(site.scaling) for site in sites.values())


def test_every_adapter_parameter_has_exactly_one_place(architecture):
    """Law: the groups partition the parameters that PEFT would train, and hold them with their shapes."""
    model = architecture.inject()
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    places = [p for site in find_sites(model).values() for p in held(model, site)]
    assert sorted(trained[id(p)] for p in places) == sorted(trained.values())
    for site in find_sites(model).values():
        assert all(p.shape == site.event_shape for p in held(model, site))


def test_groups_stand_in_the_order_of_modules_and_a_before_b(architecture):
    """Law: the order of sites is that of the model's modules, each B right after its A on the same plate."""
    model = architecture.inject()
    sites = find_sites(model)
    order = [path for path, _ in model.named_modules()]
    first = [order.index(site.holders[0][0].split(".lora_")[0]) for site in sites.values()]
    assert first == sorted(first)
    names = list(sites)
    for name in names:
        if name.endswith(".A"):
            partner = sites[names[names.index(name) + 1]]
            assert partner.name == f"{name[:-1]}B" and partner.role == "B"
            assert partner.layers == sites[name].layers and partner.plate == sites[name].plate


def test_dimensions_are_named_after_what_they_index():
    """Law: A is (layer, rank, in), B is (layer, out, rank), a head's weight (head, out, in), its bias a feature."""
    model = inject(transformers.BertForSequenceClassification(_bert()), target_modules=["query"], task_type="SEQ_CLS")
    sites = find_sites(model)
    assert sites["lora.query.A"].dims == ("layer", "rank", "in_feature")
    assert sites["lora.query.B"].dims == ("layer", "out_feature", "rank")
    assert sites["head.classifier.weight"].dims == ("head", "out_feature", "in_feature")
    assert sites["head.classifier.bias"].dims == ("head", "feature")
    assert [site.role for site in sites.values()] == ["A", "B", "head", "head"]
    assert [site.event_dim for site in sites.values()] == [2, 2, 2, 1]
    assert [site.fan_in for site in sites.values()] == [16, 2, 16, 1]
    assert len({site.plate for site in sites.values()}) == 3


def _bert() -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )


def test_layers_of_another_rank_are_another_group():
    """Law: rank_pattern splits a kind by rank, each part with its own A and B; together they are all layers."""
    sites = find_sites(
        inject(llama(), target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5})
    )
    shapes = {name: tuple(site.shape) for name, site in sites.items() if "q_proj" in name}
    assert shapes == {
        "lora.q_proj.A": (2, 2, 16),
        "lora.q_proj.B": (2, 16, 2),
        "lora.q_proj.1.A": (1, 5, 16),
        "lora.q_proj.1.B": (1, 16, 5),
    }
    assert sites["lora.q_proj.1.A"].layers == ("model.layers.1.self_attn.q_proj",)
    assert sites["lora.q_proj.1.A"].plate == sites["lora.q_proj.1.B"].plate != sites["lora.q_proj.A"].plate
    assert sites["lora.v_proj.A"].num_layers == 3


@pytest.mark.parametrize(("rslora", "power"), [(False, 1.0), (True, 0.5)])
def test_scaling_is_recorded_for_each_layer(rslora, power):
    """Law: scaling is α / r, or α / √r with rsLoRA, with each layer's own α and r."""
    model = inject(
        llama(),
        lora_alpha=6,
        use_rslora=rslora,
        alpha_pattern={"layers.0.self_attn.q_proj": 20},
        rank_pattern={"layers.1.self_attn.q_proj": 4},
        modules_to_save=["lm_head"],
    )
    sites = find_sites(model)
    assert sites["lora.q_proj.A"].scaling == pytest.approx((20 / 2**power, 6 / 2**power))
    assert sites["lora.q_proj.1.B"].scaling == pytest.approx((6 / 4**power,))
    assert sites["head.lm_head.weight"].scaling == (1.0,)


def test_the_language_model_head_may_be_a_target():
    """Law: lm_head is a group of its own, with as many outputs as the vocabulary has words."""
    sites = find_sites(inject(llama(), target_modules=["lm_head", "q_proj"]))
    assert tuple(sites["lora.lm_head.A"].shape) == (1, 2, 16)
    assert tuple(sites["lora.lm_head.B"].shape) == (1, 24, 2)


def test_norms_to_save_are_groups_of_one_layer():
    """Law: every parameter under modules_to_save is a group of its own, named by its place in the base model."""
    sites = find_sites(inject(llama(), modules_to_save=["input_layernorm"]))
    norms = [name for name in sites if name.startswith("head.")]
    assert norms == [f"head.model.layers.{i}.input_layernorm.weight" for i in range(3)]


def test_experts_stand_in_the_documented_rows_and_columns():
    """Law: expert e's update is scaling · Σ_k B[:, kE+e] A[er+k, :], for every expert."""
    experts, rank = 4, 2
    config = transformers.MixtralConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
        num_local_experts=experts,
    )
    parameter = "mlp.experts.down_proj"
    model = inject(transformers.MixtralForCausalLM(config), target_modules=[], target_parameters=[parameter])
    sites = find_sites(model)
    a, b = (torch.randn(sites[f"lora.experts.down_proj.{role}"].event_shape) for role in "AB")
    module = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    with torch.no_grad():
        module.lora_A["default"].weight.copy_(a)
        module.lora_B["default"].weight.copy_(b)
    update = module.get_delta_weight("default")
    for e in range(experts):
        rows, columns = [e * rank + k for k in range(rank)], [k * experts + e for k in range(rank)]
        torch.testing.assert_close(update[e], sites["lora.experts.down_proj.A"].scaling[0] * b[:, columns] @ a[rows])


def test_the_type_of_the_parameters_is_recorded():
    """Law: dtype is that in which PEFT keeps the adapter, not that of the base."""
    base = llama().to(torch.bfloat16)
    config = LoraConfig(target_modules=["q_proj"])
    assert find_sites(get_peft_model(base, config))["lora.q_proj.A"].dtype == torch.float32
    base = llama().to(torch.bfloat16)
    kept = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert find_sites(kept)["lora.q_proj.A"].dtype == torch.bfloat16


def test_only_the_named_adapter_is_found():
    """Law: of two adapters on one model, find_sites sees the one that it is asked for, and knows no third."""
    model = inject(llama())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    assert list(find_sites(model)) == ["lora.q_proj.A", "lora.q_proj.B"]
    assert tuple(find_sites(model, adapter="second")["lora.v_proj.A"].shape) == (3, 3, 16)
    with pytest.raises(AdapterError, match="no adapter 'third'; it has default, second"):
        find_sites(model, adapter="third")


class Mixed(nn.Module):
    """Layers of kinds that cannot be served."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(3, 4, 3)
        self.line = nn.Conv1d(3, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)


REFUSED = {
    "dora": ({"use_dora": True}, r"layers\.0\.self_attn\.q_proj: only plain LoRA.*Turn it off"),
    "alora": ({"alora_invocation_tokens": [3]}, r"layers\.0\.self_attn\.q_proj: only plain LoRA"),
    "lora_bias": ({"lora_bias": True}, r"layers\.0\.self_attn\.q_proj: .*Set lora_bias=False"),
    "token indices": (
        {"trainable_token_indices": [1]},
        r"model\.embed_tokens: TrainableTokens.*no trainable_token_ind",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_without_sites_are_refused_by_module(name):
    """Law: what plain LoRA sites cannot express is an error that names the module and what to change."""
    lora, message = REFUSED[name]
    model = inject(llama(attention_bias=name == "lora_bias"), **lora)
    with pytest.raises(AdapterError, match=message):
        find_sites(model)


@pytest.mark.parametrize(
    ("target", "kind"), [("plane", "Conv2d"), ("line", "Conv1d"), ("attention", "MultiheadAttention")]
)
def test_layers_that_are_not_linear_are_refused_by_module(target, kind):
    """Law: an adapted convolution or torch attention is an error that names the module and its kind."""
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(AdapterError, match=rf"model\.{target}: LoRA on {kind}.*Leave it out of target_modules"):
        find_sites(model)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_base_biases_are_refused_by_name(bias):
    """Law: biases of the base model that PEFT would train have no site: an error that names the first."""
    model = inject(transformers.BertForSequenceClassification(_bert()), target_modules=["query"], bias=bias)
    with pytest.raises(AdapterError, match=rf"bert\..*bias: LoraConfig\(bias='{bias}'\).*Set bias=\"none\""):
        find_sites(model)


def test_a_merged_adapter_is_refused():
    """Law: an adapter inside the base weight cannot be replaced by a draw; the error says how to take it out."""
    model = inject(llama())
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: the adapter is merged.*unmerge_adapter"):
        find_sites(model)
    model.unmerge_adapter()
    assert len(find_sites(model)) == 2


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=["targets", "modules_to_save"],
)
def test_adapters_tied_to_each_other_are_refused(lora):
    """Law: one tensor in two places would be drawn twice: an error that names both modules."""
    model = inject(llama(tie_word_embeddings=True), ensure_weight_tying=True, **lora)
    with pytest.raises(AdapterError, match=r"lm_head: its adapter is tied to that of model\.embed_tokens"):
        find_sites(model)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_peft_methods_are_refused(config):
    """Law: an adapter that is not LoRA is an error that names its configuration class."""
    with pytest.raises(AdapterError, match=f"'default' is declared by a {type(config).__name__}; only LoRA"):
        find_sites(get_peft_model(llama(), config))


def test_a_model_without_adapters_is_refused():
    """Law: no adapters, no program: a model whose adapters were unloaded is an error."""
    model = inject(llama())
    model.unload()
    with pytest.raises(AdapterError, match="'default' has no LoRA parameters"):
        find_sites(model)
