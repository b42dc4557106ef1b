"""Convert a vision transformer to linear attention: its accuracy recovered, with the same controls as for text.

    python convert_vit.py                                    a small ViT, trained here on scikit-learn's handwritten
                                                             digits; minutes on a CPU, no download
    python convert_vit.py google/vit-base-patch16-224 --dataset imagenet      ImageNet-1k, from the hub
    python convert_vit.py FOLDER --dataset imagenet --data_dir IMAGES         IMAGES/train/CLASS/*, IMAGES/validation/

An image is a sequence of patches after one class token, from which the class is read; every query sees every key. Draws
patches.png: what the class token looks at, with softmax and with linear attention. Needs requirements-hf.txt.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attention import softmax_weights
from data import hub
from experiments import figures
from experiments.attention_maps import queries_and_keys
from experiments.ladder import need
from support.cli import UserError, as_user_error, parse, run
from support.devices import pick_device
from support.log import provenance

need("transformers", "sklearn")
from distill import sockets  # noqa: E402
from experiments.finetuned import HELP, Examples, Model, RecoverConfig, of_seed, recover, subject_of, unfinetuned  # noqa: E402
from hf.linearize import attention_modules, check_plain  # noqa: E402
from hf.models import ImageClassifier, load, read_config, transformers  # noqa: E402

KIND = transformers.AutoModelForImageClassification
HEADS = ("classifier",)  # what a model that is not finetuned may lack
PAPER = {"teacher": 80.3, "t2r_hh": 77.0, "hedgehog": 79.5}  # ViT-B/16 on ImageNet-1k, top-1; second-hand


@dataclass
class ViTConfig(RecoverConfig):
    model: str = "digits"  # hub name or folder of a ViT; digits: a small one for these, made here
    dataset: str = "digits"  # digits (scikit-learn's), or imagenet (from the hub, or a folder of images)
    data_dir: str = ""  # of imagenet: a folder with train/CLASS/* and validation/CLASS/*, instead of the hub
    arms: list[str] = field(default_factory=lambda: "teacher teacher_finetuned zero elu t2r t2r_hh hedgehog".split())
    lrs: list[float] = field(default_factory=lambda: [1e-3])  # peak learning rates of finetuning that every arm tries
    teacher_lr: float = 2e-3  # the teacher's
    teacher_epochs: float = 40.0  # of training it
    distil_epochs: float = 40.0  # at most, of distillation: an epoch has 37 steps here
    epochs: float = 20.0  # of finetuning, for every arm and for the teacher that is finetuned longer

    def check(self) -> None:
        super().check()
        if self.dataset not in ("digits", "imagenet"):
            raise UserError(f"--dataset takes digits or imagenet, not {self.dataset!r}")
        if (self.dataset == "imagenet") == (self.model == "digits"):
            raise UserError("digits go with digits: give a model for imagenet, as google/vit-base-patch16-224"
                            if self.model == "digits" else f"give --dataset imagenet for {self.model}")  # fmt: skip


# What the command sets for imagenet: the model is finetuned already; one epoch of each stage, with the paper's rate.
IMAGENET = dict(lrs=[1e-5], distil_epochs=1.0, epochs=1.0, batch_size=64, dev_share=0.01, eval_interval=500)


# ---------------------------------------------------------------- examples


def accuracy(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    return {"accuracy": 100 * float((labels == found).mean())}


def digits() -> Examples:
    """1,797 images of 8 x 8, their values from -1 to 1; every fourth one is for validation."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, y.tolist()
    rows = list(zip(images, labels))

    def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*rows)
        return torch.stack(images), torch.tensor(labels)

    train, test = [r for i, r in enumerate(rows) if i % 4], rows[::4]
    return Examples(train, {"validation": test}, collate, lambda row: 1, accuracy)


