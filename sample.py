"""Text from a checkpoint, printed as it is made.

    python sample.py                                       the newest run in out/
    python sample.py out/stdlib-hedgehog --prompt "class Queue"
    python sample.py out/stdlib-hedgehog --prompt_file queue.py --max_new_tokens 5000
    echo "import os" | python sample.py out/stdlib-hedgehog --prompt -

By default the text is as long as the training sequences. With linear attention and RoPE it may be of any
length, at constant memory and speed; but beyond the training length it gets worse.
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import fused
from feature_maps import FEATURE_MAPS
from model import GPT, GPTConfig
from support.checkpoints import LANGUAGE_MODEL, load_checkpoint, restore
from support.cli import UserError, as_user_error, parse, run, setting
from support.devices import pick_device


@dataclass
class SampleConfig:
    checkpoint: str = ""  # a run's folder or a .safetensors file; by default the newest run in out/
    prompt: str = "\n"  # the text to continue; - reads it from standard input
    prompt_file: str = ""  # a file with the text to continue
    max_new_tokens: int = -1  # how many tokens to add; -1: up to the length that the model was trained on
    temperature: float = setting(0.8, least=0)  # 0: the likeliest token; 1: the distribution of the model
    top_k: int = 0  # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # draw from the fewest tokens that together have this probability
    seed: int = setting(1, least=0, below=2**63)  # the same seed gives the same text
    device: str = "auto"  # where to run: auto, cpu, cuda, cuda:N or mps
    kernel: str = "auto"  # form of linear attention: auto, torch, cpp (CPU) or triton (CUDA)

    def check(self) -> None:
        """Raise UserError for settings that do not go together."""
        if self.top_p > 1:
            raise UserError(f"--top_p must be at most 1, not {self.top_p}")
        if self.prompt_file and self.prompt != SampleConfig.prompt:
            raise UserError("give --prompt or --prompt_file, not both")


def newest_run() -> Path:
    runs = sorted(Path("out").glob("*/*.safetensors"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError("there is no run in out/: train one with python train.py, or name a checkpoint")
    return runs[-1].parent


def read_prompt(config: SampleConfig) -> str:
    if config.prompt_file:
        return data.read_text(Path(config.prompt_file))
    if (piped := config.prompt == "-") and sys.stdin is None:
        raise UserError("there is no standard input to read the prompt from: use --prompt or --prompt_file")
    try:  # bytes that are not UTF-8 may have been read as surrogates, which cannot be encoded
        return (sys.stdin.read() if piped else config.prompt).encode().decode()
    except UnicodeError as e:
        raise UserError(f"{'standard input' if piped else '--prompt'} is not UTF-8 text: convert it") from e


def length_of(config: SampleConfig, n_prompt: int, of_model: GPTConfig) -> int:
    """How many tokens to add. Warns if they go beyond the training length."""
    n, trained = config.max_new_tokens, of_model.block_size
    if n < 0:
        n = trained - n_prompt if n_prompt < trained else trained
    if n_prompt + n - 1 > of_model.max_length:  # the last token is not read again
        raise UserError(
            f"{n_prompt} tokens of prompt and {n} new ones do not fit into the {of_model.max_length} positions "
            "of this model: shorten the prompt or lower --max_new_tokens"
        )
    if n_prompt + n - 1 > trained:
        print(f"the model was trained on {trained} tokens: text beyond them gets worse", file=sys.stderr)
    return n


def main() -> None:
    config, _ = parse(SampleConfig(), sys.argv[1:], __doc__, "checkpoint")
    config.check()
    device, path = pick_device(config.device), config.checkpoint or newest_run()
    tensors, meta = load_checkpoint(path, LANGUAGE_MODEL)
    with as_user_error():
        fused.use(config.kernel, device)
        model = GPT(GPTConfig.of(meta["config"]))
    restore(tensors, model, path=path)
    model.to(device).eval()

    tokenizer, prompt = data.get_tokenizer(meta["tokenizer"]), read_prompt(config)
    data.check_tokenizer(model, tokenizer)
    if not prompt:
        raise UserError("the prompt is empty: give at least one character")
    ids = torch.from_numpy(np.asarray(tokenizer.encode_many([prompt])[0], np.int64))[None]  # (1, T)
    n = length_of(config, ids.size(1), model.config)
    if model.config.attention in FEATURE_MAPS:
        print(fused.describe(device), file=sys.stderr)

    out = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be several tokens
    print(prompt, end="", flush=True)
    generator = torch.Generator(device).manual_seed(config.seed)
    for token in model.stream(
        ids.to(device), n, config.temperature, config.top_k or None, config.top_p, generator
    ):
        print(out.decode(tokenizer.decode_bytes(token[0].tolist())), end="", flush=True)
    print(out.decode(b"", final=True))


if __name__ == "__main__":
    run(main)
