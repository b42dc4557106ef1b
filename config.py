"""What can be set, and the named recipes that set it.

python train.py RECIPE [--any_field VALUE]
"""

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from model import GPTConfig
from support.checkpoints import load_checkpoint
from support.cli import UserError, as_user_error, parse


@dataclass
class FitConfig:
    """How to train anything."""

    max_steps: int = 2400  # optimiser steps
    stop_loss: float = 0.0  # stop as soon as the validation loss is at most this; 0: never
    patience: int = 0  # stop after so many validations without a better one; 0: never
    batch_size: int = 8  # sequences an optimiser step sees, over all devices
    grad_accum: int = 1  # pieces of the batch, divided among the devices: less memory, same result
    lr: float = 2e-3  # peak learning rate
    map_lr_scale: float = 10.0  # the feature maps' learning rate is this times lr
    warmup_steps: int = 100  # linear warm-up, then cosine decay to zero at max_steps
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # AdamW's memory of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    eval_interval: int = 200  # steps between validations; the best one's checkpoint is kept
    save_interval: int = 200  # steps between checkpoints
    log_interval: int = 10  # steps between lines of the log
    seed: int = 1  # of initialisation, batches and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast)
    kernel: str = "auto"  # of linear attention: auto, torch, cpp (CPU) or triton (CUDA)
    compile: bool = False  # torch.compile, linear attention left out: minutes to start, no gain on a CPU
    out_dir: str = ""  # checkpoints, log and curve; by default out/DATASET-ATTENTION
    resume: bool = False  # go on from the last checkpoint in out_dir, if there is one

    def check(self) -> None:
        """Raise ValueError for numbers that make no sense."""
        positive = "max_steps batch_size grad_accum lr map_lr_scale eval_interval save_interval log_interval".split()
        at_least_zero = "stop_loss patience warmup_steps weight_decay grad_clip seed".split()
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, not {self.seed}")
        for name in positive + at_least_zero + ["beta1", "beta2"]:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
                raise ValueError(f"{name} must be {'positive' if name in positive else 'zero or more'}, not {value}")
            if name.startswith("beta") and value >= 1:
                raise ValueError(f"{name} must be below 1, not {value}")


@dataclass
class TrainConfig(GPTConfig, FitConfig):
    """What `python train.py` takes: the model, how to fit it, and the data."""

    n_layer: int = 2  # number of blocks
    n_head: int = 2  # heads of each attention
    n_embd: int = 128  # width: C = H D
    block_size: int = 256  # tokens of context in training and evaluation
    rope_base: float = 100.0  # of rope: small, since 256 bytes are near each other (GPTConfig: 10000)
    qk_gain: float = 0.5  # scales the initial query and key projections: a gentle start for learned maps
    qk_bias: float = 1.0  # initial query and key biases, where bias is true; with rope, attention begins nearby
    dataset: str = "stdlib"  # stdlib, shakespeare, wikitext2, wikitext103 or text
    data_dir: str = ""  # local file or folder with the original text, instead of the hub
    tokenizer: str = "auto"  # bytes, gpt2, or auto: the data set's own
    init_from: str = ""  # start from the weights of this checkpoint or run folder
    eval_only: bool = False  # evaluate --init_from (or the best checkpoint in out_dir) and stop
    vocab_size: Annotated[int, tyro.conf.Fixed, tyro.conf.Suppress] = 256  # the tokenizer's
    eval_split: str = "validation"  # with --eval_only: validation, test or train
    eval_stride: int = 0  # tokens from window to window; 0: block_size, i.e. windows do not overlap
    eval_tokens: int = 65536  # about so many scored tokens, evenly spaced; 0: all (--eval_only: always all)
    sample_tokens: int = 240  # length of the sample at the end, within the training length; 0: none
    prompt: str = "def "  # how the sample begins

    def check(self) -> None:
        super().check()
        for name in ("eval_stride", "eval_tokens", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be zero or more, not {getattr(self, name)}")
        if not self.prompt or self.prompt.encode(errors="ignore").decode() != self.prompt:
            raise ValueError("prompt must be at least one character, and UTF-8")


# What each recipe changes of the defaults above.
RECIPES: dict[str, dict] = {
    # The first command: a small GPT on the source of Python's standard library, minutes on a laptop.
    "stdlib": dict(),
    # nanoGPT's first run, bytes instead of characters.
    "shakespeare": dict(
        dataset="shakespeare",
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
        rope_base=10000.0, qk_bias=0.0,
        batch_size=64, lr=1e-3, warmup_steps=100, max_steps=5000, eval_interval=250, save_interval=250,
    ),
    # The paper's model and optimiser on 2 million words: a rehearsal of the next one.
    "wikitext2": dict(
        dataset="wikitext2",
        n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.3, rope_base=10000.0, qk_gain=1.0, qk_bias=0.0,
        batch_size=32, grad_accum=4, lr=6e-4, map_lr_scale=1.0, weight_decay=0.01,
        warmup_steps=100, max_steps=1000, eval_interval=100, save_interval=100, eval_tokens=0, prompt=" = ",
    ),
    # Table 1 of the paper: 125M parameters, 1024 tokens, lr 6e-4, weight decay 0.01, AdamW (App. C.2).
    # Batch, epochs and dropout are not in the paper; these are what others use for it: 131,072 tokens a
    # step, 25 epochs of 118M tokens, dropout 0.2.
    "wikitext103": dict(
        dataset="wikitext103",
        n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.2, rope_base=10000.0, qk_gain=1.0, qk_bias=0.0,
        batch_size=128, grad_accum=16, lr=6e-4, map_lr_scale=1.0, weight_decay=0.01,
        warmup_steps=1000, max_steps=22500, eval_interval=500, save_interval=500, eval_tokens=0, prompt=" = ",
    ),
}  # fmt: skip


def read_config(argv: list[str], description: str) -> tuple[TrainConfig, set[str]]:
    """[RECIPE] --flags -> (configuration, names of the flags given). Raises UserError."""
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    if recipe and recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}, or leave it out")
    with as_user_error():
        default = TrainConfig(**RECIPES[recipe or "stdlib"])
        config, given = parse(default, argv, f"{description}\nRecipes: {', '.join(RECIPES)}.")
        config.check()
    if config.eval_only and not config.init_from:
        config.init_from = config.out_dir or f"out/{config.dataset}-{config.attention}"
    if config.init_from:  # the tokens and the data that it was trained on, unless told otherwise
        saved = load_checkpoint(config.init_from)[1]
        with as_user_error():
            GPTConfig.of(saved.get("config", {}))
        if "tokenizer" not in given:
            config.tokenizer = saved["tokenizer"]
        if "dataset" not in given and not recipe:
            before = saved["config"]
            config.dataset, config.data_dir = before["dataset"], config.data_dir or before["data_dir"]
    config.out_dir = config.out_dir or f"out/{config.dataset}-{config.attention}"
    return config, given