def imagenet(config: ViTConfig) -> tuple[Examples, int]:
    """(ImageNet-1k, how many classes it has). Images are read when a batch wants them."""
    if config.data_dir:
        import datasets

        try:
            found = datasets.load_dataset("imagefolder", data_dir=config.data_dir)
        except Exception as e:  # of as many types as files can be wrong
            reason = str(e).splitlines()[0][:160]
            raise UserError(f"cannot read images from {config.data_dir} ({reason}): give a folder with "
                            "train/CLASS/*.jpeg and validation/CLASS/*.jpeg") from e  # fmt: skip
    else:
        found = hub("ILSVRC/imagenet-1k", remedy="accept its terms and log in there, or pass --data_dir FOLDER")
    if missing := {"train", "validation"} - set(found):
        raise UserError(f"{config.data_dir or config.dataset} has no images for: {', '.join(sorted(missing))}")
    if "label" not in found["train"].features:
        raise UserError(f"{config.data_dir} has images of one class: give train/CLASS/* for each")
    try:
        processor = transformers.ViTImageProcessorPil.from_pretrained(config.model)
    except OSError as e:
        raise UserError(f"{config.model} has no preprocessor_config.json, which says how it wants its images") from e

    threads = ThreadPoolExecutor()  # decoding and scaling images frees Python's lock

    def read(row: tuple[str, int]) -> tuple[Tensor, int]:
        split, i = row
        r = found[split][i]
        return processor(r["image"].convert("RGB"), return_tensors="pt")["pixel_values"], r["label"]

    def collate(rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        pixels, labels = zip(*threads.map(read, rows))
        return torch.cat(pixels), torch.tensor(labels)

    sets = {split: [(split, i) for i in range(len(found[split]))] for split in ("train", "validation")}
    classes = found["train"].features["label"].num_classes
    return Examples(sets["train"], {"validation": sets["validation"]}, collate, lambda row: 1, accuracy), classes


# ---------------------------------------------------------------- models


def small_vit() -> nn.Module:
    """For digits: 16 patches of 2 x 2 pixels, 2 layers, 2 heads of 32."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, num_labels=10,
    ))  # fmt: skip


def check_vit(config: ViTConfig) -> int | None:
    """How many classes the model is finetuned on, if it is. Raises UserError for what is no ViT."""
    of_model = read_config(config.model)
    try:
        with torch.device("meta"):
            modules = attention_modules(KIND.from_config(of_model))
        for module in modules:
            check_plain(module)
        if not modules:
            raise ValueError(f"{of_model.model_type} has no attention of a known kind")
    except ValueError as e:
        reason = str(e).splitlines()[0][:160]
        raise UserError(f"{config.model} is no vision transformer that can be converted ({reason}): give a hub name or "
                        "a folder, as google/vit-base-patch16-224") from e  # fmt: skip
    taught = any("ForImageClassification" in kind for kind in of_model.architectures or [])
    return of_model.num_labels if taught else None


def models_of(config: ViTConfig, taught: bool, classes: int) -> Model:
    def load_classifier(source: str) -> ImageClassifier:
        if source == "digits":
            return ImageClassifier(small_vit())
        fresh = () if taught or source != config.model else HEADS
        return ImageClassifier(load(source, KIND, new=fresh, num_labels=classes))

    return Model(load_classifier, lambda model, folder: model.hf.save_pretrained(folder), taught, "")


# ---------------------------------------------------------------- the picture


@torch.no_grad()
def draw_patches(config: ViTConfig, examples: Examples, model: Model, n: int = 8) -> str:
    """What the class token of the last layer looks at, heads averaged, on the teacher's queries and keys."""
    mine = of_seed(config, examples, config.seed)
    teacher = config.model if model.taught else str(Path(mine.out_dir) / "teacher")
    net = unfinetuned("hedgehog", mine, subject_of(mine, examples, model, teacher))
    images, _ = examples.collate(next(iter(examples.tests.values()))[:n])
    q, k = queries_and_keys(net, images.to(pick_device(config.device)))[-1]
    A = {"softmax": softmax_weights(q, k, causal=False), "Hedgehog": sockets(net)[-1].attend.weights(q, k)}
    side = round((q.size(2) - 1) ** 0.5)
    maps = {name: [a[0, 1:].reshape(side, side).numpy() for a in w.mean(1).cpu()] for name, w in A.items()}
    elsewhere = np.mean([np.abs(a - b).sum() / 2 for a, b in zip(*maps.values())])  # total variation
    title = f"What the class token attends to (last layer, mean over heads): {elsewhere:.0%} of the weight differs"
    drawn = ((images - images.min()) / (images.max() - images.min())).permute(0, 2, 3, 1).squeeze(-1).numpy()
    return figures.patches(Path(config.out_dir) / "patches.png", list(drawn), maps, title, provenance()["command"])


# ---------------------------------------------------------------- the command


def main() -> None:
    with as_user_error():
        config, given = parse(ViTConfig(), sys.argv[1:], f"{__doc__}\n{HELP}", "model")
        if config.dataset == "imagenet":
            for name, value in IMAGENET.items():
                if name not in given:
                    setattr(config, name, value)
        config.check()
    config.out_dir = config.out_dir or f"out/vit-{Path(config.model).name}"
    if config.dataset == "digits":
        examples, model = digits(), models_of(config, False, 10)
    else:
        trained_for = check_vit(config)
        examples, classes = imagenet(config)
        if trained_for not in (None, classes):
            raise UserError(f"{config.model} is for {trained_for} classes, and these images have {classes}")
        model = models_of(config, trained_for is not None, classes)
    facts = recover(config, examples, model, config.dataset, PAPER if config.dataset == "imagenet" else {})
    if any(r["arm"] == "hedgehog" for r in facts.get("runs", [])):
        print(f"and {draw_patches(config, examples, model)}")


if __name__ == "__main__":
    run(main)
