from __future__ import annotations

import json
import re

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyrolora.adapters.checkpoint import export_adapter, fingerprint, load_adapter
from pyrolora.adapters.placement import Placement
from pyrolora.adapters.sites import AdapterError, find_sites

bert = pytest.mark.parametrize("architecture", ["bert"], indirect=True)
llama = pytest.mark.parametrize("architecture", ["llama"], indirect=True)
with_heads = pytest.mark.parametrize("architecture", ["bert", "roberta", "t5", "llama-embeddings"], indirect=True)


def placed(model: PeftModel, adapter: str = "default") -> tuple[Placement, dict[str, Tensor]]:
    placement = Placement(model, find_sites(model, adapter=adapter))
    return placement, {name: torch.randn(site.shape) for name, site in placement.sites.items()}


def test_stock_peft_loads_what_was_exported(architecture, tmp_path):
    """Law: PeftModel.from_pretrained on a fresh base gives the logits of the exported draw."""
    model = architecture.inject()
    placement, draw = placed(model)
    with torch.no_grad(), placement.placed(draw):
        ours = model(**architecture.inputs).logits
    assert export_adapter(model, placement, values=draw, folder=tmp_path / "draw") == tmp_path / "draw"
    stock = PeftModel.from_pretrained(architecture.base(), str(tmp_path / "draw")).eval()
    with torch.no_grad():
        theirs = stock(**architecture.inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert {file.name for file in (tmp_path / "draw").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


@bert
def test_export_leaves_the_model_as_it_was(architecture, tmp_path):
    """Law: exporting changes neither the weights nor the configuration of the model."""
    model = architecture.inject()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.peft_config["default"].to_dict()
    placement, draw = placed(model)
    export_adapter(model, placement, values=draw, folder=tmp_path)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    assert model.peft_config["default"].to_dict() == config


@bert
def test_only_adapter_and_head_are_written(architecture, tmp_path):
    """Law: the file holds each layer of each site once, and nothing of the base model."""
    model = architecture.inject()
    placement, draw = placed(model)
    export_adapter(model, placement, values=draw, folder=tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in draw.values())
    key = "base_model.model.bert.encoder.layer.2.attention.self.value.lora_B.weight"
    assert torch.equal(saved[key], draw["lora.value.B"][2])


@llama
def test_an_adapter_of_another_name_is_exported_to_the_same_place(architecture, tmp_path):
    """Law: the files lie in the folder given, whatever PEFT calls the adapter, and other adapters stay out."""
    model = architecture.inject(adapter="mine")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["o_proj"]))
    placement, draw = placed(model, "mine")
    export_adapter(model, placement, values=draw, folder=tmp_path / "out")
    assert all(file.is_file() for file in (tmp_path / "out").iterdir())
    with torch.no_grad(), placement.placed(draw):
        ours = model(**architecture.inputs).logits
    stock = PeftModel.from_pretrained(architecture.base(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(stock(**architecture.inputs).logits, ours, rtol=1e-6, atol=1e-6)


def test_an_adapter_saved_by_stock_peft_is_loaded(architecture, tmp_path):
    """Law: the loaded model is the saved one, and the values on its sites are the saved adapter's."""
    stock = architecture.inject()
    stock.save_pretrained(tmp_path)
    loaded = load_adapter(architecture.base(), tmp_path).eval()
    theirs, ours = Placement(stock, find_sites(stock)).current(), Placement(loaded, find_sites(loaded)).current()
    assert list(theirs) == list(ours) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        a, b = loaded(**architecture.inputs).logits, stock(**architecture.inputs).logits
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@llama
def test_missing_and_pickled_files_are_named(architecture, tmp_path):
    """Law: a folder without its files is an error that names what is missing; a pickle is not opened."""
    with pytest.raises(AdapterError, match=r"nowhere: no adapter_config\.json there; give a folder written by PEFT"):
        load_adapter(architecture.base(), tmp_path / "nowhere")
    architecture.inject().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors \(pickled adapters are not opened\)"):
        load_adapter(architecture.base(), tmp_path)


@llama
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_named(architecture, name, tmp_path):
    """Law: a file cut in half is an error that names the file."""
    architecture.inject().save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match=re.escape(str(tmp_path / name))):
        load_adapter(architecture.base(), tmp_path)


@llama
def test_other_kinds_of_adapter_are_refused(architecture, tmp_path):
    """Law: an adapter that is not LoRA, or of a kind that PEFT does not know, is refused by its type."""
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(architecture.base(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"an adapter of type .*IA3; only LORA can be sampled"):
        load_adapter(architecture.base(), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "peft_type": "UNHEARD_OF"}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read.*UNHEARD_OF"):
        load_adapter(architecture.base(), tmp_path)


@llama
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"megatron_config": {"x": 1}, "megatron_core": "this"}, "code of Megatron"),
        ({"peft_type": ["LORA"]}, "cannot be read"),
        ({"r": "x"}, "cannot be read|does not fit"),
        ({"task_type": 7}, "cannot be read"),
    ],
    ids=str,
)
def test_hostile_configurations_are_refused(architecture, fields, message, tmp_path):
    """Law: a configuration that asks for code, or whose fields have other types, is an error of ours; none is run."""
    architecture.inject().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(AdapterError, match=message):
        load_adapter(architecture.base(), tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read"):
        load_adapter(architecture.base(), tmp_path)


@bert
def test_an_adapter_for_another_base_is_refused(architecture, tmp_path):
    """Law: other modules, other widths, more or fewer layers, or no head: an error that names the folder."""
    architecture.inject().save_pretrained(tmp_path)
    base = type(architecture.base())
    config = architecture.base().config.to_dict()

    def other(**changes) -> torch.nn.Module:
        return base(type(architecture.base().config)(**{**config, **changes}))

    with pytest.raises(AdapterError, match=r"does not fit this base model: .*size mismatch"):
        load_adapter(other(hidden_size=32), tmp_path)
    with pytest.raises(AdapterError, match=r"only the file has .*layer\.2\.attention"):
        load_adapter(other(num_hidden_layers=2), tmp_path)
    with pytest.raises(AdapterError, match=r"only the model has .*layer\.3\.attention"):
        load_adapter(other(num_hidden_layers=4), tmp_path)
    with pytest.raises(AdapterError, match=rf"{re.escape(str(tmp_path))}: the adapter does not fit .*Target modules"):
        load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path)
    head = {k: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "classifier" not in k}
    save_file(head, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"does not fit this base model: 'base_model\.model\.classifier\.\w+'"):
        load_adapter(other(), tmp_path)


