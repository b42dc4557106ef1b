"""The state of linear attention as a layer of transformers' cache: generation in constant memory.

transformers keeps the keys and values of all tokens in a Cache, with one layer for each attention module.
`prepare_cache` puts a StateLayer there and hands it to convert.attention.
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from attention import LinearAttention
from swap import SoftmaxTeacher, ZeroAttention

NAME = "hedgehog"  # of the attention implementation in transformers, and of the sockets in a model


def shape_alone(which: int) -> property:
    """The keys (0) or values (1) of a layer: (B, groups, T, D) on meta, since a state has none.

    Clients read the length of the text and the size of the batch there.
    """

    def get(layer) -> Tensor | None:
        if "state" not in layer.state:
            return None
        B, (_, groups, _, D) = layer.state["state"][0].size(0), layer.shapes[which]
        return torch.empty(B, groups, layer.get_seq_length(), D, device="meta")

    return property(get, lambda layer, value: None)


class StateLayer(CacheLayerMixin):
    """A layer of a transformers Cache with S (B, H, F, D) and z (B, H, F), not keys and values."""

    is_sliding = False
    keys, values = shape_alone(0), shape_alone(1)

    def __init__(self, **kwargs):
        super().__init__()
        self.state: dict = {}  # as `extend` keeps it: "state", "length", and keys of heads with softmax

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The new keys and values. The attention function adds them to the state."""
        self.lazy_initialization(key_states, value_states)
        self.shapes = key_states.shape, value_states.shape
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.state.get("length", 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = {}

    def each(self, change) -> None:
        self.state = tree_map_only(Tensor, change, self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.each(lambda x: x[indices.to(x.device)])

    reorder_cache = batch_select_indices  # the rows of a batch are beams

    def crop(self, *args) -> None:
        raise ValueError("a state cannot forget its last tokens: assisted generation needs softmax")

    def offload(self) -> None:
        """Do nothing: an offloaded cache moves large layers off the device. A state is small and stays."""

    prefetch = offload


def prepare_cache(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook of attention modules. In mode "linear", put a StateLayer into the cache.

    The layer becomes the argument `state_layer` of this call: in the module, threads would share it.
    Raises ValueError for a cache that the mode cannot continue, and if another attention implementation has
    been set, which would ignore the sockets.
    """
    attend = getattr(module, NAME).attend
    caches = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)]  # each class has its name for it
    cache = caches[0] if caches else None
    if module.config._attn_implementation != NAME:
        raise ValueError(
            f"this linearized model has attention {module.config._attn_implementation!r} now: "
            f'call model.set_attn_implementation("{NAME}") again'
        )
    if cache is None:
        return None
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    while len(cache.layers) <= module.layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[module.layer_idx]
    holds_state = isinstance(layer, StateLayer)

    if not getattr(attend, "keeps_state", type(attend) is LinearAttention):
        # Softmax reads keys and values. Mimicry compares the weights of a whole text in one call.
        reads_keys = isinstance(attend, (SoftmaxTeacher, ZeroAttention))
        if holds_state or (layer.get_seq_length() and not reads_keys):
            raise ValueError(
                f"{type(attend).__name__} cannot continue a {type(layer).__name__}: use a new cache"
            )
        return None
    if not holds_state:
        if type(layer) is not DynamicLayer or layer.get_seq_length():
            raise ValueError(
                f"linear attention cannot continue a {type(layer).__name__}: start with an empty DynamicCache"
            )
        layer = cache.layers[module.layer_idx] = StateLayer()
    return args, {**kwargs, "state_layer": layer}
