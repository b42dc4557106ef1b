"""Eq. 3: its value, its gradient, its memory; mimicry leaves the teacher's activations alone and trains maps only."""

import json
import math
import sys

import pytest
import torch
from conftest import TINY

from attention import LinearAttention, linear_weights, softmax_attention, softmax_weights
from config import FitConfig
from distill import (
    MimicAttention,
    attention_cross_entropy,
    distill,
    folder_of,
    mimicry,
    pupil_of,
)
from feature_maps import FEATURE_MAPS, make_feature_map
from fused.mimicry import attention_cross_entropy as mimicry_in_blocks
from model import GPT, GPTConfig, map_parameters
from support import timing
from support.checkpoints import load_checkpoint
from support.devices import World
from swap import set_mode, sockets

FORMS = {"plain": attention_cross_entropy, "in blocks": mimicry_in_blocks}
B, H, T, D = 2, 3, 13, 4


def random_qk(dtype=torch.float64, scale=2.0):
    torch.manual_seed(0)
    return scale * torch.randn(2, B, H, T, D, dtype=dtype)


def plain_loops(q, k, phi_q, phi_k, causal, real):
    """Eq. 3 as it is written, for one head after the other: (loss (H,), entropy (H,))."""
    losses, entropies = [], []
    for h in range(H):
        loss, entropy, n = 0.0, 0.0, 0
        for b in range(B):
            for i in range(T):
                if not real[b, i]:
                    continue
                seen = [j for j in range(T) if (j <= i or not causal) and real[b, j]]
                exps = [torch.exp(q[b, h, i] @ k[b, h, j] / math.sqrt(D)) for j in seen]
                dots = [phi_q[b, h, i] @ phi_k[b, h, j] for j in seen]
                for e, s in zip(exps, dots):
                    p = e / sum(exps)
                    loss, entropy = loss - p * torch.log(s / sum(dots)), entropy - p * torch.log(p)
                n += 1
        losses.append(loss / n)
        entropies.append(entropy / n)
    return torch.stack(losses), torch.stack(entropies)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("block_size", [None, 1, 5, 64])  # None: the plain form
def test_loss_and_gradient_are_eq_3_in_plain_loops(causal, padded, block_size):
    q, k = random_qk()
    phi = make_feature_map("hedgehog", H, D).double()
    real = torch.ones(B, T, dtype=torch.bool)
    if padded:
        real[0, :4], real[1, 9:] = False, False  # left and right
    phi_q, phi_k = phi(q).detach().requires_grad_(), phi(k).detach().requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mask = dict(causal=causal, key_mask=real if padded else None)
    if block_size:
        found = mimicry_in_blocks(q, k, phi_q, phi_k, **mask, block_size=block_size)
    else:
        found = attention_cross_entropy(q, k, phi_q, phi_k, **mask)
    grads = torch.autograd.grad((found[0] * upstream).sum(), (phi_q, phi_k))
    wanted = plain_loops(q, k, phi_q, phi_k, causal, real)
    wanted_grads = torch.autograd.grad((wanted[0] * upstream).sum(), (phi_q, phi_k), allow_unused=True)
    for f, w in zip([*found, *grads], [*wanted, *wanted_grads]):
        torch.testing.assert_close(f, w.detach(), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("cross_entropy", FORMS.values(), ids=FORMS)
def test_the_loss_is_finite_for_every_map_and_never_below_the_entropy(name, cross_entropy):
    q, k = random_qk(torch.float32, scale=20.0)
    phi = make_feature_map(name, H, D)
    loss, entropy = cross_entropy(q, k, phi.query(q), phi.key(k))
    assert loss.isfinite().all() and (loss >= entropy - 1e-4).all()


@pytest.mark.parametrize("cross_entropy", FORMS.values(), ids=FORMS)
def test_a_perfect_mimic_has_the_entropy_as_its_loss_and_no_gradient(cross_entropy):
    q, k = random_qk()
    scores = (q @ k.mT / math.sqrt(D)).exp()  # phi(q_i).phi(k_j) with phi(k_j) the j-th unit vector
    phi_q, phi_k = (
        scores.requires_grad_(),
        torch.eye(T, dtype=torch.float64).expand(B, H, T, T).clone().requires_grad_(),
    )
    loss, entropy = cross_entropy(q, k, phi_q, phi_k)
    torch.testing.assert_close(loss.detach(), entropy, atol=1e-12, rtol=0)
    for grad in torch.autograd.grad(loss.sum(), (phi_q, phi_k)):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-10, rtol=0)


