"""How good a language model is: perplexity that can be compared.

python train.py --eval_only --init_from out/stdlib-hedgehog
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import GPT


def windows_of(
    ids: np.ndarray, block_size: int, stride: int, max_tokens: int = 0
) -> list[tuple[int, int, int]]:
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
