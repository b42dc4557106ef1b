"""How good a language model is: perplexity that can be compared, and the report at the end of a run.

python train.py --eval_only --init_from out/stdlib-hedgehog
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import GPT
from support.checkpoints import load_checkpoint, restore, write_atomically
from support.devices import peak_gib
from support.log import Log


def windows_of(ids: np.ndarray, block_size: int, stride: int, max_tokens: int = 0) -> list[tuple[int, int, int]]:
    """Fixed evaluation windows [(start, end, first scored)]: x = ids[start:end] predicts ids[start+1:end+1],
    of which those from `first scored` on count. Every token but the very first counts once.
    max_tokens > 0: an evenly spaced part of the windows, with about that many scored tokens."""
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride ({stride}) must be between 1 and the context length ({block_size})")
    windows, scored = [], 0
    while scored < len(ids) - 1:
        first, scored = scored, min(scored + (stride if windows else block_size), len(ids) - 1)
        windows.append((max(0, scored - block_size), scored, first))
    if max_tokens and max_tokens < len(ids) - 1:
        n = max(1, max_tokens // stride)
        windows = [windows[i * (len(windows) - 1) // n] for i in range(n)]
    return windows


@torch.no_grad()
def perplexity(
    model: GPT, ids: np.ndarray, tokenizer, block_size: int, stride: int, max_tokens: int, dtype: torch.dtype
) -> dict:
    """Loss in nats a token, perplexity by token and by white-space separated word, bits per byte.

    Over the fixed windows of windows_of; no randomness; 4,096 tokens a forward pass whatever the
    batch size of the training; sums in float64. Every token is predicted from at most block_size
    tokens before it, and at least block_size - stride of them (but at the very beginning).
    """
    device = next(model.parameters()).device
    windows = windows_of(ids, block_size, stride, max_tokens)
    nats, per_pass = 0.0, max(1, 4096 // block_size)
    passes = range(0, len(windows), per_pass)
    for i in tqdm(passes, desc="evaluating", unit="pass", delay=10.0, leave=False, mininterval=5.0):
        rows = [torch.from_numpy(ids[s : e + 1].astype(np.int64)) for s, e, _ in windows[i : i + per_pass]]
        x = torch.stack([row[:-1] for row in rows])
        y = torch.stack([row[1:] for row in rows])
        for target, (start, _, first) in zip(y, windows[i : i + per_pass]):
            target[: first - start] = -100  # scored by an earlier window
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, _ = model(x.to(device))
        losses = F.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten(), reduction="none")
        nats += losses.double().sum().item() if device.type != "mps" else losses.cpu().double().sum().item()
    text = b"".join(tokenizer.decode_bytes(ids[first + 1 : end + 1].tolist()) for _, end, first in windows)
    tokens, words = sum(end - first for _, end, first in windows), len(text.split())
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "word_perplexity": math.exp(min(nats / max(words, 1), 700)),
        "bits_per_byte": nats / math.log(2) / len(text),
        "tokens": tokens,
        "words": words,
        "bytes": len(text),
    }


def plot_curve(log: Log, path: Path) -> None:
    """Training and validation loss against steps, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        print("no loss curve: pip install matplotlib, then the same command with --resume draws it")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = log.read()
    config = entries[0]["config"]
    train = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    val = [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]
    if not train or not val:
        return  # a finished run, resumed, whose log was deleted
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*train), color="0.7", label="training batch")
    axes.plot(*zip(*val), "o-", color="#0b5394", label="validation")
    axes.set(
        xlabel="optimiser step", ylabel="loss (nats per token)",
        title=f"{config['attention']} attention on {config['dataset']}: {val[-1][1]:.3f} after {val[-1][0]} steps",
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # room for the command below
    figure.text(0.01, 0.005, entries[0]["command"], fontsize=6, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(config, model: GPT, evaluate: Callable[[GPT], dict], tokenizer, began: float) -> None:
    """The end of a run: the curve, result.json, a sample from the best checkpoint, one line of numbers."""
    out, device = Path(config.out_dir), next(model.parameters()).device
    restore(load_checkpoint(out / "best.safetensors")[0], model, path=out / "best.safetensors")
    model.eval()
    final, entries = evaluate(model), Log(out / "log.jsonl").read()
    header = [e for e in entries if "config" in e][-1]
    minutes = (header["seconds_before"] + time.perf_counter() - began) / 60
    result = {
        **header,
        "parameters": model.num_params(),
        "minutes": round(minutes, 2),
        "tokens_per_s": statistics.median([e["tokens_per_s"] for e in entries if "tokens_per_s" in e] or [0]),
        "peak_gib": peak_gib(device),
        "final": final,
        "curve": [(e["step"], round(e["val_loss"], 4)) for e in entries if "val_loss" in e],
    }
    text = json.dumps(result, indent=1)
    write_atomically(out / "result.json", lambda beside: beside.write_text(text))
    plot_curve(Log(out / "log.jsonl"), out / "curve.png")
    prompt = torch.from_numpy(np.asarray(tokenizer.encode_many([config.prompt])[0], np.int64))[None]
    room = model.config.max_length - prompt.size(1)
    if (n := int(min(config.sample_tokens, room))) > 0:
        generator = torch.Generator(device).manual_seed(config.seed)
        ids = model.generate(prompt.to(device), n, temperature=0.8, generator=generator)
        print(f"--- sample\n{tokenizer.decode_bytes(ids[0].tolist()).decode(errors='replace')}\n---")
    print(
        f"validation loss {final['loss']:.4f} nats per token, {final['bits_per_byte']:.4f} bits per byte, "
        f"{minutes:.1f} minutes, peak memory {result['peak_gib']:.1f} GiB, checkpoint {out / 'best.safetensors'}"
    )