@pytest.mark.parametrize("cross_entropy", FORMS.values(), ids=FORMS)
def test_entropy_is_that_of_softmax_and_loss_that_of_linear_weights(cross_entropy):
    q, k = random_qk()
    phi = make_feature_map("t2r", H, D).double()
    P, A = softmax_weights(q, k), linear_weights(phi(q), phi(k))
    loss, entropy = cross_entropy(q, k, phi(q), phi(k))
    torch.testing.assert_close(entropy, -torch.special.xlogy(P, P).sum(-1).mean((0, 2)))
    torch.testing.assert_close(loss, -torch.special.xlogy(P, A).sum(-1).mean((0, 2)))


@pytest.mark.parametrize("cross_entropy", FORMS.values(), ids=FORMS)
def test_without_a_real_token_there_is_an_error(cross_entropy):
    q, k = random_qk()
    with pytest.raises(ValueError, match="no real token"):
        cross_entropy(q, k, q.exp(), k.exp(), key_mask=torch.zeros(B, T, dtype=torch.bool))


@pytest.mark.parametrize("cross_entropy", FORMS.values(), ids=FORMS)
def test_bfloat16_inputs_are_measured_in_float32(cross_entropy):
    q, k = random_qk(torch.float32)
    phi = make_feature_map("hedgehog", H, D)
    wanted = cross_entropy(q.bfloat16().float(), k.bfloat16().float(), phi(q.bfloat16()), phi(k.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy(q.bfloat16(), k.bfloat16(), phi(q.bfloat16()), phi(k.bfloat16()))
    for f, w in zip(found, wanted):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f, w, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_grows_linearly_with_length():
    """A step of distillation takes less than 10 KiB a token at 4,096 tokens and at 8,192: one T x T tensor takes 16,
    and 32."""
    phi, device = make_feature_map("hedgehog", 1, 8), torch.device("cpu")
    for length in (1024, 4096, 8192):  # the first is a warm-up
        q, k, v = torch.randn(3, 1, 1, length, 8)
        before = timing.reset_peak_mib(device)
        attend = MimicAttention(phi)
        attend(q, k, v)
        attend.loss.sum().backward()
        used = timing.peak_mib(device) - before
        assert length == 1024 or used < length * 10 / 1024, (length, used)


# ---------------------------------------------------------------- attention that mimics


@pytest.mark.parametrize("causal", [True, False])
def test_a_mimic_returns_the_softmax_output_and_its_loss_reaches_nothing_but_the_map(causal):
    q, k = random_qk()
    q, k, v = (x.clone().requires_grad_() for x in (q, k, torch.randn_like(q)))
    attend = MimicAttention(make_feature_map("hedgehog", H, D).double(), causal)
    y = attend(q, k, v)
    assert torch.equal(y, softmax_attention(q, k, v, causal=causal))
    grads = torch.autograd.grad(attend.loss.sum(), (q, k, v), allow_unused=True, retain_graph=True)
    assert grads == (None, None, None)
    attend.loss.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in attend.phi.parameters())


def tiny_gpt(attention="softmax", **changes) -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(block_size=32, vocab_size=40, n_layer=2, n_head=2, n_embd=32, attention=attention, qk_gain=20,
                         **changes)).eval()  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"position": "learned"}])
