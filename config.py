"""What can be set, and the named recipes that set it.

    python train.py RECIPE [--any_field VALUE]

The comment behind a field is its sentence in --help; a line `# -- NAME` begins a group there. What is
`may_change` may be set otherwise when a run is resumed.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from attention import attentions
from model import GPTConfig
from support.cli import UserError, as_user_error, parse, setting
from support.header import LANGUAGE_MODEL

may_change = partial(setting, may_change=True)


@dataclass
class FitConfig:
    """How to train anything."""

    # -- training
    max_steps: int = may_change(2400)  # number of optimiser steps
    batch_size: int = 8  # sequences that an optimiser step sees, over all devices
    lr: float = 2e-3  # peak learning rate of AdamW
    map_lr_scale: float = 10.0  # the learning rate of the feature maps is this times lr
    warmup_steps: int = setting(100, least=0)  # steps of linear warm-up; a cosine decay to zero follows
    weight_decay: float = setting(0.1, least=0)  # AdamW's weight decay, on matrices and embeddings
    beta1: float = setting(0.9, least=0, below=1)  # how long AdamW remembers the gradient
    beta2: float = setting(0.95, least=0, below=1)  # how long AdamW remembers the square of the gradient
    muon: bool = False  # orthogonal steps for the W of feature maps (Muon), in place of AdamW's
    grad_clip: float = setting(1.0, least=0)  # the largest norm of the gradient; 0: no limit
    grad_accum: int = may_change(1)  # pieces of the batch: less memory, the same result
    stop_loss: float = may_change(0.0)  # stop at a validation loss of at most this; 0: never
    patience: int = may_change(0)  # stop after so many validations without a better one; 0: never
    seed: int = setting(1, least=0, below=2**63)  # seed of initialisation, batches and dropout
    device: str = may_change("auto")  # where to run: auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"  # number format of matrix products: auto, float32 or bfloat16 (autocast)
    kernel: str = may_change("auto")  # form of linear attention: auto, torch, cpp (CPU) or triton (CUDA)
    compile: bool = may_change(False)  # torch.compile the model: minutes to start, no gain on a CPU
    # -- output
    out_dir: str = may_change("")  # folder of checkpoints, log and curve; by default out/DATASET-ATTENTION
    resume: bool = may_change(False)  # go on from the last checkpoint in out_dir, if there is one
    eval_interval: int = may_change(200)  # steps between validations; the best checkpoint is kept
    save_interval: int = may_change(200)  # optimiser steps between two checkpoints
    log_interval: int = may_change(10)  # steps between lines of the log

    def check(self) -> None:
        """Raise ValueError for settings that do not go together. `parse` has checked every number."""


@dataclass
class TrainConfig(GPTConfig, FitConfig):
    """What `python train.py` takes: the model, how to train it, and the data."""

    # -- model
    attention: str = "hedgehog"  # softmax, a feature map, or a system of zoo/
    n_layer: int = 2  # number of blocks (layers)
    n_head: int = 2  # heads of each attention
    n_embd: int = 128  # width of the model: C = H D
    block_size: int = 256  # tokens of context in training and evaluation
    rope_base: float = 100.0  # the slowest rotation of rope: small, since 256 bytes are near each other
    qk_gain: float = 0.5  # scales the initial query and key projections: a gentle start for learned maps
    qk_bias: float = 1.0  # initial query and key biases, if bias is true; with rope, attention begins nearby
    vocab_size: int = setting(256, hidden=True)  # that of the tokenizer
    # -- data
    dataset: str = "stdlib"  # stdlib, shakespeare, wikitext2, wikitext103 or text
    data_dir: str = may_change("")  # local file or folder with the original text, instead of the hub
    tokenizer: str = "auto"  # bytes, gpt2, or auto: that of the data set
    init_from: str = may_change("")  # start from the weights of this checkpoint or run folder
    # -- evaluation
    eval_only: bool = may_change(False)  # evaluate --init_from, or the best one in out_dir, and stop
    eval_split: str = may_change("validation")  # with --eval_only: validation, test or train
    eval_stride: int = may_change(0)  # tokens from window to window; 0: block_size, no overlap
    eval_tokens: int = may_change(65536, least=0)  # about so many scored tokens; 0, or --eval_only: all
    # -- output
    sample_tokens: int = may_change(240, least=0)  # length of the sample at the end; 0: no sample
    prompt: str = may_change("def ")  # how the sample begins

    def check(self) -> None:
        super().check()
        if not self.prompt or self.prompt.encode(errors="ignore").decode() != self.prompt:
            raise ValueError("prompt must be at least one character, and UTF-8")


# The model and optimiser of Table 1, before its data and batches: 125M parameters, 1024 tokens of context.
PAPER = dict(
    n_layer=12, n_head=12, n_embd=768, block_size=1024, rope_base=10000.0, qk_gain=1.0, qk_bias=0.0,
    lr=6e-4, map_lr_scale=1.0, weight_decay=0.01, eval_tokens=0, prompt=" = ",
)  # fmt: skip

# What each recipe changes of the defaults above.
RECIPES: dict[str, dict] = {
    # The first command: a small GPT on the source of Python's standard library, minutes on a laptop.
    "stdlib": dict(),
    # nanoGPT's first run, with bytes instead of characters.
    "shakespeare": dict(
        dataset="shakespeare", n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
        rope_base=10000.0, qk_bias=0.0, batch_size=64, lr=1e-3,
        warmup_steps=100, max_steps=5000, eval_interval=250, save_interval=250,
    ),
    # The model and optimiser of the paper on 2 million words: a rehearsal of the next recipe.
    "wikitext2": dict(
        PAPER, dataset="wikitext2", dropout=0.3, batch_size=32, grad_accum=4,
        warmup_steps=100, max_steps=1000, eval_interval=100, save_interval=100,
    ),
    # Table 1 of the paper: lr 6e-4, weight decay 0.01, AdamW (App. C.2). Batch, epochs and dropout are not in
    # the paper. These are what others use for this data: 131,072 tokens a step, 25 epochs of 118M tokens,
    # dropout 0.2.
    "wikitext103": dict(
        PAPER, dataset="wikitext103", dropout=0.2, batch_size=128, grad_accum=16,
        warmup_steps=1000, max_steps=22500, eval_interval=500, save_interval=500,
    ),
}  # fmt: skip


def read_config(argv: list[str], description: str) -> tuple[TrainConfig, set[str]]:
    """[RECIPE] --flags -> (configuration, names of the flags given). Raises UserError."""
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    if recipe and recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}, or leave it out")
    with as_user_error():
        default = TrainConfig(**RECIPES[recipe or "stdlib"])
        names = f"Recipes: {', '.join(RECIPES)}.\nAttentions: {', '.join(attentions())}."
        config, given = parse(default, argv, f"{description}\n{names}")
        config.check()
    if config.eval_only and not config.init_from:
        config.init_from = config.out_dir or f"out/{config.dataset}-{config.attention}"
    if config.init_from:  # the model, tokens and data of the checkpoint, unless flags say otherwise
        from support.checkpoints import load_checkpoint  # the recipes need only PyTorch, and no safetensors

        saved = load_checkpoint(config.init_from, LANGUAGE_MODEL)[1]
        with as_user_error():
            there = GPTConfig.of(saved["config"])
        config.attention = config.attention if "attention" in given else there.attention
        if "tokenizer" not in given:
            config.tokenizer = saved["tokenizer"]
        if "dataset" not in given and not recipe:
            before = saved["config"]
            config.dataset, config.data_dir = before["dataset"], config.data_dir or before["data_dir"]
    default = f"out/{config.dataset}-{config.attention}"
    at = Path(config.init_from).resolve()
    source = {at, at.parent} if config.init_from else set()  # the folder of the run, or a file in it
    if Path(default).resolve() in source:
        default += "-finetuned"
    config.out_dir = config.out_dir or default
    if Path(config.out_dir).resolve() in source and not (config.eval_only or config.resume):
        raise UserError(f"--out_dir {config.out_dir} is the run that --init_from names: name another folder")
    return config, given
