"""The next token from the logits of a language model."""

import torch
from torch import Tensor


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits (B, V) -> one token id each (B, 1): the likeliest at temperature 0, else drawn from the
    top_k likeliest, or from the fewest that together reach probability top_p."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = logits.sort(-1, descending=True)
    logits = (logits - logits[:, :1]) / temperature  # finite for any temperature
    probs = logits.softmax(-1)
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:
        before = probs.cumsum(-1) - probs  # the probability of all likelier tokens; 0 for the first
        probs = probs.masked_fill(before >= top_p, 0)
    return order.gather(-1, torch.multinomial(probs, 1, generator=generator))