def test_a_distilled_layer_sees_the_teachers_activations(changes):
    teacher, idx = tiny_gpt(**changes), torch.randint(40, (2, 32))
    pupil = pupil_of(teacher, "hedgehog").eval()
    wanted = teacher(idx)[0]
    for mode in ("softmax", "mimic"):
        set_mode(pupil, mode)
        torch.testing.assert_close(pupil(idx)[0], wanted, atol=1e-6, rtol=1e-5)
    set_mode(pupil, "linear")
    assert (pupil(idx)[0] - wanted).abs().max() > 1e-3
    set_mode(pupil, "zero")
    others = torch.cat([idx[:, :-1].flip(1), idx[:, -1:]], 1)
    torch.testing.assert_close(pupil(others)[0][:, -1], pupil(idx)[0][:, -1])  # a token knows only itself
    assert list(pupil.state_dict()) == list(tiny_gpt("hedgehog", **changes).state_dict())


def test_modes_and_models_that_do_not_exist_are_errors():
    with pytest.raises(ValueError, match="unknown mode 'soft'.*mimic"):
        set_mode(tiny_gpt("hedgehog"), "soft")
    with pytest.raises(ValueError, match="no linear attention"):
        set_mode(tiny_gpt(), "mimic")
    with pytest.raises(ValueError, match="must have softmax attention, not elu"):
        pupil_of(tiny_gpt("elu"), "hedgehog")


def test_distillation_trains_the_maps_of_all_layers_and_nothing_else(tmp_path):
    pupil = pupil_of(tiny_gpt(), "hedgehog", tie=False)
    pupil.transformer.wte.weight.requires_grad_(False)
    before = {n: p.clone() for n, p in pupil.named_parameters()}
    data = torch.randint(40, (8, 2, 32))
    held_out = [(x,) for x in data[:2]]
    set_mode(pupil, "mimic")
    start = mimicry(pupil, held_out, lambda model, x: model(x))
    config = FitConfig(max_steps=40, lr=1e-2, warmup_steps=0, eval_interval=20, out_dir=str(tmp_path), device="cpu",
                       batch_size=2, dtype="float32")  # fmt: skip
    found = distill(pupil, lambda step: (data[step % 8],), held_out, lambda model, x: model(x), config,
                    World(0, 1, torch.device("cpu")), {"config": {}})  # fmt: skip
    assert {n for n, p in pupil.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if ".phi." in n
    }
    assert all(found[key].shape == (2, 2) for key in ("kl", "entropy", "cross_entropy"))
    torch.testing.assert_close(found["kl"], found["cross_entropy"] - found["entropy"])
    assert (found["kl"] < start["kl"]).all() and torch.equal(found["entropy"], start["entropy"])
    assert type(sockets(pupil)[0].attend) is LinearAttention
    assert (
        not pupil.transformer.wte.weight.requires_grad
        and pupil.lm_head.weight is pupil.transformer.wte.weight
    )
    assert all(p.requires_grad for n, p in pupil.named_parameters() if "wte" not in n)
    tensors, _ = load_checkpoint(tmp_path / "best.safetensors")
    assert {n.split(".")[-1] for n in tensors if n.startswith("model.")} == {"weight", "bias"}
    assert all(".phi." in n for n in tensors)  # what is frozen is not saved
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(logged[-1]["val_kl_by_head"]) == 2 and "val_entropy_by_head" in logged[-1]


def test_a_map_without_parameters_cannot_be_distilled(tmp_path):
    with pytest.raises(ValueError, match="no parameters"):
        distill(pupil_of(tiny_gpt(), "elu"), None, [], None, FitConfig(out_dir=str(tmp_path)), None, {})
    assert not map_parameters(tiny_gpt("elu")) and map_parameters(tiny_gpt("t2r"))


# ---------------------------------------------------------------- the command


@pytest.fixture
def teacher(train, tmp_path):
    assert train("--attention", "softmax", "--out_dir", tmp_path / "teacher")[0] == 0
    return tmp_path / "teacher"


