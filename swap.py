"""Exchange the attention of a model: sockets and modes.

A socket is a module whose `attend` is linear attention: each layer of our GPT, and of every model that
hf.linearize has converted. Plugging another class into a socket keeps the feature map (`attend.phi`) where it
is:

    set_mode(model, "softmax")    the teacher: softmax, with the map kept for later
    set_mode(model, "mimic")      softmax for the model, and beside it Eq. 3 for the map (distill.py)
    set_mode(model, "linear")     linear attention with the map
"""

from torch import Tensor, nn

from attention import LinearAttention, SoftmaxAttention, softmax_attention


class SoftmaxTeacher(LinearAttention):
    """Softmax attention that keeps a feature map for later."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return softmax_attention(q, k, v, causal=self.causal, key_mask=key_mask)

    weights, extend = SoftmaxAttention.weights, SoftmaxAttention.extend


class ZeroAttention(LinearAttention):
    """The control: no attention at all. A score that is reached here does not need attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return v.new_zeros(*q.shape[:3], v.size(-1))

    def extend(self, q: Tensor, k: Tensor, v: Tensor, cache: dict, key_mask: Tensor | None = None) -> Tensor:
        return self(q, k, v)


# Names for set_mode. distill.py adds "mimic" when it is imported.
MODES: dict[str, type[LinearAttention]] = {
    "softmax": SoftmaxTeacher,
    "linear": LinearAttention,
    "zero": ZeroAttention,
}


def sockets(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, by layer, whose `attend` is linear attention in any mode."""
    return [m for m in model.modules() if isinstance(getattr(m, "attend", None), LinearAttention)]


def set_mode(model: nn.Module, mode: str | type[LinearAttention]) -> None:
    """Plug another attention into every socket. Feature maps stay where they are.

    mode: a class, or the name of one in MODES. Raises ValueError for another name, and for a model without
    sockets.
    """
    if isinstance(mode, str):
        if mode not in MODES:
            more = " (after import distill: mimic)" if "mimic" not in MODES else ""
            raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}{more}")
        mode = MODES[mode]
    if not (found := sockets(model)):
        raise ValueError("this model has no linear attention whose mode could be set")
    for socket in found:
        old, own = socket.attend, getattr(socket.attend.phi, "modes", {})  # a map may bring its own classes
        socket.attend = own.get(mode, mode)(old.phi, old.causal, old.chunk_size)
