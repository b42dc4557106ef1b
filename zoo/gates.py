"""Systems without attention weights: sums over time, each channel by itself, times a gate made of q.

AFT weighs values by exp(k), and q is a gate on the mean. H3 and Hyena are long convolutions, and share one
function for them. They multiply queries with keys, y_t = sum_j h_{t-j} q_t k_j v_j, but a channel at a time:
no dot product q_t.k_j over the channels of a head weighs a value. In a GPT with rope, q and k arrive rotated by
position, as for every attention; position="learned" leaves them as they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.system import Part, System, largest, side_by_side, uniform

DIRECT = 32  # inside so many tokens a convolution is a matrix product
ROWS = 16  # queries at a time in AFT-full


def long_convolution(x: Tensor, h: Tensor) -> Tensor:
    """y_t = sum_{j <= t} h_{t-j} x_j, channel by channel: x (B, H, T, D), h (H, D, T), in O(T log(T)^2).

    One FFT over the whole text would mix later tokens into earlier outputs by its rounding. Here every
    product takes the first half of a block to the second half: blocks of 2, 4, 8 ... times DIRECT tokens.
    """
    T, size = x.size(2), DIRECT
    whole = DIRECT * 2 ** max(math.ceil(math.log2(T / DIRECT)), 0)
    x = F.pad(x.permute(1, 3, 0, 2), (0, whole - T))  # (H, D, B, whole)
    h = F.pad(h, (0, whole - T))[:, :, None]
    lag = torch.arange(DIRECT, device=x.device)
    lag = lag - lag[:, None]  # (j, t): t - j
    toeplitz = h[:, :, 0, lag.clamp(min=0)].masked_fill(lag < 0, 0.0)  # (H, D, j, t)
    blocks = x.unflatten(-1, (-1, DIRECT)).flatten(2, 3)  # (H, D, B whole / DIRECT, j)
    y = (blocks @ toeplitz).reshape(x.shape)
    while size < whole:
        first = x.unflatten(-1, (-1, 2, size))[..., 0, :]  # the first halves: (H, D, B, blocks, size)
        spectrum = torch.fft.rfft(h[..., None, : 2 * size], 2 * size)
        second = torch.fft.irfft(torch.fft.rfft(first, 2 * size) * spectrum, 2 * size)[..., size:]
        y = y + torch.stack([torch.zeros_like(second), second], -2).flatten(-3)
        size *= 2
    return y[..., :T].permute(2, 0, 3, 1)


def short_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """y_t = sum_i taps_i x_{t-i}, channel by channel: x (B, H, T, D), taps (H, n, D)."""
    T, n = x.size(2), taps.size(1)
    x = F.pad(x, (0, 0, n - 1, 0))
    return sum(taps[:, i, None].to(x.dtype) * x[:, :, n - 1 - i : n - 1 - i + T] for i in range(n))


def delayed(part: Part, steps: int) -> Part:
    """The part of the token `steps` before each; of no key where there is none."""
    least = torch.finfo(part.m.dtype).min
    T = part.m.size(2)
    values = (0.0, 0.0, least)
    return Part(*(F.pad(x, (0, 0, steps, 0), value=c)[:, :, :T] for x, c in zip(part, values, strict=True)))


def running(part: Part) -> Part:
    """The sums over all tokens up to each, in log2(T) steps. Each step doubles how far the sums reach."""
    steps = 1
    while steps < part.m.size(2):
        part, steps = part | delayed(part, steps), 2 * steps
    return part


class AFT(System):
    """Attention Free Transformer (Zhai et al., 2021), Eq. 2, each channel by itself:

        y_t = sigmoid(q_t) * sum_j exp(k_j + w_tj) * v_j / sum_j exp(k_j + w_tj)    over all j; causal: j <= t

    kind      position bias w                            time                     memory
    simple    0                                          O(T log T)               O(T log T)
    local     learned for |t - j| < window, else 0       O(T (window + log T))    O(T (window + log T))
    full      learned for all t, j                       O(T^2)                   O(T^2)

    Causal sums are running sums with the largest k so far taken out, so no exponential overflows, and none
    depends on later keys. For local and full, max_len is a limit: w belongs to absolute positions. w begins
    at 0, so that both begin as simple. Tokens outside the window of local do count, with w = 0.
    The paper writes the w of the full form as a product of two thin matrices, to save parameters; here it
    is one matrix, as in Eq. 2. AFT-conv is left out.
    """

    has_weights = False

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        kind: str = "simple", window: int = 16,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, window=window)
        if kind not in ("simple", "local", "full"):
            raise ValueError(f"unknown kind {kind!r} of aft: choose simple, local or full")
        self.kind, self.window = kind, window
        if kind != "simple":
            rows, band = self.needed_length(), window if causal else 2 * window - 1
            self.w = nn.Parameter(torch.zeros(rows, rows if kind == "full" else band))

    @classmethod
    def fixed_length(cls, kind: str = "simple", **options) -> bool:
        return kind != "simple"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        k = k.masked_fill(~real[:, None, :, None], -math.inf)
        return q.sigmoid() * getattr(self, self.kind)(k, v).y

    def single(self, k: Tensor, v: Tensor) -> Part:
        """Every token as a part of its own."""
        m = largest(k[..., None])[..., 0]
        e = (k - m).exp()  # 1, and 0 for padding
        return Part(e * v, e, m)

    def simple(self, k: Tensor, v: Tensor) -> Part:
        if self.causal:
            return running(self.single(k, v))
        m = largest(k, -2)
        e = (k - m).exp()
        return Part((e * v).sum(-2, keepdim=True), e.sum(-2, keepdim=True), m)

    def local(self, k: Tensor, v: Tensor) -> Part:
        """The far tokens by running sums from both ends, and those in the window one by one."""
        tokens, after = self.single(k, v), 0 if self.causal else self.window - 1
        part = delayed(running(tokens), self.window)
        if not self.causal:
            backwards = running(tokens.map(lambda x: x.flip(2)))
            part = part | delayed(backwards, self.window).map(lambda x: x.flip(2))
        around = (0, 0, self.window - 1, after)  # zero columns; tokens before and after
        near_k = F.pad(k, around, value=-math.inf).unfold(2, self.w.size(1), 1)  # (B, H, T, D, window)
        near_v = F.pad(v, around).unfold(2, self.w.size(1), 1)
        scores = near_k + self.w[: k.size(2), None].to(k.dtype)
        m = largest(scores)
        e = (scores - m).exp()
        return part | Part((e * near_v).sum(-1), e.sum(-1), m[..., 0])

    def full(self, k: Tensor, v: Tensor) -> Part:
        """Queries in groups of ROWS. What is before the group is a matrix product; inside, one by one."""
        T, parts = k.size(2), []
        w = self.w[:T, :T].to(k.dtype)
        if not self.causal:
            return self.product(w, k, v)
        for start in range(0, T, ROWS):
            own = slice(start, min(start + ROWS, T))
            seen = torch.ones_like(w[own, own], dtype=torch.bool).tril()[..., None]
            scores = (k[:, :, None, own] + w[own, own, None]).masked_fill(~seen, -math.inf)  # (..., t, j, D)
            m = largest(scores, -2)
            e = (scores - m).exp()
            part = Part((e * v[:, :, None, own]).sum(-2), e.sum(-2), m[..., 0, :])
            if start:
                part = part | self.product(w[own, :start], k[:, :, :start], v[:, :, :start])
            parts.append(part)
        return side_by_side(parts, 2)

    def product(self, w: Tensor, k: Tensor, v: Tensor) -> Part:
        """exp(w) (exp(k) v): w (t, j), k and v (B, H, j, D). The largest w and k are taken out by themselves, so
        a row is lost in float32 if its w + k are all about 90 below their sum."""
        of_w, of_k = largest(w), largest(k, -2)
        W, e = (w - of_w).exp(), (k - of_k).exp()
        return Part(W @ (e * v), W @ e, of_w + of_k)


class H3(System):
    """Hungry Hungry Hippos (Fu et al., 2023), Sec. 3.1, each channel by itself:

        y = q * SSM_diag(SSM_shift(k) * v)

        SSM_shift    c_t = sum_{i < n_shift} a_i k_{t-i}                    the last few keys
        SSM_diag     s_t = A s_{t-1} + B u_t,    o_t = Re(C s_t) + D u_t    the past of u = c * v

    A is diagonal and complex. So o is the convolution of u with h_t = Re(sum_n C_n B_n A_n^t) + D [t = 0].
    As in S4D (Gu et al., 2022), A = exp(dt lambda) and B = (A - 1) / lambda, with lambda_n = -1/2 + i pi n
    at the start. dt, lambda, C and D are learned.
    Complexity: O(T (log(T)^2 + n_state)) time and O(T) memory, for any length. Causal only. As a recurrence
    it would need n_state / 2 complex numbers a channel; `extend` does not use that.
    Differences: the paper's heads of d_h channels keep all d_h^2 products k v^T; here d_h = 1, as in the
    formula. The shift has no D, which a_0 already is. Public code takes one FFT over 2 T tokens, whose
    rounding lets later tokens touch earlier outputs (see long_convolution).
    """

    refused = {False: "its state runs from left to right"}
    has_weights = False

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        n_shift: int = 4, n_state: int = 64,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, n_shift=n_shift, n_state=n_state)
        if n_state % 2:
            raise ValueError(f"h3: n_state must be even and at least 2, not {n_state}")
        n = n_state // 2  # the other half are the conjugates
        self.taps = uniform(n_head, n_shift, head_dim, fan_in=n_shift)  # a
        low, high = math.log(1e-3), math.log(1e-1)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(n_head, head_dim))
        self.log_decay = nn.Parameter(torch.full((n_head, head_dim, n), math.log(0.5)))  # of -Re(lambda)
        self.frequency = nn.Parameter((math.pi * torch.arange(n)).expand(n_head, head_dim, n).clone())
        self.C = nn.Parameter(torch.randn(n_head, head_dim, n, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.ones(n_head, head_dim))

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """log A and 2 C B, (H, D, n) each: 2 for the conjugate numbers."""
        dt, decay, frequency, C = (
            x.to(dtype) for x in (self.log_dt.exp(), self.log_decay.exp(), self.frequency, self.C)
        )
        lam = torch.complex(-decay, frequency)
        log_A = dt[..., None] * lam
        return log_A, 2 * torch.view_as_complex(C) * (log_A.exp() - 1) / lam

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        log_A, CB = self.system(q.dtype)
        T, early = q.size(2), torch.arange(DIRECT, device=q.device, dtype=q.dtype)
        late = DIRECT * torch.arange(-(-T // DIRECT), device=q.device, dtype=q.dtype)[:, None]
        powers = (log_A[..., None] * early).exp()  # A^(late + early) = A^late A^early: (H, D, n, DIRECT)
        h = (CB[..., None, :] * (log_A[..., None, :] * late).exp()) @ powers
        h = h.real.flatten(2)[..., :T]  # (H, D, T)
        u = short_convolution(k, self.taps) * v
        return q * (long_convolution(u, h) + self.D[:, None].to(q.dtype) * u)


class Hyena(System):
    """Hyena (Poli et al., 2023), Definition 3.1 with order 2, each channel by itself:

        y = q * (h2 conv (k * (h1 conv v)))

    First q, k and v each pass a short convolution of n_short taps. The long filters come from a small network
    (Eq. 7), which is why their number of parameters does not depend on T:

        h_t = exp(-a t / max_len) FFN(PositionalEncoding(t)) + D [t = 0]

    The encoding is t / max_len and n_bands cosines and sines; the FFN has two hidden layers with sines. At
    max_len tokens the decay has reached 10^(-4/3) in the first channel of a head, and 10^(-20/3) in the last.
    Complexity: O(T log(T)^2) time and O(T) memory. Causal only. max_len is the unit of time, and a limit.
    Public code: "order 2" is one long filter there, y = q * (h conv (k * v)): H3 with another filter. It adds
    a constant to the decay, and has biases in the short convolutions. The paper's FFN has four layers and
    learns the decay a; here a is fixed.
    """

    refused = {False: "its filters look back only"}
    has_weights = False

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        n_short: int = 3, n_bands: int = 8, n_hidden: int = 64,
    ):  # fmt: skip
        super().__init__(
            n_head, head_dim, causal, max_len, n_short=n_short, n_bands=n_bands, n_hidden=n_hidden
        )
        self.needed_length()
        self.taps = uniform(3, n_head, n_short, head_dim, fan_in=n_short)  # of q, k and v
        self.n_bands, n_in = n_bands, 1 + 2 * n_bands
        self.W_in, self.b_in = (uniform(*s, fan_in=n_in) for s in ((n_in, n_hidden), (n_hidden,)))
        self.W_mid, self.b_mid = (uniform(*s, fan_in=n_hidden) for s in ((n_hidden, n_hidden), (n_hidden,)))
        self.W_out = uniform(n_hidden, 2 * n_head * head_dim, fan_in=n_hidden)
        self.D = nn.Parameter(torch.ones(2, n_head, head_dim))

    @classmethod
    def fixed_length(cls, **options) -> bool:
        return True

    def filters(self, T: int, dtype: torch.dtype) -> Tensor:
        """h1 and h2 without D: (2, H, D, T)."""
        W_in, b_in, W_mid, b_mid, W_out = (
            x.to(dtype) for x in (self.W_in, self.b_in, self.W_mid, self.b_mid, self.W_out)
        )
        t = torch.arange(T, device=W_in.device, dtype=dtype)[:, None] / self.max_len
        angle = 2 * math.pi * t * torch.arange(1, self.n_bands + 1, device=t.device, dtype=dtype)
        x = (torch.cat([t, angle.cos(), angle.sin()], -1) @ W_in + b_in).sin()  # (T, n_hidden)
        h = ((x @ W_mid + b_mid).sin() @ W_out).T.unflatten(0, (2, self.n_head, self.head_dim))
        decay = math.log(100) * torch.linspace(2 / 3, 10 / 3, self.head_dim, device=t.device, dtype=dtype)
        return h * (-decay[:, None] * t.T).exp()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        q, k, v = (short_convolution(x, taps) for x, taps in zip((q, k, v), self.taps, strict=True))
        for gate, h, D in zip((k, q), self.filters(q.size(2), q.dtype), self.D.to(q.dtype), strict=True):
            v = gate * (long_convolution(v, h) + D[:, None] * v)
        return v
