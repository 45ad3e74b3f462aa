"""The posterior: draws, predictions, files in and out, PEFT export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference import archive
from pyrolora.inference.archive import ArchiveError
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.program import PyroLoRA
from pyrolora.tasks.sequence_classification import SequenceClassification
from tests.programs import (
    PRIORS,
    language_posterior,
    lora,
    sentence_task,
    sentences,
    tiny_bert,
    tiny_program,
    tokenizer,
)


def moved(guide: MeanField | MAP, *, seed: int = 0) -> Posterior:
    """A posterior whose guide is away from its start, with visible noise."""
    program = tiny_program()
    guide.bind(program)
    with torch.no_grad(), isolated(seed + 10):
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Posterior(program, guide)


def logits_by_hand(posterior: Posterior, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Copies one draw into a fresh stock PEFT model and runs it."""
    data = sentence_task().test
    assert data is not None
    with torch.no_grad():
        model = posterior.program.model.eval()
        state = dict(model.named_parameters())
        kept = {n: p.clone() for n, p in state.items()}
        for name, site in posterior.program.sites.items():
            for (path, parameter), layer in zip(site.holders, values[name], strict=True):
                state[f"{path}.{parameter}"].copy_(layer)
        batch = sentence_task().collate(list(data))
        labels = batch.pop("labels")
        out = model(**batch).logits
        for n, p in state.items():
            p.copy_(kept[n])
    assert labels is not None
    return out


def test_predict_is_the_average_of_probabilities_over_draws() -> None:
    """Law: p(y|x) = mean over draws of softmax, each draw as stock PEFT computes it; not the softmax of the mean."""
    posterior = moved(MeanField(random="*"))
    prediction = posterior.predict(sentence_task().test, 5, batch_size=5)
    draws = posterior.draw(5)
    by_hand = torch.stack(
        [logits_by_hand(posterior, {n: v[s] for n, v in draws.items()}).softmax(-1) for s in range(5)]
    )
    assert prediction.draws is not None
    assert torch.allclose(prediction.draws.exp(), by_hand, atol=1e-5)
    assert torch.allclose(prediction.mean, by_hand.mean(0), atol=1e-5)
    assert not torch.allclose(prediction.mean, by_hand.log().mean(0).softmax(-1), atol=1e-3)


def test_vectorised_equals_one_by_one() -> None:
    """Law: vmap over draws, in chunks, gives what running draw by draw gives."""
    posterior = moved(MeanField(random="*"))
    data = sentence_task().test
    fast = posterior.predict(data, 6, chunk_size=4)
    slow = posterior.predict(data, 6, vectorise=False)
    assert torch.allclose(fast.log_mean, slow.log_mean, atol=1e-5)


def test_zero_draws_use_the_mean_weights() -> None:
    """Law: num_draws = 0 predicts with the posterior's mean weights."""
    posterior = moved(MeanField(random="*"))
    prediction = posterior.predict(sentence_task().test, 0)
    assert prediction.num_draws == 1
    expected = logits_by_hand(posterior, posterior.mean()).log_softmax(-1)
    assert torch.allclose(prediction.log_mean, expected, atol=1e-5)


def test_prediction_keeps_the_order_of_the_data() -> None:
    """Law: rows come back in the data's order whatever the batch size."""
    posterior = moved(MeanField())
    data = sentence_task().test
    one, many = posterior.predict(data, 2, batch_size=1), posterior.predict(data, 2, batch_size=12)
    assert torch.allclose(one.log_mean, many.log_mean, atol=1e-5)
    assert one.labels is not None and one.labels.tolist() == data["labels"][:]
    assert one.texts == tuple(data["text"][:])


def test_a_point_estimate_runs_once() -> None:
    """Law: without random sites one pass is the predictive, and its epistemic uncertainty is zero."""
    prediction = moved(MAP()).predict(sentence_task().test, 16)
    assert prediction.num_draws == 1
    assert prediction.mutual_information.abs().max() < 1e-6