@llama
def test_a_base_with_adapters_is_refused(architecture, tmp_path):
    """Law: an adapter is never stacked on another by accident."""
    model = architecture.inject()
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="has adapters already"):
        load_adapter(model, tmp_path)


def test_the_fingerprint_does_not_see_adapters_precision_or_draws(architecture):
    """Law: one checkpoint, one fingerprint: under other adapter values, under a placed draw and in bfloat16."""
    model = architecture.inject()
    original = fingerprint(model)
    placement, draw = placed(model)
    with placement.placed(draw):
        assert fingerprint(model) == original
    with torch.no_grad():
        for site in placement.sites.values():
            for path, key in site.holders:
                model.get_submodule(path)._parameters[key].add_(1.0)
    assert fingerprint(model) == original
    assert fingerprint(model.to(torch.bfloat16)) == original
    assert len(original) == 64


@pytest.mark.parametrize("architecture", ["llama-embeddings", "gpt2", "mixtral-experts"], indirect=True)
def test_the_fingerprint_does_not_see_injection(architecture):
    """Law: injecting adapters (in embeddings, Conv1D, experts) leaves the fingerprint of a base without a head."""
    base = architecture.base()
    original = fingerprint(base.base_model)
    assert fingerprint(get_peft_model(base.base_model, _without_head(architecture.config()))) == original


def _without_head(config: LoraConfig) -> LoraConfig:
    config.task_type = None
    return config


@with_heads
def test_the_fingerprint_does_not_see_random_heads(architecture):
    """Law: two loads of one checkpoint differ in their new heads only, and have one fingerprint."""
    first, second = architecture.base(0), architecture.base(0)
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if name.split(".")[0] in ("classifier", "score", "classification_head"):
                parameter.normal_()
    a, b = (get_peft_model(base, architecture.config()) for base in (first, second))
    assert fingerprint(a) == fingerprint(b)


def test_the_fingerprint_sees_every_base_weight(architecture):
    """Law: a change of any one base tensor changes the fingerprint; so does another seed."""
    model = architecture.inject()
    original = fingerprint(model)
    assert fingerprint(architecture.inject(1)) != original
    frozen = [p for name, p in model.named_parameters() if not p.requires_grad and "original_module" not in name]
    assert len(frozen) > 5
    for parameter in frozen:
        before = parameter.clone()
        with torch.no_grad():
            parameter.add_(0.5)
            assert fingerprint(model) != original
            parameter.copy_(before)
    assert fingerprint(model) == original


@llama
def test_the_fingerprint_sees_names_and_shapes(architecture):
    """Law: the same numbers in another shape are another model."""
    values = torch.arange(12.0)
    tall, wide = torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        tall.weight.copy_(values.reshape(4, 3))
        wide.weight.copy_(values.reshape(3, 4))
    named = torch.nn.ModuleDict({"layer": tall})
    assert len({fingerprint(tall), fingerprint(wide), fingerprint(named)}) == 3
