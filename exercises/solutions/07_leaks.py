import torch


def repairs():
    return {
        "first": ("z = phi_k.cumsum(1)", "z = phi_k.cumsum(2)"),
        "second": ("scores = scores.tril(1)", "scores = scores.tril()"),
        "third": ("k = k - k.amax(-1, keepdim=True)", "pass"),
    }


def first(attend):
    """Weights sum to one: values that are all 1 come back as 1."""
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    torch.testing.assert_close(attend(q, k, torch.ones_like(v)), torch.ones_like(v))


def second(attend):
    """What comes after token 2 changes nothing up to it."""
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    y, (q[:, :, 3:], k[:, :, 3:], v[:, :, 3:]) = attend(q, k, v), torch.randn(3, 2, 2, 2, 4)
    torch.testing.assert_close(attend(q, k, v)[:, :, :3], y[:, :, :3])


def third(attend):
    """A key that is larger by log 2 in every coordinate weighs twice as much. Values are 1 for one key and 0 for the
    others, so the last row of y is the weights, up to the denominator."""
    q, k = torch.randn(2, 1, 1, 4, 4)
    k[:, :, 1] = k[:, :, 0] + torch.tensor(2.0).log()
    weights = attend(q, k, torch.eye(4)[None, None])[0, 0, -1]
    torch.testing.assert_close(weights[1] / weights[0], torch.tensor(2.0))
