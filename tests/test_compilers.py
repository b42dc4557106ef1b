"""What records linear attention keeps it what it is: torch.compile, torch.export and torch.jit.trace, with masks,
other lengths than the recorded one, gradients and a cache."""

import os
import shutil
import sys
import warnings

import pytest
import torch

import fused
from attention import LinearAttention
from feature_maps import FEATURE_MAPS, make_feature_map
from fused.chunked import chunked, chunks_at_once
from model import GPT, GPTConfig

# Only a machine without a compiler may leave these out: a kernel that cannot be loaded elsewhere is a failure.
needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which(os.environ.get("CXX", "c++").split()[0]),
    reason="no C++ compiler",
)
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")


@pytest.fixture(autouse=True)
def kernel_as_before():
    before = fused.chosen
    torch._dynamo.reset()
    yield
    fused.chosen = before


@pytest.fixture(
    params=[pytest.param("cpp", marks=needs_compiler), pytest.param("triton", marks=pytest.mark.slow)]
)
def kernel(request):
    """The kernels that run here: Triton's in its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return fused.load(request.param, "cpu")


def inputs(B=2, H=2, T=20, D=8, E=8, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(B, T, H, n).transpose(1, 2).to(dtype) for n in (D, D, E)]


def compiled(module, **options):
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)


# ---------------------------------------------------------------- the operators


@pytest.mark.parametrize("mapped, full", [(True, True), (False, False)])
def test_every_operator_is_what_it_registers(kernel, mapped, full):
    """torch.library.opcheck: schema, shapes, gradient, and compilation with lengths left open."""
    B, T = (1, 5) if "triton" in str(kernel.forward) else (2, 70)
    q, k, v = inputs(B, T=T, E=5)
    S, z, mask = torch.rand(B, 2, 16 if mapped else 8, 5), torch.rand(B, 2, 16 if mapped else 8), None
    maps = [torch.randn(2, n, 8) for n in (8, 1)] * 2 if mapped else [None] * 4
    if not mapped:
        q, k = q.exp(), k.exp()
    if full:
        mask = torch.arange(T)[None].expand(B, -1) > 2
        q, k, v, S, z, *maps = (x if x is None else x.requires_grad_() for x in (q, k, v, S, z, *maps))
    else:
        S = z = None
    arguments = q, k, v, *maps, S, z, mask, full, True
    torch.library.opcheck(kernel.forward, arguments)
    if hasattr(kernel, "bidirectional"):
        torch.library.opcheck(kernel.bidirectional, (*arguments[:7], mask))
    with torch.no_grad():
        y, d, _, _, *states = kernel.forward(*arguments[:-2], True, True)
        plain = [x if x is None else x.detach() for x in arguments[:7]]
        gradient = torch.randn_like(y), S if S is None else S.detach(), z if z is None else z.detach()
        torch.library.opcheck(kernel.backward, (*gradient, *plain, mask, y, d, *states))
        one = [x[:, :, :1].detach() for x in (q, k, v)]
        state = torch.rand(B, 2, 16 if mapped else 8, 5), torch.rand(B, 2, 16 if mapped else 8) + 1
        torch.library.opcheck(kernel.decode, (*one, *plain[3:], *state))


@needs_compiler
@pytest.mark.parametrize("T, E", [(70, 5), (140, 80), (300, 40)])
def test_shapes_are_registered_for_bfloat16_too(T, E):
    """Rows of its states may be longer: whole vectors of what is multiplied."""
    kernel = fused.load("cpp", "cpu")
    q, k, v = inputs(T=T, E=E, dtype=torch.bfloat16)
    arguments = q, k, v, *[torch.randn(2, n, 8) for n in (8, 1)] * 2, None, None, None
    torch.library.opcheck(kernel.forward, (*arguments, True, False), test_utils="test_faketensor")
    y, d, _, _, states = kernel.forward(*arguments, True, False)
    for mask in (None, torch.arange(T)[None].expand(2, -1) > 2):
        plain = *arguments[:7], mask
        torch.library.opcheck(kernel.bidirectional, plain, test_utils="test_faketensor")
        both = *plain, *kernel.bidirectional(*plain)
        torch.library.opcheck(kernel.bidirectional_backward, (v.float(), *both), test_utils="test_faketensor")
    torch.library.opcheck(
        kernel.backward, (torch.randn_like(y), None, None, *arguments[:7], None, y, d, states),
        test_utils="test_faketensor",
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mapped", [True, False])
def test_the_bidirectional_operators_are_what_they_register(mapped):
    kernel = fused.load("cpp", "cpu")
    q, k, v = (x.exp().requires_grad_() for x in inputs(T=70))
    maps = [torch.randn(2, n, 8) for n in (8, 1)] * 2 if mapped else [None] * 4
    mask = torch.arange(70)[None].expand(2, -1) > 2
    torch.library.opcheck(kernel.bidirectional, (q, k, v, *maps, mask))
    (dq,) = torch.autograd.grad(
        kernel.bidirectional(q, k, v, *maps, mask)[0].square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.square().sum().backward()


@needs_compiler
def test_the_product_of_the_benchmark_is_an_operator_too():
    multiply = fused.load("cpp", "cpu").multiply
    torch.library.opcheck(multiply, (torch.randn(3, 5), torch.randn(5, 32), 2))


def test_a_second_derivative_is_an_error_and_not_zero(kernel):
    q, k, v = (x.exp().requires_grad_() for x in inputs(T=20))
    y, *_ = kernel.forward(q, k, v, *[None] * 7, True, True)
    (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.square().sum().backward()


@pytest.mark.parametrize("kernel_name", ["auto", "torch", pytest.param("cpp", marks=needs_compiler)])
@pytest.mark.parametrize("T", [10, 40])
def test_a_derivative_in_forward_mode_is_right_or_an_error(kernel_name, T):
    """Never zero: the operators know the other mode alone."""
    fused.use(kernel_name)
    attn, (q, k, v), along = (
        LinearAttention(make_feature_map("hedgehog", 2, 8)),
        inputs(T=T),
        inputs(T=T + 1)[0],
    )
    along = along[:, :, :T]
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attn(leaf, k, v).square().sum(), leaf)
    if kernel_name == "cpp":
        with pytest.raises(RuntimeError, match="no derivative in forward mode"):
            torch.func.jvp(lambda q: attn(q, k, v).square().sum(), (q,), (along,))
    else:
        _, found = torch.func.jvp(lambda q: attn(q, k, v).square().sum(), (q,), (along,))
        torch.testing.assert_close(found, (gradient * along).sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("T", [0, 1, 7, 64, 65, 200])
@pytest.mark.parametrize("with_state", [True, False])
def test_all_chunks_at_once_are_the_chunks_in_order(T, with_state):
    q, k, v = (x.double().exp() for x in inputs(T=T))
    state = (torch.rand(2, 2, 8, 8).double(), torch.rand(2, 2, 8).double()) if with_state else None
    mask = torch.arange(T)[None].expand(2, -1) % 7 > 2
    for got, want in zip(
        chunks_at_once(q, k, v, state, mask, 64), chunked(None, q, k, v, state, key_mask=mask)
    ):
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    "name, kernel_name, causal",
    [*((name, "auto", True) for name in FEATURE_MAPS), ("t2r", "torch", True), ("hedgehog", "auto", False)],
)
def test_one_graph_with_the_same_outputs_and_gradients(name, kernel_name, causal):
    """No graph breaks inside LinearAttention."""
    fused.use(kernel_name)
    attn, found = LinearAttention(make_feature_map(name, 2, 8), causal), []
    for module in (attn, compiled(attn)):
        leaves = [x.requires_grad_() for x in inputs(T=40)]
        y = module(*leaves)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, *attn.parameters()])])
    for want, got in zip(*found):
        torch.testing.assert_close(got, want)


def tiny(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=16, **options))


def step_of(model, of) -> list:
    x = torch.randint(50, (2, 41), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = of(x[:, :-1], x[:, 1:])[1]
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


def test_our_gpt_trains_and_generates_compiled():
    """In one graph each: a training step; a prompt, and tokens after it from the state."""
    model, idx = tiny(), torch.randint(50, (2, 20))
    for want, got in zip(step_of(model, model), step_of(model, compiled(model))):
        torch.testing.assert_close(got, want)
    want = model.eval().generate(idx, 12, temperature=0)
    model.hidden = compiled(model.hidden)
    assert torch.equal(model.generate(idx, 12, temperature=0), want)


@pytest.mark.slow
@needs_compiler
def test_our_gpt_trains_and_generates_by_inductor():
    model, idx = tiny(), torch.randint(50, (2, 20))
    for want, got in zip(step_of(model, model), step_of(model, torch.compile(model, fullgraph=True))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    want = model.eval().generate(idx, 12, temperature=0)
    model.hidden = torch.compile(model.hidden, fullgraph=True)
    assert torch.equal(model.generate(idx, 12, temperature=0), want)


def test_a_map_that_a_reader_changed_is_compiled_as_changed(monkeypatch):
    kind = FEATURE_MAPS["hedgehog"]
    features = kind.features
    monkeypatch.setattr(kind, "features", lambda self, x, offset: features(self, 0.5 * x, offset))
    attn, (q, k, v) = LinearAttention(make_feature_map("hedgehog", 2, 8)), inputs(T=40)
    torch.testing.assert_close(compiled(attn)(q, k, v), attn.weights(q, k) @ v)


# ---------------------------------------------------------------- torch.export and torch.jit.trace


@pytest.mark.parametrize(
    "name, causal", [("hedgehog", True), ("hedgehog", False), ("taylor", True), ("cosformer", True)]
)
@pytest.mark.parametrize("how", ["export", "trace"])
def test_a_recorded_attention_knows_no_length_and_no_mask(name, causal, how):
    """Recorded with 40 tokens, all of them real; run with others, some of them padding."""
    attn = LinearAttention(
        make_feature_map(name, 2, 8, **({} if name != "cosformer" else {"max_len": 200})), causal
    )
    for T in (40, 10) if how == "trace" else (40,):
        args = *inputs(T=T), torch.ones(2, T, dtype=torch.bool)
        if how == "trace":
            recorded = torch.jit.trace(attn, args, check_trace=False)
            assert "hedgehog::" not in str(recorded.inlined_graph)
        else:
            length = {2: torch.export.Dim.AUTO}
            recorded = torch.export.export(
                attn, args, dynamic_shapes=[length, length, length, {1: length[2]}], strict=False
            ).module()
            assert "hedgehog" not in str(recorded.graph)
        for other in (T, 100, 7):
            mask = torch.arange(other)[None].expand(2, -1) % 3 > 0
            q, k, v = inputs(T=other)
            torch.testing.assert_close(recorded(q, k, v, mask), attn(q, k, v, mask), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_a_kernel_that_was_chosen_by_name_is_recorded():
    fused.use("cpp")
    attn, args = LinearAttention(make_feature_map("hedgehog", 2, 8)), inputs(T=40)
    exported = torch.export.export(attn, tuple(args))
    assert "hedgehog.forward" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*args), attn(*args))


# ---------------------------------------------------------------- in models of Hugging Face

WIDTHS = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


class Logits(torch.nn.Module):
    """What a model computes of ids and a mask, as one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None, positions=None):
        options = {} if positions is None else {"position_ids": positions}
        if self.model.config.model_type == "llama":
            options["use_cache"] = False
        return self.model(input_ids=ids, attention_mask=mask, **options)[0]


