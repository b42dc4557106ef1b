"""Attentions beyond the paper's own, by name: make(n_head, head_dim, causal, max_len, **options) -> module."""

import inspect
from collections.abc import Callable
from functools import partial

from zoo.gates import AFT, H3, Hyena
from zoo.low_rank import Linformer, Nystromformer, Skyformer, Synthesizer
from zoo.sparse import BigBird, Local, Longformer, Reformer, Sinkhorn, Sparse
from zoo.system import System
from zoo.window import make_window


def maker(cls: type[System]) -> Callable[..., System]:
    """make of a class. `tie` has no meaning where there is no feature map, as for softmax."""

    def make(
        n_head: int, head_dim: int, causal: bool, max_len: int | None, tie: bool = True, **options
    ) -> System:
        if unexpected := set(options) - set(inspect.signature(cls).parameters):
            raise ValueError(f"{cls.__name__.lower()} takes no option {', '.join(sorted(unexpected))}")
        return cls(n_head, head_dim, causal, max_len, **options)

    make.fixed_length = cls.fixed_length
    return make


SYSTEMS = {
    "hedgehog_window": partial(make_window, True),  # Hedgehog, with exact softmax over the last tokens
    "softmax_window": partial(make_window, False),  # the control: those tokens alone
    **{cls.__name__.lower(): maker(cls) for cls in (Local, Sparse, Longformer, BigBird, Sinkhorn, Reformer)},
    **{cls.__name__.lower(): maker(cls) for cls in (Linformer, Nystromformer, Skyformer, Synthesizer)},
    **{cls.__name__.lower(): maker(cls) for cls in (AFT, H3, Hyena)},
}
