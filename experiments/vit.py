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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate

from data import hub
from experiments import figures
from experiments.finetuned import (
    HELP,
    RecoverConfig,
    Task,
    of_seed,
    recover,
    split_dev,
    subject_of,
    unfinetuned,
)
from experiments.metrics import all_weights, queries_and_keys
from experiments.pretrained import check_shape, is_taught
from hf.models import ImageClassifier, load, transformers
from support.cli import UserError, as_user_error, parse, run, setting
from support.hub import one_line
from support.provenance import provenance

KIND = transformers.AutoModelForImageClassification
PAPER = dict(teacher=80.3, t2r_hh=77.0, hedgehog=79.5)  # ViT-B/16 on ImageNet-1k, top-1; second-hand


@dataclass
class ViTConfig(RecoverConfig):
    model: str = "digits"  # hub name or folder of a ViT; digits: a small one that is made here
    arms: list[str] = setting("teacher teacher_finetuned zero elu t2r t2r_hh hedgehog".split())
    teacher_lr: float = 2e-3
    teacher_epochs: float = 40.0
    distil_epochs: float = 40.0  # most epochs of distillation; an epoch of digits has 37 steps
    epochs: float = 20.0
    lrs: list[float] = setting([1e-3])
    dataset: str = setting("digits", choices=["digits", "imagenet"])  # digits are those of scikit-learn
    data_dir: str = ""  # imagenet: a folder with train/CLASS/* and validation/CLASS/*

    def check(self) -> None:
        super().check()
        if self.dataset == "imagenet" and self.model == "digits":
            raise UserError("imagenet needs a model, such as google/vit-base-patch16-224")
        if self.dataset == "digits" and self.model != "digits":
            raise UserError(f"give --dataset imagenet for {self.model}")


# For imagenet: the model is finetuned already; one epoch of each stage, with the paper's rate.
IMAGENET = dict(lrs=[1e-5], distil_epochs=1.0, epochs=1.0, batch_size=64, dev_share=0.01, eval_interval=500)


def accuracy(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    return {"accuracy": 100 * float((labels == found).mean())}


def digits(config: ViTConfig) -> Task:
    """1,797 images of 8 x 8 pixels from -1 to 1, for a ViT with 2 layers and 2 heads of 32, which sees 16
    patches of 2 x 2 pixels. Every fourth image is for validation."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    rows = list(zip(images, y.tolist()))
    image = dict(image_size=8, patch_size=2, num_channels=1, num_labels=10)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    small = transformers.ViTConfig(**image, **sizes)

    def load_classifier(source, new):
        return ImageClassifier(KIND.from_config(small) if new else load(source, KIND))

    train = split_dev([row for i, row in enumerate(rows) if i % 4], config)
    return Task(*train, {"validation": rows[::4]}, default_collate, accuracy, load_classifier)


def imagenet(config: ViTConfig) -> Task:
    """ImageNet-1k. Images are read when a batch needs them."""
    what = "a vision transformer, such as google/vit-base-patch16-224"
    of_model = check_shape(config.model, KIND, what, text=False).config
    if config.data_dir:
        import datasets

        advice = "give a folder with train/CLASS/*.jpeg and validation/CLASS/*.jpeg"
        task = f"read images from {config.data_dir}"
        with one_line("datasets", task, advice, Exception):  # as many types as files can be wrong
            found = datasets.load_dataset("imagefolder", data_dir=config.data_dir)
    else:
        remedy = "accept its terms and log in there, or pass --data_dir FOLDER"
        found = hub("ILSVRC/imagenet-1k", remedy=remedy)
    where = config.data_dir or config.dataset
    if missing := {"train", "validation"} - set(found):
        raise UserError(f"{where} has no images for: {', '.join(sorted(missing))}")
    if "label" not in found["train"].features:
        raise UserError(f"{where} has images of one class: give train/CLASS/* for each")
    try:
        processor = transformers.ViTImageProcessorPil.from_pretrained(config.model)
    except OSError as e:
        what = "preprocessor_config.json, which says how to prepare images"
        raise UserError(f"{config.model} has no {what}") from e

    threads = ThreadPoolExecutor()  # decoding and scaling an image releases Python's lock

    def read(row):
        split, i = row
        r = found[split][i]
        return processor(r["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0], r["label"]

    def load_classifier(source, new):
        head = ("classifier",) if new else ()  # a model that is not finetuned may lack this
        return ImageClassifier(load(source, KIND, new=head, num_labels=classes))

    train, test = ([(split, i) for i in range(len(found[split]))] for split in ("train", "validation"))
    classes = found["train"].features["label"].num_classes
    return Task(
        *split_dev(train, config),
        tests={"validation": test},
        collate=lambda rows: default_collate(list(threads.map(read, rows))),
        scores=accuracy,
        load=load_classifier,
        taught=is_taught(of_model, KIND, classes, config.dataset),
    )


@torch.no_grad()
def draw_patches(config: ViTConfig, task: Task) -> str:
    """What the class token of the last layer attends to, on the teacher's queries and keys."""
    mine = of_seed(config, task, config.seed)
    net, own = unfinetuned(replace(mine, arms=["hedgehog"]), subject_of(mine, task))
    images, _ = task.collate(task.tests["validation"][:8])
    q, k = queries_and_keys(net, images)[-1]
    weights = all_weights(q, k, False, {"Hedgehog": own[-1]})  # by name: (B, H, T, T)
    side = round((q.size(2) - 1) ** 0.5)  # patches in a row
    maps = {  # by name, one for each image: the mean over heads of the class token's weights
        name: list(A.mean(1)[:, 0, 1:].unflatten(1, (side, side)).numpy()) for name, A in weights.items()
    }
    variation = np.mean([np.abs(a - b).sum() / 2 for a, b in zip(*maps.values())])
    title = f"What the class token attends to (last layer, mean over heads): {variation:.0%} of the weight differs"
    scaled = (images - images.min()) / (images.max() - images.min())
    drawn = list(scaled.permute(0, 2, 3, 1).squeeze(-1).numpy())  # (height, width[, channels]) each
    path = Path(config.out_dir) / "patches.png"
    return figures.patches(path, provenance()["command"], drawn, maps, title)


def main() -> None:
    with as_user_error():
        config, given = parse(ViTConfig(), sys.argv[1:], f"{__doc__}\n{HELP}", "model")
        if config.dataset == "imagenet":
            for name in IMAGENET.keys() - given:
                setattr(config, name, IMAGENET[name])
        config.check()
    config.out_dir = config.out_dir or f"out/vit-{Path(config.model).name}"
    task, paper = (digits(config), {}) if config.dataset == "digits" else (imagenet(config), PAPER)
    facts = recover(config, task, config.dataset, paper)
    if any(r["arm"] == "hedgehog" for r in facts.get("runs", [])):
        print(f"and {draw_patches(config, task)}")


if __name__ == "__main__":
    run(main)
