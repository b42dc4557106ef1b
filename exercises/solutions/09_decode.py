import statistics
import time

import torch

from attention import make_attention


def cache_bytes(T, H, D, itemsize=4):
    return 2 * T * H * D * itemsize


def state_bytes(H, D, F):
    return H * F * (D + 1) * 4


def predicted_crossover(H, D, F, itemsize=4):
    return 2 * state_bytes(H, D, F) / cache_bytes(1, H, D, itemsize)


@torch.no_grad()
def measure(T, H=12, D=64):
    q, k, v = torch.randn(3, 1, H, T, D)
    token = torch.randn(3, 1, H, 1, D)

    def seconds(name):
        attn, cache, times = make_attention(name, H, D), {"k": k, "v": v}, []
        if name != "softmax":
            cache = {}
            attn.extend(q, k, v, cache)
        for _ in range(7):
            copy, began = dict(cache), time.perf_counter()
            attn.extend(*token, copy)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return seconds("softmax"), seconds("hedgehog")


def measured_crossover(lengths):
    times = ((T, *measure(T)) for T in lengths)
    return next((T for T, softmax, hedgehog in times if hedgehog < softmax), None)
