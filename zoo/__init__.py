"""Attentions beyond the paper's own, by name: make(n_head, head_dim, causal, **options) -> module."""

from functools import partial

from zoo.window import make_window

SYSTEMS = {
    "hedgehog_window": partial(make_window, True),  # Hedgehog, with exact softmax over the last tokens
    "softmax_window": partial(make_window, False),  # the control: those tokens alone
}
