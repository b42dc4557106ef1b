import torch


def repairs():
    return {
        "first": ("z = phi_k.cumsum(1)", "z = phi_k.cumsum(2)"),
        "second": ("scores = scores.tril(1)", "scores = scores.tril()"),
        "third": ("k = k - k.amax(-1, keepdim=True)", "pass"),
    }


def first(attend):
    """The weights sum to one: if all values are 1, all outputs are 1."""
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    torch.testing.assert_close(attend(q, k, torch.ones_like(v)), torch.ones_like(v))


def second(attend):
    """Tokens after token 2 do not change the outputs up to token 2."""
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    y, (q[:, :, 3:], k[:, :, 3:], v[:, :, 3:]) = attend(q, k, v), torch.randn(3, 2, 2, 2, 4)
    torch.testing.assert_close(attend(q, k, v)[:, :, :3], y[:, :, :3])


def third(attend):
    """A key that is larger by log 2 in every coordinate has twice the weight. The values are rows of the
    identity matrix, so the last row of y has the weights, up to the denominator."""
    q, k = torch.randn(2, 1, 1, 4, 4)
    k[:, :, 1] = k[:, :, 0] + torch.tensor(2.0).log()
    weights = attend(q, k, torch.eye(4)[None, None])[0, 0, -1]
    torch.testing.assert_close(weights[1] / weights[0], torch.tensor(2.0))