def test_log_likelihood_is_of_the_observed_label() -> None:
    """Law: log p(y_n | x_n, θ_s) picks the observed class from each draw's log probabilities."""
    posterior = moved(MeanField(random="*"))
    data = sentence_task().test
    values = posterior.log_likelihood(data, 3)
    prediction = posterior.predict(data, 3)
    assert prediction.draws is not None
    expected = prediction.draws.gather(-1, torch.tensor(data["labels"][:]).expand(3, -1).unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(values, expected, atol=1e-5)


def test_log_likelihood_under_draws_of_some_sites() -> None:
    """Law: with sites= the other random sites stand at their mean: it is that of a posterior random there alone."""
    posterior, data = moved(MeanField(random="*")), sentence_task().test
    values = posterior.log_likelihood(data, 3, sites="lora.query.*")
    draws, mean = posterior.draw(3), posterior.mean()
    for s in range(3):
        chosen = {name: draws[name][s] if name.startswith("lora.query.") else mean[name] for name in mean}
        expected = logits_by_hand(posterior, chosen).log_softmax(-1)[range(12), data["labels"][:]]
        assert torch.allclose(values[s], expected, atol=1e-4)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    """Law: a posterior on a fresh base gives the same draws and predictions; files are safetensors and JSON."""
    posterior = moved(MeanField(random="*", noise="example"))
    posterior.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())
    mine, its = posterior.draw(2), loaded.draw(2)
    assert all(torch.equal(mine[n], its[n]) for n in mine)
    data = sentence_task().test
    assert torch.equal(posterior.predict(data, 3).log_mean, loaded.predict(data, 3).log_mean)
    assert repr(loaded) == repr(posterior)


@pytest.mark.parametrize("name", ["posterior.json", "posterior.safetensors", "adapter_config.json"])
def test_missing_or_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    """Law: a missing or truncated file is an error that names it, never a half-loaded posterior."""
    moved(MeanField()).save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArchiveError, match=name):
        Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())
    (tmp_path / name).unlink()
    with pytest.raises(ArchiveError, match=name):
        Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    """Law: a posterior loads only onto the weights that it was fitted on."""
    moved(MeanField()).save_pretrained(tmp_path)
    with pytest.raises(ArchiveError, match="fingerprints differ"):
        Posterior.from_pretrained(tmp_path, tiny_bert(seed=5), task=sentence_task())
    with pytest.raises(ArchiveError, match="made for sites"):
        Posterior.from_pretrained(tmp_path, tiny_bert(layers=3), task=sentence_task())


def forge(folder: Path, adapter: dict | None = None, **fields: object) -> None:
    """Changes metadata and configuration, and renews the checksums."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(adapter or {})}))
    meta = {**json.loads((folder / "posterior.json").read_text()), **fields}
    archive.write_json(folder / "posterior.json", archive.sealed({**meta, "adapter_sha256": archive.digest(path)}))


def test_another_configuration_is_noticed(tmp_path: Path) -> None:
    """Law: an adapter_config.json of another scaling, whose sites are the same, is not the posterior's."""
    moved(MeanField()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(ArchiveError, match=r"adapter_config\.json is damaged, or not the file"):
        Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 3}, "made for sites"),
        ({"target_modules": ["query"]}, "made for sites"),
        ({"target_modules": ["nothing"]}, "does not fit this base model"),
        ({"r": "many"}, "does not fit this base model|cannot be read"),
        ({"r": 10**12}, "does not fit this base model"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"megatron_config": {"x": 1}, "megatron_core": "this"}, "code of Megatron"),
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "this"}}, None),  # is not followed
    ],
    ids=str,
)
def test_hostile_and_foreign_configurations(tmp_path: Path, adapter: dict, message: str | None) -> None:
    """Law: another rank, other modules, other kinds and configurations that ask for code are refused, with every
    checksum right; nothing that a file names is imported."""
    moved(MeanField()).save_pretrained(tmp_path)
    forge(tmp_path, adapter)
    sys.modules.pop("this", None)
    if message is None:
        assert Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task()).draw(1)
    else:
        with pytest.raises(ArchiveError, match=message):
            Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())
    assert "this" not in sys.modules


def test_other_versions_of_peft(tmp_path: Path) -> None:
    """Law: the version of PEFT is recorded, not required: fields that this one does not know are said to be ignored."""
    moved(MeanField()).save_pretrained(tmp_path)
    forge(tmp_path, {"peft_version": "99.0", "field_of_the_future": 1}, versions={"peft": "99.0"})
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task()).draw(1)


def test_state_of_another_guide_is_refused(tmp_path: Path) -> None:
    """Law: tensors that do not belong to the described guide are an error."""
    moved(MeanField()).save_pretrained(tmp_path)
    forge(tmp_path, guide={"class": "guides.MAP", "init": {}})
    with pytest.raises(ArchiveError, match="does not fit"):
        Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())


