import math

import torch

from zoo.sparse import attend_blocks
from zoo.system import dot_products, side_by_side, softmax_part


def window_part(q, k, v, real, window, skip=0):
    n = -(-q.size(2) // window)
    index = torch.arange(n)[:, None] + torch.tensor([-1, 0, 1])  # -1 is no block
    index = index.masked_fill(index >= n, -1)
    return attend_blocks(q, k, v, real, index, window, lambda i, j: ((i - j).abs() < window) & (j >= skip))


def longformer(q, k, v, real, window, n_global):
    n, hidden = n_global, ~real[:, None, None]
    part = window_part(q, k, v, real, window, skip=n)  # every query, without the global keys
    scores = dot_products(q, k[:, :, :n]).masked_fill(hidden[..., :n], -math.inf)
    part = part | softmax_part(scores, v[:, :, :n])
    every = softmax_part(dot_products(q[:, :, :n], k).masked_fill(hidden, -math.inf), v)  # global queries
    return side_by_side([every, part.map(lambda x: x[:, :, n:])], 2).y


@torch.no_grad()
def first_changed(attend, q, k, v, i):
    y, k, v = attend(q, k, v), k.clone(), v.clone()
    k[:, :, i] += 1.0
    v[:, :, i] += 1.0
    different = (attend(q, k, v) != y).any(-1).any(1).any(0)  # (T,)
    return int(different.nonzero()[0])


def predicted(i, window):
    nearest = i - window + 1
    # a mixture or a mean over all tokens changes with each of them: every output changes, also the first.
    # So the outputs of a prompt would change with every token that is generated after it.
    bidirectional = {"local": nearest, "longformer": 0, "linformer": 0, "nystromformer": 0}
    return {**bidirectional, "causal local": i}
