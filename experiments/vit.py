"""A vision transformer converted to linear attention, with the same controls as for text.

    python -m experiments.vit                             scikit-learn's digits
    python -m experiments.vit google/vit-base-patch16-224 --dataset imagenet
    python -m experiments.vit FOLDER --dataset imagenet --data_dir IMAGES

Digits are for a small ViT that is trained here. ImageNet-1k comes from the hub, or from a folder with
IMAGES/train/CLASS/* and IMAGES/validation/CLASS/*.

An image is a sequence of patches behind one class token, from which the class is read. Every query sees
every key. The command also draws patches.png: the patches that the class token attends to, with softmax and
with linear attention. Needs requirements-hf.txt. Digits need no download: three seeds of seven arms take 18
minutes on one CPU core (results/finetuned.md). ImageNet, the paper's ViT-B/16: 2 hours on one A100 and 14
hours of CPU cores to read images, an estimate (docs/gpu.md).
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attention import softmax_weights
from data import hub
from experiments import figures
from experiments.finetuned import (
    HELP,
    Examples,
    Model,
    RecoverConfig,
    of_seed,
    recover,
    subject_of,
    unfinetuned,
)
from experiments.metrics import queries_and_keys
from experiments.pretrained import check_shape, has_head
from hf.models import ImageClassifier, load, transformers
from support.cli import UserError, as_user_error, parse, run, setting
from support.hub import reason
from support.log import provenance
from swap import sockets

KIND = transformers.AutoModelForImageClassification
HEADS = ("classifier",)  # a model that is not finetuned may lack this
PAPER = dict(teacher=80.3, t2r_hh=77.0, hedgehog=79.5)  # ViT-B/16 on ImageNet-1k, top-1; second-hand


@dataclass
class ViTConfig(RecoverConfig):
    model: str = "digits"  # hub name or folder of a ViT; digits: a small one that is made here
    arms: list[str] = setting("teacher teacher_finetuned zero elu t2r t2r_hh hedgehog".split())
    # -- teacher
    teacher_lr: float = 2e-3  # peak learning rate of the teacher
    teacher_epochs: float = 40.0  # epochs of training the teacher
    # -- distillation
    distil_epochs: float = 40.0  # most epochs of distillation; an epoch of digits has 37 steps
    # -- training
    epochs: float = 20.0  # epochs of finetuning, for every arm, also the teacher
    lrs: list[float] = setting([1e-3])  # peak learning rates of finetuning that every arm tries
    # -- data
    dataset: str = "digits"  # digits (scikit-learn), or imagenet (from the hub or a folder)
    data_dir: str = ""  # imagenet: a folder with train/CLASS/* and validation/CLASS/*

    def check(self) -> None:
        super().check()
        if self.dataset not in ("digits", "imagenet"):
            raise UserError(f"--dataset takes digits or imagenet, not {self.dataset!r}")
        if self.dataset == "imagenet" and self.model == "digits":
            raise UserError("imagenet needs a model, such as google/vit-base-patch16-224")
        if self.dataset == "digits" and self.model != "digits":
            raise UserError(f"give --dataset imagenet for {self.model}")


# For imagenet: the model is finetuned already; one epoch of each stage, with the paper's rate.
IMAGENET = dict(lrs=[1e-5], distil_epochs=1.0, epochs=1.0, batch_size=64, dev_share=0.01, eval_interval=500)


def accuracy(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    return {"accuracy": 100 * float((labels == found).mean())}


def digits() -> Examples:
    """1,797 images of 8 x 8 pixels from -1 to 1. Every fourth image is for validation."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    rows = list(zip(images, y.tolist()))

    def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*rows)
        return torch.stack(images), torch.tensor(labels)

    train, test = [r for i, r in enumerate(rows) if i % 4], rows[::4]
    return Examples(train, {"validation": test}, collate, accuracy)


