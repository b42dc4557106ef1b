"""One model that several threads use at once, and attention inside gradient checkpointing: nothing is kept in a
module from one call to the next."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import distill  # noqa: F401  adds mode "mimic"
import fused
from attention import LinearAttention
from feature_maps import FEATURE_MAPS, make_feature_map
from fused import known
from model import GPT, GPTConfig, map_parameters
from swap import set_mode, sockets


@pytest.fixture(autouse=True)
def kernel_as_before():
    before = fused.chosen
    yield
    fused.chosen = before


@pytest.fixture
def threads():
    """map(function, items) by 8 threads, which take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(8) as pool:
        yield lambda function, items: list(pool.map(function, items))
    sys.setswitchinterval(interval)


def tiny(attention="hedgehog") -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=16, attention=attention)
    ).eval()


def prompts(n: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(50, (1, 3 + i % 20)) for i in range(n)]


@pytest.mark.parametrize("attention", ["hedgehog", "taylor", "softmax", "hedgehog_window"])
def test_eight_threads_generate_what_one_after_the_other_generates(attention, threads, monkeypatch):
    """8 x 50 generations by one model; the first ones make the checks of the kernel and the map."""
    model, texts = tiny(attention), prompts(400 if attention == "hedgehog" else 80)

    def generate(idx):
        return model.generate(idx, 6, temperature=0)

    fused.load_once.cache_clear()
    fused.picked.cache_clear()
    monkeypatch.setattr(known, "KNOWN", {})
    found = threads(generate, texts)
    assert all(torch.equal(got, generate(idx)) for got, idx in zip(found, texts))


def test_eight_threads_measure_mimicry_each_its_own(threads):
    model, texts = tiny(), prompts(200)
    set_mode(model, "mimic")

    def measure(idx):
        with torch.no_grad():
            model(idx)
        return torch.stack(
            [x for socket in sockets(model) for x in (socket.attend.loss, socket.attend.entropy)]
        )

    found = threads(measure, texts)
    assert all(torch.equal(got, measure(idx)) for got, idx in zip(found, texts))


def test_a_measured_mimic_is_copied_and_one_that_was_not_measured_says_so():
    model = tiny()
    set_mode(model, "mimic")
    with pytest.raises(AttributeError, match="loss"):
        _ = sockets(model)[0].attend.loss
    model(prompts(1)[0])
    other = copy.deepcopy(model)
    assert sockets(model)[0].attend.loss.shape == (2,) and not hasattr(sockets(other)[0].attend, "loss")


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_checkpointed_attention_has_the_same_gradients_to_the_last_bit(name, reentrant, first, monkeypatch):
    """Every map, by each kernel, in the first call of a process too. Nothing falls back."""
    torch.manual_seed(0)
    attn, q, k, v = LinearAttention(make_feature_map(name, 2, 8)), *torch.randn(3, 1, 2, 40, 8)
    for kernel in ("auto", "torch"):
        fused.use(kernel)
        fused.load_once.cache_clear()
        fused.picked.cache_clear()
        monkeypatch.setattr(known, "KNOWN", {})
        if not first:
            attn(q, k, v)
        found = []
        for run in (lambda *x: checkpoint(attn, *x, use_reentrant=reentrant), attn):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            attn.zero_grad()
            y = run(*leaves)
            y.square().sum().backward()
            found.append([y, *(x.grad for x in (*leaves, *attn.parameters()))])
        assert all(torch.equal(a, b) for a, b in zip(*found))
    assert all(known.KNOWN.values()) and not isinstance(fused.load_once("cpp", "cpu"), fused.Unavailable)


@pytest.mark.parametrize("reentrant", [True, False])
def test_mimicry_trains_inside_checkpoints(reentrant):
    model, x, found = tiny().train(), torch.randn(2, 30, 16), []
    set_mode(model, "mimic")
    model.requires_grad_(False)
    for p in map_parameters(model):
        p.requires_grad_()
    rope, blocks = model.rope[:, :30], model.transformer.h
    for inputs in (x, x.clone().requires_grad_()):  # with gradients in the inputs, as peft asks for
        for through in (True, False):
            model.zero_grad()
            h = inputs
            for block in blocks:
                h = checkpoint(block, h, rope, use_reentrant=reentrant) if through else block(h, rope)
            torch.stack([socket.attend.loss for socket in sockets(model)]).mean().backward()
            found.append([p.grad.clone() for p in map_parameters(model)])
    assert all(g.abs().max() > 0 for g in found[0])
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], grads))