def test_own_prior_must_be_given_again(tmp_path: Path) -> None:
    """Law: a user's own prior is code, so the file does not hold it; giving it again loads."""
    priors: dict[str, Prior] = {
        "*.A": lambda site: PRIORS["*.A"](site),
        **{k: v for k, v in PRIORS.items() if k != "*.A"},
    }
    with isolated(0):
        program = PyroLoRA(tiny_bert(), lora(), priors=priors, task=sentence_task())
    guide = MeanField()
    guide.bind(program)
    Posterior(program, guide).save_pretrained(tmp_path)
    with pytest.raises(ArchiveError, match=r"\*\.A.*give priors="):
        Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())
    assert Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task(), priors=priors).draw(1)


@pytest.mark.parametrize("draw", ["mean", 0, 2])
def test_exported_adapters_load_in_stock_peft_with_equal_logits(tmp_path: Path, draw: str | int) -> None:
    """Law: the mean and every draw are ordinary PEFT adapters with the logits of that value of the sites."""
    posterior = moved(MeanField(random="*"))
    before = {n: p.clone() for n, p in posterior.program.model.named_parameters()}
    posterior.export_peft(tmp_path / "adapter", draw=draw)
    stock = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "adapter")).eval()
    batch = sentence_task().collate(list(sentence_task().test))
    batch.pop("labels")
    values = posterior.mean() if draw == "mean" else {n: v[draw] for n, v in posterior.draw(3).items()}
    with torch.no_grad():
        assert torch.allclose(stock(**batch).logits, logits_by_hand(posterior, values), atol=1e-6)
    assert all(torch.equal(p, before[n]) for n, p in posterior.program.model.named_parameters())


def test_imported_adapter_is_where_a_guide_starts(tmp_path: Path) -> None:
    """Law: a PEFT folder becomes the starting point of a guide: its mean has the adapter's logits."""
    trained = moved(MAP())
    trained.export_peft(tmp_path / "adapter")
    program = PyroLoRA(tiny_bert(), tmp_path / "adapter", priors=PRIORS, task=sentence_task())
    guide = MeanField()
    guide.bind(program)
    data = sentence_task().test
    assert torch.allclose(
        Posterior(program, guide).predict(data, 0).log_mean, trained.predict(data).log_mean, atol=1e-5
    )


def test_bad_requests_say_what_to_do() -> None:
    """Law: wrong data or draws stop with a message that names the remedy."""
    posterior = moved(MeanField())
    with pytest.raises(TypeError, match=r"task\.tokenise"):
        posterior.predict([{"text": "x"}])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        posterior.draw(0)
    with pytest.raises(ValueError, match='"mean" or an index'):
        posterior.export_peft("nowhere", draw="median")


def test_logits_of_next_tokens_are_of_one_length() -> None:
    """Law: blocks of one length give (S, n, T−1, V) whatever the batches; shorter ones stop and say what to use."""
    posterior = language_posterior(MeanField(random="*"))
    task = posterior.program.task
    assert task is not None
    whole = task.train.filter(lambda row: len(row["input_ids"]) == 8)
    values = posterior.logits(whole, 2, batch_size=1)
    assert values.shape == (2, len(whole), 7, len(tokenizer()))
    assert torch.allclose(values, posterior.logits(whole, 2), atol=1e-4)
    assert 0 < len(whole) < len(task.train)
    for batch_size in (1, 32):
        with pytest.raises(ValueError, match=r"Use log_likelihood, or\s.*token_uncertainty"):
            posterior.logits(task.train, 2, batch_size=batch_size)


def test_logits_serve_regression() -> None:
    """Law: for regression, logits are draws of the mean function, and the noise scale is a site."""
    task = SequenceClassification(
        tokenizer(), train=sentences(24).map(lambda row: {"label": float(row["label"])}), regression=True, max_length=16
    )
    with isolated(0):
        program = PyroLoRA(tiny_bert(labels=1), lora(), priors=PRIORS, task=task)
    guide = MeanField(random="*")
    guide.bind(program)
    posterior = Posterior(program, guide)
    assert "likelihood.scale" in posterior.draw(1)
    values = posterior.logits(task.train, 3)
    assert values.shape == (3, 24)
    draws = posterior.draw(3)
    expected = torch.distributions.Normal(values, draws["likelihood.scale"].unsqueeze(-1)).log_prob(
        torch.tensor(task.train["labels"][:])
    )
    assert torch.allclose(posterior.log_likelihood(task.train, 3), expected, atol=1e-4)
    with pytest.raises(TypeError, match="Normal use logits or log_likelihood"):
        posterior.predict(task.train)