def test_the_command_writes_a_linear_checkpoint_that_other_commands_take(teacher, command, tmp_path):
    flags = ["--max_steps", 4, "--eval_interval", 2, "--held_out", 2, "--batch_size", 2, "--device", "cpu"]
    flags += ["--options", "init=random", "n_features=24"]
    code, stdout, stderr = command("distill", teacher, *flags, "--out_dir", tmp_path / "pupil")
    assert code == 0, stderr
    assert "| 0 |" in stdout and "KL" in stdout
    tensors, meta = load_checkpoint(tmp_path / "pupil")
    assert meta["config"]["attention"] == "hedgehog" and meta["tokenizer"] == "bytes"
    assert meta["config"]["options"] == {"init": "random", "n_features": 24}
    of_teacher = load_checkpoint(teacher)[0]
    assert all(torch.equal(tensors[n], t) for n, t in of_teacher.items() if n.startswith("model."))
    facts = json.loads((tmp_path / "pupil" / "kl.json").read_text())
    assert len(facts["kl"]) == 1 and len(facts["kl"][0]) == 2 and facts["commit"]
    assert (tmp_path / "pupil" / "kl.png").stat().st_size > 5000
    assert command("sample", tmp_path / "pupil", "--max_new_tokens", 5, "--device", "cpu")[0] == 0
    resumed = command(
        "distill", teacher, *flags, "--out_dir", tmp_path / "pupil", "--resume", "--max_steps", 6
    )
    assert resumed[0] == 0 and "resuming" in resumed[1] + resumed[2]


def test_distillation_stops_when_patience_is_over(train, tmp_path):
    flags = [
        *TINY,
        "--out_dir",
        tmp_path,
        "--lr",
        1e-30,
        "--eval_interval",
        1,
        "--max_steps",
        40,
        "--patience",
        3,
    ]
    code, _, stderr = train(*flags)
    assert code == 0, stderr
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["step"] <= 5  # the first is the best, or nearly


@pytest.mark.parametrize("flags, message", [
    (["--feature_map", "elu"], "--feature_map takes hedgehog, hedgehog_exp or t2r, not 'elu'"),
    (["--held_out", "0"], "held_out must be positive"),
    (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
    ([], "python train.py --attention softmax trains one"),
])  # fmt: skip
def test_wrong_flags_are_one_line(command, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command("distill", *flags)
    assert code == 2 and message in stderr and stderr.count("\n") == 1


def test_a_teacher_with_linear_attention_is_an_error(train, command, tmp_path):
    assert train("--out_dir", tmp_path / "linear")[0] == 0
    code, _, stderr = command("distill", tmp_path / "linear")
    assert code == 2 and "must have softmax attention, not hedgehog" in stderr


def test_a_mimic_continues_a_text_with_softmax():
    """Generation in mode "mimic" is that of the teacher."""
    teacher, idx = tiny_gpt(), torch.randint(40, (1, 9))
    pupil = pupil_of(teacher, "hedgehog").eval()
    set_mode(pupil, "mimic")
    assert torch.equal(pupil.generate(idx, 12, temperature=0), teacher.generate(idx, 12, temperature=0))


def test_the_fast_loss_takes_one_mask_for_all_and_refuses_other_lengths():
    q, k = random_qk()
    mask = torch.arange(T)[None] < 9
    for whole, ours in zip(
        *(mimicry_in_blocks(q, k, q.exp(), k.exp(), key_mask=m) for m in (mask.expand(B, T), mask))
    ):
        torch.testing.assert_close(whole, ours)
    with pytest.raises(ValueError, match="as many keys as queries"):
        mimicry_in_blocks(q[:, :, :5], k, q[:, :, :5].exp(), k.exp())


def test_a_mode_keeps_what_belongs_to_the_map_and_computes_what_it_says():
    model = GPT(GPTConfig(32, 64, n_layer=1, n_head=2, n_embd=16))
    (socket,) = sockets(model)
    socket.attend.chunk_size = 7
    q, k, v = torch.randn(3, 1, 2, 9, 8).double()
    set_mode(model, "softmax")
    assert torch.equal(socket.attend.weights(q, k), softmax_weights(q, k))
    set_mode(model, "zero")
    narrow, cache = v[..., :3].float(), {}
    for y in (socket.attend(q, k, narrow), socket.attend.extend(q, k, narrow, cache, key_mask=None)):
        assert torch.equal(y, torch.zeros(1, 2, 9, 3))  # the shape and dtype of v
    set_mode(model, "linear")
    assert socket.attend.chunk_size == 7


def test_a_file_of_a_run_names_the_run():
    assert folder_of("out/a/best.safetensors") == folder_of("out/a")
