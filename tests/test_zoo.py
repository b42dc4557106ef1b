"""What holds for every system of zoo/: no leak, padding, lengths, dtypes, generation, memory, names, errors."""

import pytest
import torch
from tiny import losses_of_training
from torch.utils._python_dispatch import TorchDispatchMode

from attention import attentions, has_fixed_length, learns_map, make_attention
from model import GPT, GPTConfig
from zoo import SYSTEMS

OPTIONS = {  # name -> the options it is tested with
    "local": [{"window": 5}],
    "sparse": [{"stride": 6}],
    "longformer": [{"window": 5, "n_global": 3}],
    "bigbird": [{"block": 4, "n_random": 2}],
    "sinkhorn": [{"block": 5}],
    "reformer": [{"window": 5, "n_buckets": 4, "n_hashes": 3}],
    "linformer": [{"n_mixtures": 6}],
    "nystromformer": [{"n_landmarks": 7}],
    "skyformer": [{"n_landmarks": 8}],
    "synthesizer": [{"kind": "dense"}, {"kind": "random"}, {"kind": "factorised"}],
    "aft": [{"kind": "simple"}, {"kind": "local", "window": 4}, {"kind": "full"}],
    "h3": [{}],
    "hyena": [{}],
}
ONE_WAY = {
    "linformer": False,
    "nystromformer": False,
    "skyformer": False,
    "h3": True,
    "hyena": True,
}  # causal
ALL = [
    pytest.param(
        name, causal, options, id=f"{name}-{options.get('kind', '')}-{'causal' if causal else 'both'}"
    )
    for name, several in OPTIONS.items()
    for options in several
    for causal in (True, False)
    if ONE_WAY.get(name, causal) == causal
]
CAUSAL = [case for case in ALL if case.values[1]]
every = pytest.mark.parametrize("name, causal, options", ALL)
every_causal = pytest.mark.parametrize("name, causal, options", CAUSAL)


def build(name, causal, options, max_len=140, D=8, away=0.2):
    torch.manual_seed(0)
    attn = make_attention(name, 2, D, causal=causal, max_len=max_len, **options)
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(away * torch.randn_like(p))
    return attn


def test_all_systems_are_here():
    assert set(OPTIONS) == {name for name in SYSTEMS if not name.endswith("_window")}


@every_causal
def test_changing_a_token_changes_nothing_before_it_exactly(name, causal, options):
    """Bitwise, at huge values too."""
    attn, T, moved = build(name, causal, options), 133, 0
    for scale in (1.0, 100.0):
        q, k, v = scale * torch.randn(3, 1, 2, T, 8)
        y = attn(q, k, v)
        for t in (0, 1, 4, 5, 15, 31, 32, 63, 64, T - 2):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, t + 1 :] = 50 * torch.randn_like(x[:, :, t + 1 :])
            got = attn(*changed)
            assert torch.equal(got[:, :, : t + 1], y[:, :, : t + 1])
            moved += not torch.equal(got[:, :, t + 1], y[:, :, t + 1])
    assert moved >= 18  # of 20: a token that sees one other only, whatever the weight, may stay as it is


@every
def test_what_stands_at_padding_is_never_seen(name, causal, options):
    attn, T = build(name, causal, options), 41
    q, k, v = torch.randn(3, 2, 2, T, 8)
    mask = torch.rand(2, T) > 0.4
    mask[0, :12], mask[1, 30:] = False, False
    inputs, others = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    with torch.no_grad():
        for x in others:
            x.masked_fill_(~mask[:, None, :, None], 9.0)
    real = mask[:, None, :, None].expand(2, 2, T, 8)
    a, b = attn(*inputs, key_mask=mask), attn(*others, key_mask=mask)
    assert torch.equal(a[real], b[real])
    grads = zip(
        *(
            torch.autograd.grad((y[real] ** 2).sum(), x, allow_unused=True)
            for y, x in ((a, inputs), (b, others))
        )
    )
    for one, other in grads:
        assert one is other is None or torch.equal(one, other) and (one[~real] == 0).all()


@every
@pytest.mark.parametrize("T", [1, 5, 23, 40])
def test_a_padded_text_is_the_text(name, causal, options, T):
    attn = build(name, causal, options).double()
    q, k, v = torch.randn(3, 2, 2, 41, 8, dtype=torch.float64)
    mask = torch.arange(41).expand(2, -1) < T
    want = attn(q[:, :, :T], k[:, :, :T], v[:, :, :T])
    torch.testing.assert_close(attn(q, k, v, key_mask=mask.long())[:, :, :T], want)


