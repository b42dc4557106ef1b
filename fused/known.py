"""What a reader has changed takes effect: the fast forms run only in the place of code that they are held against.

This repository is there to be changed. A kernel that computes Hedgehog's features by itself would ignore an edit
of the class. So a fast form replaces the code of a map, or of attention.py, only after the numbers and gradients of
that code, as it is now, were compared with its own on a few tokens: once in a process for each code. Where they
differ, the reader's code runs, and one line says so.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from feature_maps import ELU, Hedgehog, Taylor
from fused.chunked import bidirectional, chunked, step

LOCK = threading.RLock()
KNOWN: dict[
    tuple, bool
] = {}  # code of a map, or of attention.py -> whether it is what the fast forms compute


def constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, but the compiler is not imported: that takes a second, and few
    processes compile."""
    function._dynamo_marked_constant = True
    return function


def is_known(phi: Hedgehog | Taylor) -> bool:
    """Whether a fast form may take the place of a map: its class computes what the fast form does, the module
    is nothing more than its class, and no hook watches it or changes what it gives."""
    own, of_class = phi.__dict__, ("weight", "bias") if type(phi) is Hedgehog else ()
    plain = tuple(phi._parameters) == of_class and not phi._buffers and not phi._modules
    if not plain or "forward" in own or "features" in own or "linear" in own:
        return False
    hooks = phi._forward_hooks, phi._forward_pre_hooks, phi._backward_hooks, phi._backward_pre_hooks
    return not any(hooks) and not _has_any_global_hook() and as_known(type(phi))


@constant
def as_known(kind: type[Hedgehog] | type[Taylor]) -> bool:
    """Whether the code of a map, as it is now, computes what a fast form computes in its place: products of
    features, and all gradients, on a few tokens. Otherwise the map itself runs."""
    code = (kind, kind.__init__, kind.forward, kind.features, getattr(kind, "linear", None))
    return holds(code, deviations, kind, f"{kind.__name__} was changed: linear attention takes its features")


def holds(code: tuple, errors: Callable, of: Callable, otherwise: str) -> bool:
    """Whether errors(of) are small. Checked once for each code; where they are not, one line says so."""
    if code not in KNOWN:
        with LOCK:
            if code not in KNOWN:
                KNOWN[code] = undisturbed(is_near, errors, of)
                if not KNOWN[code]:
                    print(otherwise, file=sys.stderr, flush=True)
    return KNOWN[code]


def is_near(errors: Callable, of: Callable) -> bool:
    """Whether all relative errors are small. Code that fails here shall run and show its failure there."""
    try:
        return all(error < 1e-3 for error in errors(of))
    except Exception:
        return False


def deviations(kind: type[Hedgehog] | type[Taylor]) -> list[float]:
    """Relative errors of a map with made-up parameters against the formula of the fast forms: of Taylor's
    phi(q).phi(k), or Hedgehog's phi, and of gradients."""
    phi = kind(2, 4).double()
    x = 2 * torch.arange(40, dtype=torch.float64).sin().view(1, 2, 5, 4)
    if taylor := isinstance(phi, Taylor):
        found = lambda: phi(x) @ phi(x).mT  # noqa: E731
    else:  # tokens whose features reach the floor, and whose inputs are clamped
        x[:, :, 1], x[:, :, 2, 1:], found = -300 * x[:, :, 1], 1e16, lambda: phi(x)
    leaves = [x.requires_grad_(), *phi.parameters()]
    with torch.no_grad():
        for p in phi.parameters():
            p += 0.3 * torch.arange(1.0, p.numel() + 1).cos().view_as(p)
    if taylor:
        wanted = phi.products(x, x)
    else:
        u = x.clamp(-1e15, 1e15) @ phi.weight + phi.bias  # the limits in chunked.cpp
        wanted = torch.cat([u.softmax(-1), (-u).softmax(-1)], -1) + 1e-15
    if found().shape != wanted.shape:
        return [math.inf]
    pairs = [(y, y.log(), *gradients(y, leaves)) for y in (found(), wanted)]
    return relative_errors(*pairs)


def gradients(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True)


@constant
def is_unchanged(plain: Callable) -> bool:
    """Whether `plain`, which is attention.attend, computes what chunked.py does, in its code as it is now."""
    names = "normalise zero_state without_padding linear_attention_chunked linear_attention_bidirectional"
    code = tuple(plain.__globals__.get(name) for name in names.split())
    otherwise = "attention.py was changed: linear attention runs as it is written there, without kernels"
    return holds(code, plain_deviations, plain, otherwise)


def plain_deviations(plain: Callable) -> list[float]:
    """Relative errors of chunked.py's forms against the plain ones: y, the state, gradients, one more token,
    the bidirectional form, and rows that have no key."""
    phi = ELU(2, 4)
    q, k, v = (2 * torch.arange(3 * 560, dtype=torch.float64)).sin().view(3, 1, 2, 70, 4).unbind()
    leaves, mask = [x.clone().requires_grad_() for x in (q, k, v)], torch.arange(70)[None] % 5 > 1
    y, state = plain(phi, *leaves, key_mask=mask)
    found = [y, *state, *gradients(y, leaves)]
    y, *after = chunked(phi, *leaves, key_mask=mask)
    wanted = [y, *after, *gradients(y, leaves)]
    one = [x[:, :, :1].detach() for x in leaves]
    y, next_state = plain(phi, *one, state, offset=70)
    found += [y, *next_state, plain(phi, *leaves, causal=False, key_mask=mask)[0]]
    wanted += [*step(phi(one[0]), phi(one[1]), one[2], *after), bidirectional(phi(q), phi(k), v, mask)]
    return relative_errors(found, wanted)


def undisturbed(function: Callable, *args):
    """function(*args) in a thread of its own: nothing around the first call of a check reaches it, neither
    autocast, inference mode, gradient checkpointing (it replaces saved tensors) nor a compiler or a tracer."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def relative_errors(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> list[float]:
    return [((a.cpu() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(found, wanted)]