def imagenet(config: ViTConfig) -> tuple[Examples, int]:
    """(ImageNet-1k, the number of classes). Images are read when a batch needs them."""
    if config.data_dir:
        import datasets

        try:
            found = datasets.load_dataset("imagefolder", data_dir=config.data_dir)
        except Exception as e:  # as many types as files can be wrong
            raise UserError(
                f"cannot read images from {config.data_dir} ({reason(e)}): give a folder with "
                "train/CLASS/*.jpeg and validation/CLASS/*.jpeg"
            ) from e
    else:
        found = hub(
            "ILSVRC/imagenet-1k", remedy="accept its terms and log in there, or pass --data_dir FOLDER"
        )
    where = config.data_dir or config.dataset
    if missing := {"train", "validation"} - set(found):
        raise UserError(f"{where} has no images for: {', '.join(sorted(missing))}")
    if "label" not in found["train"].features:
        raise UserError(f"{where} has images of one class: give train/CLASS/* for each")
    try:
        processor = transformers.ViTImageProcessorPil.from_pretrained(config.model)
    except OSError as e:
        raise UserError(
            f"{config.model} has no preprocessor_config.json, which says how to prepare images"
        ) from e

    threads = ThreadPoolExecutor()  # decoding and scaling an image releases Python's lock

    def read(row: tuple[str, int]) -> tuple[Tensor, int]:
        split, i = row
        r = found[split][i]
        image = processor(r["image"].convert("RGB"), return_tensors="pt")
        return image["pixel_values"], r["label"]

    def collate(rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        pixels, labels = zip(*threads.map(read, rows))
        return torch.cat(pixels), torch.tensor(labels)

    train, test = ([(split, i) for i in range(len(found[split]))] for split in ("train", "validation"))
    classes = found["train"].features["label"].num_classes
    return Examples(train, {"validation": test}, collate, accuracy), classes


def small_vit() -> nn.Module:
    """For digits: 16 patches of 2 x 2 pixels, 2 layers, 2 heads of 32."""
    image = dict(image_size=8, patch_size=2, num_channels=1, num_labels=10)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**image, **sizes))


def models_of(config: ViTConfig, taught: bool, classes: int) -> Model:
    def load_classifier(source: str) -> ImageClassifier:
        if source == "digits":
            return ImageClassifier(small_vit())
        fresh = () if taught or source != config.model else HEADS
        return ImageClassifier(load(source, KIND, new=fresh, num_labels=classes))

    return Model(load_classifier, taught)


@torch.no_grad()
def draw_patches(config: ViTConfig, examples: Examples, model: Model) -> str:
    """What the class token of the last layer attends to, on the teacher's queries and keys."""
    mine = of_seed(config, examples, config.seed)
    teacher = config.model if model.taught else str(Path(mine.out_dir) / "teacher")
    net = unfinetuned("hedgehog", mine, subject_of(mine, examples, model, teacher))
    images, _ = examples.collate(next(iter(examples.tests.values()))[:8])
    q, k = queries_and_keys(net, images)[-1]
    weights = {  # (B, H, T, T)
        "softmax": softmax_weights(q, k, causal=False),
        "Hedgehog": sockets(net)[-1].attend.weights(q, k),
    }
    side = round((q.size(2) - 1) ** 0.5)  # patches in a row
    maps = {  # by name, one for each image: the mean over heads of the class token's weights
        name: [A[0, 1:].reshape(side, side).numpy() for A in of_images.mean(1)]
        for name, of_images in weights.items()
    }
    variation = np.mean([np.abs(a - b).sum() / 2 for a, b in zip(*maps.values())])
    title = (
        "What the class token attends to (last layer, mean over heads): "
        f"{variation:.0%} of the weight differs"
    )
    scaled = (images - images.min()) / (images.max() - images.min())
    drawn = scaled.permute(0, 2, 3, 1).squeeze(-1).numpy()  # (n, height, width[, channels])
    command = provenance()["command"]
    return figures.patches(Path(config.out_dir) / "patches.png", command, list(drawn), maps, title)


def main() -> None:
    with as_user_error():
        config, given = parse(ViTConfig(), sys.argv[1:], f"{__doc__}\n{HELP}", "model")
        if config.dataset == "imagenet":
            for name in IMAGENET.keys() - given:
                setattr(config, name, IMAGENET[name])
        config.check()
    config.out_dir = config.out_dir or f"out/vit-{Path(config.model).name}"
    if config.dataset == "digits":
        examples, model, paper = digits(), models_of(config, False, 10), {}
    else:
        what = "a vision transformer, such as google/vit-base-patch16-224"
        of_model = check_shape(config.model, KIND, what, text=False).config
        taught = has_head(of_model, "ForImageClassification")
        examples, n = imagenet(config)
        if taught and of_model.num_labels != n:
            raise UserError(f"{config.model} is for {of_model.num_labels} classes, and these images have {n}")
        model, paper = models_of(config, taught, n), PAPER
    facts = recover(config, examples, model, config.dataset, paper)
    if any(r["arm"] == "hedgehog" for r in facts.get("runs", [])):
        print(f"and {draw_patches(config, examples, model)}")


if __name__ == "__main__":
    run(main)