@every
def test_a_row_without_a_real_key_is_zero(name, causal, options):
    attn = build(name, causal, options)
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 2, 9, 8)]
    mask = torch.tensor([[0] * 9, [0] * 4 + [1] * 5], dtype=torch.bool)
    y = attn(*inputs, key_mask=mask)
    assert (y[0] == 0).all() and (y[1, :, 4:] != 0).any(-1).all() and (not causal or (y[1, :, :4] == 0).all())
    leaves = [*inputs, *attn.parameters()]
    grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)
    with pytest.raises(ValueError, match="must be bool"):
        attn(*inputs, key_mask=mask.float())


@every
def test_no_token_and_strided_inputs(name, causal, options):
    attn = build(name, causal, options)
    none = torch.randn(2, 2, 0, 8)
    assert attn(none, none, none).shape == none.shape
    q, k, v = torch.randn(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (B, T, 3, H, D), as in a GPT
    torch.testing.assert_close(attn(q, k, v), attn(*(x.contiguous() for x in (q, k, v))))


@every
def test_half_precision_is_summed_in_float32_with_and_without_autocast(name, causal, options):
    attn = build(name, causal, options)
    q, k, v = torch.randn(3, 1, 2, 130, 8).bfloat16()
    y = attn(q, k, v)
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attn(q, k, v), y)
    want = attn.double()(q.double(), k.double(), v.double())
    assert (y.double() - want).norm() / want.norm() < 5e-3


@every_causal
def test_extend_in_pieces_equals_the_whole(name, causal, options):
    attn = build(name, causal, options).double()
    q, k, v = torch.randn(3, 2, 2, 40, 8, dtype=torch.float64)
    cache, pieces = {}, [7, 1, 0, 1, 15, 16]
    got = [attn.extend(*parts, cache) for parts in zip(*(x.split(pieces, 2) for x in (q, k, v)))]
    torch.testing.assert_close(torch.cat(got, 2), attn(q, k, v))


@every
def test_weights_are_what_is_done_to_values(name, causal, options):
    attn = build(name, causal, options).double()
    q, k, v = torch.randn(3, 2, 2, 19, 8, dtype=torch.float64)
    if not attn.has_weights:
        with pytest.raises(ValueError, match=f"{name} has no attention weights"):
            attn.weights(q, k)
        return
    A = attn.weights(q, k)
    torch.testing.assert_close(A @ v, attn(q, k, v))
    assert not causal or (A.triu(1) == 0).all()


@every
def test_all_tensors_are_made_on_the_device_of_the_inputs(name, causal, options):
    attn = build(name, causal, options).to("meta")
    q, k, v = torch.empty(3, 2, 2, 140, 8, device="meta")
    mask = torch.ones(2, 140, dtype=torch.bool, device="meta")
    assert attn.mix(q, k, v, mask).shape == v.shape  # forward asks for autocast, which meta does not have


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


# AFT-full has a T x T bias by definition
@pytest.mark.parametrize(
    "name, causal, options", [case for case in ALL if case.values[2].get("kind") != "full"]
)
def test_the_largest_tensor_grows_with_the_text_and_not_with_its_square(name, causal, options):
    defaults = {"kind": options["kind"]} if "kind" in options else {}
    sizes = []
    for T in (2048, 4096):
        attn = make_attention(name, 1, 8, causal=causal, max_len=T, **defaults)
        with Largest() as largest, torch.no_grad():
            attn(*torch.randn(3, 1, 1, T, 8))
        sizes.append(largest.numel)
    assert sizes[1] <= 2.2 * sizes[0]


# ---------------------------------------------------------------- by name