@pytest.fixture(params=["bert", "llama"])
def model(request):
    transformers = pytest.importorskip("transformers")
    from hf import linearize

    torch.manual_seed(0)
    widths = dict(initializer_range=0.2, **WIDTHS)
    if request.param == "bert":
        base = transformers.BertModel(transformers.BertConfig(max_position_embeddings=128, **widths))
    else:
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **widths))
    return Logits(linearize(base.eval()))


def text(T: int, padded: bool = True):
    torch.manual_seed(T)
    ids, mask = torch.randint(50, (2, T)), torch.ones(2, T, dtype=torch.long)
    if padded:
        mask[0, :3], mask[1, -2:] = 0, 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("how", ["trace", "export", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_recorded_model_is_the_model_at_real_tokens(model, how, masked):
    """Recorded with a mask of ones, or without a mask; run with padding, and with other lengths."""
    if how == "trace" and not masked and model.model.config.model_type == "llama":
        with pytest.raises(ValueError, match="torch.jit.trace needs an attention_mask"):
            torch.jit.trace(model, text(20)[:1], check_trace=False)
        return
    args = text(20, padded=False)[: 1 + masked]
    if how == "trace":
        recorded = torch.jit.trace(model, args, check_trace=False)
    elif how == "export":
        auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        recorded = torch.export.export(model, args, dynamic_shapes=[auto] * len(args)).module()
    else:
        recorded = compiled(model)
        recorded(*args)
    for T in (20, 90, 7) if how != "compile" else (90,):
        ids, mask = text(T)
        others = (ids, mask)[: 1 + masked]
        difference = (recorded(*others) - model(*others)).abs() * (mask[..., None] if masked else 1)
        assert difference.max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("how", ["export", "compile"])
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_recorded_model_refuses_packed_sequences_when_it_runs(model, how):
    ids, whole = text(20)[0], torch.arange(20).expand(2, -1)
    packed = torch.arange(20).remainder(10).expand(2, -1)
    if how == "export":
        recorded = torch.export.export(model, (ids, None, whole)).module()
    else:
        recorded = compiled(model)
    torch.testing.assert_close(recorded(ids, None, whole), model(ids, None, whole), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="packed sequences"):
        recorded(ids, None, packed)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_compiled_forward_pass_generates(model):
    """M.forward = torch.compile(m.forward); m.generate(...)."""
    m, ids = model.model, torch.randint(1, 50, (2, 10))
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    want = m.generate(ids, **options)
    m.forward = compiled(m.forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(m.generate(ids, **options), want)
