from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pyrolora.guides.map import MAP
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.data import DataError
from pyrolora.tasks.image_classification import ImageClassification

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


def image(level: int, mode: str = "RGB", size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.new(mode, size, level if mode == "L" else (level, 255 - level, level))


def data(labels: list[int | None], **columns: object) -> datasets.Dataset:
    """Bright images and dark ones."""
    rows = {"image": [image(30 * i) for i in range(len(labels))], "label": labels, **columns}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def base(folder: Path, labels: int = 3) -> str:
    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, num_labels=labels, **SIZES)
    ViTForImageClassification(config).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)


def test_batches_are_what_the_processor_makes_of_each_image() -> None:
    """Law: pixel values are (b, channels, height, width), those of each image alone, grey ones in three channels."""
    rows = datasets.Dataset.from_dict({"image": [image(9), image(7, "L")], "label": ["cat", "dog"]})
    task = ImageClassification(PROCESSOR, train=rows.cast_column("image", datasets.Image()))
    batch = task.collate(list(task.train))
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["labels"].tolist() == [0, 1]
    # One colour stays one colour, and is normalised to (value / 255 − 0.5) / 0.5.
    for n, colour in enumerate([(9, 246, 9), (7, 7, 7)]):
        expected = torch.tensor(colour).view(3, 1, 1).expand(3, 16, 16) / 127.5 - 1
        torch.testing.assert_close(batch["pixel_values"][n], expected, atol=1e-5, rtol=0)
    assert task.class_names == ("cat", "dog") and "labels" not in task.collate([{"image": image(3)}])


def test_images_are_told_apart_by_their_text() -> None:
    """Law: equal images have the same text, others another, and it says the size."""
    rows = datasets.Dataset.from_dict({"image": [image(1), image(1), image(2)], "label": [0, 1, 0]})
    first, second, third = ImageClassification(PROCESSOR, train=rows).train["text"][:]
    assert first == second != third and first.startswith("20 × 30 image ")


def test_unknown_labels_and_missing_images() -> None:
    """Law: a row without image or class stops with its number in training; out of distribution labels become −1."""
    with pytest.raises(DataError, match="row 2: no 'label'"):
        ImageClassification(PROCESSOR, train=data([0, None, 1]), class_names=["a", "b"])
    with pytest.raises(DataError, match=r"row 3: 'label' 2 is not one of the classes 'a', 'b'"):
        ImageClassification(PROCESSOR, train=data([0, 1, 2]), class_names=["a", "b"])
    holes = datasets.Dataset.from_dict({"image": [image(3), None], "label": [0, 1]})
    with pytest.raises(DataError, match="row 2: no 'image'"):
        ImageClassification(PROCESSOR, train=holes.cast_column("image", datasets.Image()))
    with pytest.raises(DataError, match="column 'label' holds no images"):
        ImageClassification(PROCESSOR, train=data([0, 1]), image="label")
    with pytest.raises(DataError, match="no column 'img'"):
        ImageClassification(PROCESSOR, train=data([0, 1]), image="img")
    assert ImageClassification(PROCESSOR, train=data([0, 1]), ood={"far": data([7, 1])}).ood["far"]["labels"][:] == [
        -1,
        1,
    ]


def test_declared_classes_and_a_head_of_another_size(tmp_path: Path) -> None:
    """Law: class names are those that the data declare, and a checkpoint's head of other classes gives way."""
    rows = data([0, 1, 1, 0]).cast_column("label", datasets.ClassLabel(names=["dark", "bright"]))
    task = ImageClassification(ImageClassification.load_processor(base(tmp_path)), train=rows)
    model = task.load_base_model(str(tmp_path), dtype="float32")
    assert model.config.id2label == {0: "dark", 1: "bright"} and model.classifier.out_features == 2


def test_images_are_fitted_and_predicted(tmp_path: Path) -> None:
    """Law: a program over a vision model learns to tell bright images from dark ones."""
    rows = data([0, 0, 0, 0, 1, 1, 1, 1])
    task = ImageClassification(PROCESSOR, train=rows, test=rows)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    program = PyroLoRA(task.load_base_model(base(tmp_path)), lora, priors={"*": Normal(1.0)}, task=task)
    arguments = default_arguments(None, seed=0)
    arguments.max_steps, arguments.learning_rate, arguments.warmup_steps = 40, 2e-2, 0
    prediction = fit(program, MAP(), args=arguments).predict(task.test)
    assert prediction.mean.argmax(-1).tolist() == rows["label"][:]
    assert list(prediction.to_pandas()["text"]) == task.test["text"][:]