@every_causal
def test_a_gpt_generates_what_its_full_forward_pass_says(name, causal, options):
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=20, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**sizes, attention=name, options=options)).eval()
    model.init_weights(embd_std=1.0, init_std=0.2)
    idx = torch.randint(20, (2, 7))
    out = model.generate(idx, 20, temperature=0)
    assert torch.equal(model(out[:, :-1])[0].argmax(-1)[:, 6:], out[:, 7:])
    model(out, out)[1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_causal
def test_training_steps_lower_the_loss(name, causal, options):
    losses = losses_of_training(attention=name, options=options)
    assert losses[-1] < 0.6 * losses[0]


@every
def test_a_saved_module_comes_back_with_what_was_drawn(name, causal, options):
    attn, again = (make_attention(name, 2, 8, causal=causal, max_len=140, **options) for _ in range(2))
    again.load_state_dict(attn.state_dict())
    q, k, v = torch.randn(3, 1, 2, 60, 8)
    assert torch.equal(attn(q, k, v), again(q, k, v))


@every
def test_a_length_is_fixed_where_the_name_says_so(name, causal, options):
    attn = build(name, causal, options, max_len=12)
    x = torch.randn(1, 2, 13, 8)
    if not has_fixed_length(name, options):
        assert attn(x, x, x).shape == x.shape
        return
    with pytest.raises(ValueError, match=f"{name} was built for 12 tokens \\(max_len\\) and got 13"):
        attn(x, x, x)
    with pytest.raises(ValueError, match=f"{name} needs max_len"):
        make_attention(name, 2, 8, causal=causal, **options)


def test_a_gpt_of_fixed_length_says_so_and_others_go_on():
    sizes = dict(block_size=32, vocab_size=20, n_layer=1, n_head=2, n_embd=16)
    assert GPTConfig(**sizes, attention="hyena").max_length == 32
    assert GPTConfig(**sizes, attention="aft", options={"kind": "local"}).max_length == 32
    assert (
        GPTConfig(**sizes, attention="aft").max_length == GPTConfig(**sizes, attention="h3").max_length > 32
    )


@pytest.mark.parametrize("name", ONE_WAY)
def test_the_other_direction_is_refused_in_one_line(name):
    only = "causal" if ONE_WAY[name] else "bidirectional"
    with pytest.raises(ValueError, match=f"^{name} is {only} only: ") as e:
        make_attention(name, 2, 8, causal=not ONE_WAY[name], max_len=32)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked(name):
    build_it = dict(causal=ONE_WAY.get(name, True), max_len=32)
    with pytest.raises(ValueError, match=f"{name} takes no option colour"):
        make_attention(name, 2, 8, colour=1, **build_it)
    make_attention(name, 2, 8, tie=False, **build_it)  # no map: nothing to tie, as for softmax
    assert not learns_map(name) and name in attentions()
    attn = make_attention(name, 2, 8, **build_it)
    if not attn.causal:
        with pytest.raises(ValueError, match="bidirectional attention has no cache"):
            attn.extend(*torch.randn(3, 1, 2, 3, 8), {})
    with pytest.raises(ValueError, match=f"{name} needs as many queries as keys, not 3 and 4"):
        attn(torch.randn(1, 2, 3, 8), *torch.randn(2, 1, 2, 4, 8))


@pytest.mark.parametrize("name, options, message", [
    ("local", {"window": 0}, "local: window must be a whole number of at least 1, not 0"),
    ("sparse", {"stride": 0}, "sparse: stride must be a whole number of at least 1, not 0"),
    ("local", {"window": True}, "local: window must be a whole number of at least 1, not True"),
    ("longformer", {"n_global": 1.5}, "longformer: n_global must be a whole number of at least 1, not 1.5"),
    ("skyformer", {"n_landmarks": 4.5}, "skyformer: n_landmarks must be a whole number of at least 1, not 4.5"),
    ("skyformer", {"gamma": -1}, "skyformer: gamma must be at least 0, not -1"),
    ("bigbird", {"n_random": -1}, "bigbird: n_random must be a whole number of at least 0, not -1"),
    ("sinkhorn", {"temperature": 0}, "sinkhorn: temperature must be positive, not 0"),
    ("reformer", {"n_buckets": 3}, "reformer: n_buckets must be even and at least 2, not 3"),
    ("linformer", {"share": "some"}, "unknown share 'some' of linformer"),
    ("nystromformer", {"n_taps": 4}, "nystromformer: n_taps must be odd, or 0 for none, not 4"),
    ("synthesizer", {"kind": "sparse"}, "unknown kind 'sparse' of synthesizer"),
    ("aft", {"kind": "conv"}, "unknown kind 'conv' of aft"),
    ("skyformer", {"n_landmarks": 1}, "skyformer: n_landmarks must be even and at least 2, not 1"),
    ("h3", {"n_state": 5}, "h3: n_state must be even and at least 2, not 5"),
])  # fmt: skip
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_attention(name, 2, 8, causal=ONE_WAY.get(name, True), max_len=32, **options)


def test_the_nearest_name_is_suggested():
    with pytest.raises(ValueError, match="nystromformer"):
        make_attention("nystroemformer", 2, 8)


@pytest.mark.parametrize("name, other, follows", [("sparse", "stride", 32), ("reformer", "n_buckets", 16)])
def test_a_length_or_the_size_that_follows_from_it_is_needed(name, other, follows):
    with pytest.raises(ValueError, match=f"{name} needs max_len, .* or .*{other}"):
        make_attention(name, 2, 8)
    assert getattr(make_attention(name, 2, 8, max_len=1024), other) == follows
    assert getattr(make_attention(name, 2, 8, **{other: 6}), other) == 6


@pytest.mark.parametrize("name", ["bigbird", "aft"])
def test_train_takes_a_system_by_name(train, tmp_path, name):
    code, _, err = train("--attention", name, "--out_dir", tmp_path)
    assert code == 0, err


def test_train_refuses_a_bidirectional_system_in_one_line(train, tmp_path):
    code, _, err = train("--attention", "linformer", "--out_dir", tmp_path)
    assert code == 2 and "linformer is bidirectional only" in err and "Traceback" not in err
