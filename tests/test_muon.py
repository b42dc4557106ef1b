"""Muon: W of the feature maps turns all directions equally far; all else is AdamW's."""

import pytest
import torch
from torch import nn

from support.checkpoints import load_checkpoint
from support.muon import Muon, orthogonalised

LR, DECAY, BETAS = 3e-2, 0.1, (0.9, 0.99)
SHAPES = [(2, 5, 5), (2, 3, 7), (3, 7, 4), (1, 4, 2)]  # (H, D, d')


def polynomial(s: float) -> float:
    """What five steps make of one singular value."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def reference(G: torch.Tensor) -> torch.Tensor:
    """U p(S / |S|) V^T by singular values, one head at a time."""
    found = torch.empty_like(G)
    for h in range(G.size(0)):
        U, S, Vh = torch.linalg.svd(G[h], full_matrices=False)
        p = torch.tensor([polynomial(float(s / S.square().sum().sqrt())) for s in S], dtype=G.dtype)
        found[h] = U @ torch.diag(p) @ Vh
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(G)
    torch.testing.assert_close(found, reference(G))
    torch.testing.assert_close(orthogonalised(1e-9 * G), found)  # the size of a gradient says nothing
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = S.clamp(min=0.2 * S[:, :1])  # what is far smaller than the rest stays smaller
    values = torch.linalg.svdvals(orthogonalised(U @ torch.diag_embed(S) @ Vh))
    assert 0.65 < values.min() and values.max() < 1.25


def test_no_gradient_is_no_step_and_float32_is_close():
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    G = torch.randn(4, 64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonalised(G.float()).double(), reference(G), atol=1e-4, rtol=1e-3)


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def groups_of(parameters: list[nn.Parameter]) -> list[dict]:
    *maps, other = parameters
    return [dict(name="matrices", params=[other], lr=LR, weight_decay=DECAY),
            dict(name="feature maps", params=maps, lr=LR, weight_decay=DECAY)]  # fmt: skip


def test_a_step_is_the_formula_and_all_but_w_is_adamws():
    """Three steps in float64: W by the formula, in plain lines; bias, gain of a window and other matrices by AdamW."""
    shapes = [*SHAPES, (2, 1, 5), (2,), (6, 4)]  # ..., biases, a vector, a matrix that is no map
    parameters = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    expected, M = (
        [p.detach().clone() for p in parameters],
        [torch.zeros(s, dtype=torch.float64) for s in shapes],
    )
    muon = Muon(groups_of(parameters), betas=BETAS)
    adamw = torch.optim.AdamW(groups_of(twins), betas=BETAS)
    for step in range(3):
        for optimizer, ps in ((muon, parameters), (adamw, twins)):
            gradients(ps, step)
            optimizer.step()
        for i, shape in enumerate(SHAPES):
            G = twins[i].grad
            M[i] = BETAS[0] * M[i] + (1 - BETAS[0]) * G
            size = 0.2 * max(shape[1:]) ** 0.5
            O = reference(BETAS[0] * M[i] + (1 - BETAS[0]) * G)
            expected[i] = expected[i] - LR * DECAY * expected[i] - size * LR * O
    for i, (p, twin) in enumerate(zip(parameters, twins)):
        torch.testing.assert_close(
            p.detach(), expected[i] if i < len(SHAPES) else twin.detach(), rtol=1e-10, atol=1e-12
        )
        assert torch.equal(p, twin) == (i >= len(SHAPES))


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (64, 32)])
def test_a_step_has_the_size_of_one_of_adamw(shape):
    """0.2 lr is the root mean square of AdamW's steps in practice: with it, one learning rate serves both."""
    W = nn.Parameter(torch.zeros(4, *shape))
    muon = Muon([dict(name="feature maps", params=[W], lr=LR, weight_decay=0.0)], betas=BETAS)
    gradients([W], 0)
    muon.step()
    rms = W.detach().square().mean().sqrt()
    assert 0.8 < rms / (0.2 * LR) < 1.1


def test_a_parameter_without_a_gradient_stays_and_a_closure_is_called():
    W = [nn.Parameter(torch.eye(3)[None]) for _ in range(2)]
    muon = Muon(W, lr=LR, weight_decay=DECAY, betas=BETAS)  # a group without a name

    def closure():
        loss = W[0].square().sum()
        loss.backward()
        return loss

    assert muon.step(closure) == 3.0
    turned = 0.2 * 3**0.5 * LR * orthogonalised(torch.eye(3)[None])
    torch.testing.assert_close(W[0].detach(), (1 - LR * DECAY) * torch.eye(3)[None] - turned)
    assert torch.equal(W[1], torch.eye(3)[None])


def test_training_with_muon_takes_its_steps_and_is_another_run_than_adamws(train, tmp_path):
    assert train("--out_dir", tmp_path / "adamw")[0] == 0
    assert train("--out_dir", tmp_path / "straight", "--muon")[0] == 0
    assert train("--out_dir", tmp_path / "parts", "--muon", "--max_steps", 3)[0] == 0
    code, _, stderr = train("--out_dir", tmp_path / "parts", "--resume", "--max_steps", 3)
    assert code == 2 and "muon True -> False" in stderr
    weights = {name: load_checkpoint(tmp_path / name / "last.safetensors") for name in ("adamw", "straight")}
    config = weights["straight"][1]["config"]
    assert config["muon"] and not weights["adamw"][1]["config"]["muon"]
    phi = [n for n in weights["adamw"][0] if n.startswith("model.") and n.endswith("phi.weight")]
    assert phi and all(not torch.equal(*(weights[name][0][n] for name in weights)) for n in phi)
    # first moments, second moments and steps have AdamW's names and places
    assert weights["adamw"][0].keys() == weights["straight"][0].keys()
