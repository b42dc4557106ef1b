"""Systems that take the T x T weights for a matrix of low rank, or learn them without keys.

Linformer mixes keys and values down to a fixed number. Nystromformer and Skyformer go through a few
landmarks. These three mix the whole text before any query sees it, so they have no causal form. Synthesizer
makes its weights from queries alone, or from nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.system import System, dot_products, softmax_part, uniform

ROWS = 128  # queries at a time where all T weights of a query are made


def pseudo_inverse(A: Tensor, n_iter: int) -> Tensor:
    """A^+ by an iteration of third order (Razavi et al., 2014), as in Xiong et al. (2021). It converges because
    it starts at A^T over the largest column sum times the largest row sum. Rows and columns of 0 stay 0."""
    eye = torch.eye(A.size(-1), dtype=A.dtype, device=A.device)
    size = A.abs().sum(-1).amax(-1) * A.abs().sum(-2).amax(-1)
    Z = A.mT / torch.where(size > 0, size, 1.0)[..., None, None]
    for _ in range(n_iter):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
    return Z


class Linformer(System):
    """Linformer (Wang et al., 2020), Eq. 7:

        y = softmax(q (E k)^T / sqrt(D)) F v,    E and F (n_mixtures, max_len) learned

    Complexity: O(T n_mixtures) time and memory. Bidirectional only: each of the n_mixtures keys is a
    mixture of all tokens. max_len is a limit: a column of E belongs to a position. A shorter text takes the
    first T columns.
    share: "none": each head has its E and F; "heads": all heads have one E and one F; "all": also E = F. The
    paper can share one E between layers too.
    Padding adds nothing to a mixture. E and F begin with variance 1 / max_len. With n_mixtures = T and E
    and F the identity this is softmax attention.
    """

    refused = {True: "every projected key is a mixture of all tokens, also of later ones"}

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = False, max_len: int | None = None,
        n_mixtures: int = 64, share: str = "heads",
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, n_mixtures=n_mixtures)
        if share not in ("none", "heads", "all"):
            raise ValueError(f"unknown share {share!r} of linformer: choose none, heads or all")
        shape = n_head if share == "none" else 1, n_mixtures, self.needed_length()
        self.E = nn.Parameter(torch.randn(shape) / math.sqrt(self.max_len))
        self.F = self.E if share == "all" else nn.Parameter(torch.randn(shape) / math.sqrt(self.max_len))

    @classmethod
    def fixed_length(cls, **options) -> bool:
        return True

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        E, F_ = (x[..., : q.size(2)].to(q.dtype) for x in (self.E, self.F))
        return softmax_part(dot_products(q, E @ k), F_ @ v).y


class Nystromformer(System):
    """Nystromformer (Xiong et al., 2021), with q~ and k~ the means of n_landmarks segments of q and k:

        y = softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v + conv(v),    all scores divided by sqrt(D)

    The pseudo-inverse is n_iter steps of an iteration. conv is a depth-wise convolution over time, one
    kernel of n_taps for each head (n_taps = 0: none): the paper's skip connection.
    Complexity, with m = n_landmarks: O(T m + m^3 n_iter) time and O(T m + m^2) memory, for any length.
    Bidirectional only: a mean is over later tokens too. With T <= n_landmarks each token is a landmark, and y
    is softmax attention once the iteration has converged.
    Public code: T must be a multiple of n_landmarks there, and padding counts in the means. Here segments are
    counted in real tokens, and their sizes differ by at most one. By default it also starts the iteration for
    all heads of a batch from their largest column sum; here no example depends on another.
    """

    refused = {True: "its landmarks are means over segments, also of later tokens"}

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = False, max_len: int | None = None,
        n_landmarks: int = 32, n_iter: int = 6, n_taps: int = 33,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, n_landmarks=n_landmarks, n_iter=n_iter)
        if n_taps < 0 or n_taps % 2 == 0 and n_taps > 0:
            raise ValueError(f"nystromformer: n_taps must be odd, or 0 for none, not {n_taps}")
        self.n_landmarks, self.n_iter = n_landmarks, n_iter
        self.taps = uniform(n_head, 1, n_taps, 1, fan_in=n_taps) if n_taps else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        rank, count = real.cumsum(1) - 1, real.sum(1, keepdim=True)  # among real tokens; how many they are
        segment = rank * self.n_landmarks // count.clamp(min=1)  # (B, T). Fewer tokens: some stay empty
        of = (segment[:, None] == torch.arange(self.n_landmarks, device=q.device)[:, None]) & real[:, None]
        of, there = of.to(q.dtype)[:, None], of.any(-1)[:, None, None]  # (B, 1, m, T); (B, 1, 1, m)
        size = of.sum(-1, keepdim=True).clamp(min=1.0)
        q_mean, k_mean = of @ q / size, of @ k / size  # (B, H, m, D)

        def scores(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
            return dot_products(q, k).masked_fill(~seen, -math.inf)

        one = torch.eye(self.n_landmarks, dtype=q.dtype, device=q.device)
        A = softmax_part(scores(q_mean, k_mean, there), one).y.masked_fill(~there.mT, 0.0)
        inner = softmax_part(scores(q_mean, k, real[:, None, None]), v).y  # (B, H, m, D)
        y = softmax_part(scores(q, k_mean, there), pseudo_inverse(A, self.n_iter) @ inner).y
        if self.taps is None:
            return y
        taps = self.taps.to(v.dtype)
        return y + F.conv2d(v, taps, padding=(taps.size(2) // 2, 0), groups=self.n_head)


class Skyformer(System):
    """Skyformer (Chen et al., 2021), Sec. 4: a Gaussian kernel in the place of softmax, by Nystrom's method.

        y = C v,    C_ij = c(q_i, k_j) = exp(-|q_i - k_j|^2 / (2 sqrt(D)))
        C ~ c(q, Z) (c(Z, Z) + gamma I)^-1 c(Z, k),    Z landmarks among q and k

    C has no denominator: c is exp(q.k / sqrt(D)), divided by a norm of q and a norm of k. It is a corner of
    the kernel matrix of all q and k, which is positive semidefinite, so Nystrom's method applies. The
    inverse is the iteration of Nystromformer, of D_M^{-1/2} M D_M^{-1/2} with M = c(Z, Z) + gamma I and its
    row sums D_M.
    Complexity, with m = n_landmarks: O(T m + m^3 n_iter) time and O(T m + m^2) memory, for any length.
    Bidirectional only: Z comes from the whole text.
    Paper and public code draw half of Z from q and half from k, at random in every forward pass. Here they
    are tokens at equal distances, so that the same input gives the same output. With a landmark for every q
    and k this is C v, up to gamma and the iteration. Public code has gamma = 0.1.
    """

    refused = {True: "its landmarks come from the whole sequence, also from later tokens"}

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = False, max_len: int | None = None,
        n_landmarks: int = 64, n_iter: int = 6, gamma: float = 1e-3,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, n_landmarks=n_landmarks, n_iter=n_iter)
        if n_landmarks % 2:
            raise ValueError(f"skyformer: n_landmarks must be even and at least 2, not {n_landmarks}")
        if not gamma >= 0:
            raise ValueError(f"skyformer: gamma must be at least 0, not {gamma}")
        self.n_landmarks, self.n_iter, self.gamma = n_landmarks // 2, n_iter, gamma

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        rank, count = real.cumsum(1) - 1, real.sum(1, keepdim=True)  # among real tokens; how many they are
        n = count.clamp(max=self.n_landmarks)  # landmarks among queries, and as many among keys
        slot = torch.arange(self.n_landmarks, device=q.device).expand(len(q), -1)  # (B, m)
        wanted = slot * count // n.clamp(min=1)  # the rank of each landmark
        at = torch.searchsorted(rank, wanted).clamp(max=q.size(2) - 1)  # the first token with that rank
        there = (slot < n).repeat(1, 2)[:, None, None]  # (B, 1, 1, 2 m)
        at = at[:, None, :, None].expand(-1, q.size(1), -1, q.size(3))
        Z = torch.cat([q.gather(2, at), k.gather(2, at)], 2)  # (B, H, 2 m, D)

        M = self.kernel(Z, Z) + self.gamma * torch.eye(Z.size(2), dtype=q.dtype, device=q.device)
        M = M.masked_fill(~(there & there.mT), 0.0)
        root = M.sum(-1, keepdim=True)
        root = torch.where(root > 0, root, 1.0).rsqrt()  # D_M^{-1/2} as a column
        inverse = root * pseudo_inverse(root * M * root.mT, self.n_iter) * root.mT
        inner = self.kernel(Z, k).masked_fill(~real[:, None, None], 0.0) @ v
        return self.kernel(q, Z) @ (inverse @ inner)

    def kernel(self, x: Tensor, z: Tensor) -> Tensor:
        """exp(-|x_i - z_j|^2 / (2 sqrt(D)))."""
        square = x.square().sum(-1, keepdim=True) + z.square().sum(-1)[..., None, :] - 2 * x @ z.mT
        return (square.clamp(min=0.0) / (-2 * math.sqrt(self.head_dim))).exp()


class Synthesizer(System):
    """Synthesizer (Tay et al., 2021): y = softmax(R) v, without products of queries and keys.

    kind          R                                                   parameters a head
    dense         R_i = W2 relu(W1 q_i + b1) + b2                     (D + 1) (D + max_len)
    random        R learned                                           max_len^2
    factorised    R = R1 R2^T, R1 and R2 (max_len, n_factors)         2 max_len n_factors

    Complexity: O(T^2) time for every kind: softmax of a matrix of low rank has full rank. The largest
    tensor is O(T), apart from the learned R: queries come in groups of ROWS. max_len is a limit. Causal and
    bidirectional.
    The paper makes R_i of the block's input x_i; here of q_i, as an attention does not see x_i. The given k
    is not used. The paper's factorised dense form is left out.
    """

    def __init__(
        self, n_head: int, head_dim: int, causal: bool = True, max_len: int | None = None,
        kind: str = "dense", n_factors: int = 8,
    ):  # fmt: skip
        super().__init__(n_head, head_dim, causal, max_len, n_factors=n_factors)
        N, H, D, self.kind = self.needed_length(), n_head, head_dim, kind
        if kind == "dense":
            self.W1, self.b1 = uniform(H, D, D, fan_in=D), uniform(H, 1, D, fan_in=D)
            self.W2, self.b2 = uniform(H, D, N, fan_in=D), uniform(H, 1, N, fan_in=D)
        elif kind == "random":
            self.R = nn.Parameter(torch.randn(H, N, N))
        elif kind == "factorised":
            self.R1, self.R2 = (
                nn.Parameter(torch.randn(H, N, n_factors) / n_factors**0.25) for _ in range(2)
            )
        else:
            raise ValueError(f"unknown kind {kind!r} of synthesizer: choose dense, random or factorised")

    @classmethod
    def fixed_length(cls, **options) -> bool:
        return True

    def scores(self, q: Tensor, rows: slice, T: int) -> Tensor:
        """R of some rows: (B or 1, H, rows, T)."""
        if self.kind == "random":
            return self.R[:, rows, :T].to(q.dtype)[None]
        if self.kind == "factorised":
            return (self.R1[:, rows].to(q.dtype) @ self.R2[:, :T].to(q.dtype).mT)[None]
        W1, b1, W2, b2 = (x.to(q.dtype) for x in (self.W1, self.b1, self.W2[..., :T], self.b2[..., :T]))
        return (q[:, :, rows] @ W1 + b1).relu() @ W2 + b2

    def mix(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        T, ys = q.size(2), []
        j = torch.arange(T, device=q.device)
        for start in range(0, T, ROWS):
            rows = slice(start, min(start + ROWS, T))
            seen = real[:, None, None]  # (B, 1, 1, T)
            seen = seen & (j <= j[rows, None]) if self.causal else seen
            ys.append(softmax_part(self.scores(q, rows, T).masked_fill(~seen, -math.inf), v).y)
        return torch.cat(ys, 2)
