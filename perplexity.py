"""How good a language model is: perplexity that can be compared.

python train.py --eval_only --init_from out/stdlib-hedgehog
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import GPT

Window = tuple[int, int, int]  # start, end, first scored


def windows_of(ids: np.ndarray, block_size: int, stride: int, max_tokens: int = 0) -> list[Window]:
    """Fixed evaluation windows: x = ids[start:end] predicts ids[start+1:end+1], which count from `first scored`
    on: every token but the very first once. max_tokens > 0: evenly spaced windows with about so many tokens."""
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride ({stride}) must be between 1 and the context length ({block_size})")
    windows, scored = [], 0
    while scored < len(ids) - 1:
        first, scored = scored, min(scored + (stride if windows else block_size), len(ids) - 1)
        windows.append((max(0, scored - block_size), scored, first))
    if max_tokens and max_tokens < len(ids) - 1:
        n = max(1, min(max_tokens // stride, len(windows) - 1))
        windows = [windows[i * (len(windows) - 1) // n] for i in range(n)]
    return windows


def scored_text(ids: np.ndarray, tokenizer, windows: list[Window]) -> bytes:
    """The text of the scored tokens. Windows in a row are decoded at once, with the token before them: many
    tokenizers drop the space that begins a text, and know a character from all its tokens alone."""
    (firsts, ends), text = ({window[i] for window in windows} for i in (2, 1)), b""
    for first, end in zip(sorted(firsts - ends), sorted(ends - firsts)):
        before, run = (tokenizer.decode_bytes(ids[first : i + 1].tolist()) for i in (first, end))
        text += run[len(before) :]
    return text


@torch.no_grad()
def perplexity(
    model: GPT, ids: np.ndarray, tokenizer, block_size: int, stride: int, max_tokens: int, dtype: torch.dtype
) -> dict:
    """Loss in nats a token, perplexity by token and by white-space separated word, bits per byte.

    Over the fixed windows of windows_of; no randomness; 4,096 tokens a forward pass; sums in float64. Every token
    is predicted from at most block_size tokens before it, and at least block_size - stride (but at the beginning).
    """
    device = next(model.parameters()).device
    windows = windows_of(ids, block_size, stride, max_tokens)
    nats, per_pass = 0.0, max(1, 4096 // block_size)
    passes = range(0, len(windows), per_pass)
    for i in tqdm(passes, desc="evaluating", unit="pass", delay=10.0, leave=False, disable=None):
        rows = [torch.from_numpy(ids[s : e + 1].astype(np.int64)) for s, e, _ in windows[i : i + per_pass]]
        x, y = (torch.stack([row[part] for row in rows]) for part in (slice(-1), slice(1, None)))
        for target, (start, _, first) in zip(y, windows[i : i + per_pass]):
            target[: first - start] = -100  # scored by an earlier window
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, _ = model(x.to(device))
        losses = F.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten(), reduction="none")
        nats += losses.double().sum().item() if device.type != "mps" else losses.cpu().double().sum().item()
    text = scored_text(ids, tokenizer, windows)
    tokens, words = sum(end - first for _, end, first in windows), len(text.split())
    by_token = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700))}
    by_word = {"word_perplexity": math.exp(min(nats / max(words, 1), 700))}
    by_byte = {"bits_per_byte": nats / math.log(2) / max(len(text), 1)}
    return {**by_token, **by_word, **by_byte, "tokens": tokens, "words": words, "bytes": len(text)}
