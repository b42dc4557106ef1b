// Causal linear attention on a CPU in one pass: feature map, chunks, state and denominator.
//
// The same function as chunked.py (read that first; the letters are the glossary's in attention.py), with
// Hedgehog's map inside, or with features computed before. For the n tokens of a chunk, whose past is (S, z):
//
//     phi(q), phi(k)     Q, K = [softmax(u), softmax(-u)] + FLOOR,  u = x W + b
//     scores             A = tril(Q K^T)
//     output             y = N / d,  N = Q S + A V,  d = Q z + A 1
//     next state         S <- S + K^T V,  z <- z + K^T 1
//
// backward, over the chunks from the last to the first, with (dS, dz) the gradient of the state after the chunk:
//
//     through N / d      dN = dy / d,  dd = -(dy . y) / d
//     through A          dA = tril(dN V^T + dd 1^T)
//     the three inputs   dQ = dA K + dN S^T + dd z^T,  dK = dA^T Q + V dS^T + 1 dz^T,  dV = A^T dN + K dS
//     the state before   dS <- dS + Q^T dN,  dz <- dz + Q^T dd
//
// Everything is a product of small matrices that stay in the cache, and one routine makes them all: `product`.
// Its right-hand matrix is read in vectors along its rows, its left-hand one element by element, with any strides.
// So whatever is a right-hand matrix somewhere is kept that way round: features as Q^T, K^T (F, n): the softmax over
// features then runs down a column, 16 tokens in a vector, without horizontal sums; scores as A^T (keys, queries).
//
// Everything is float32; q, k, v and dy may be bfloat16. For backward, forward keeps only (S, z) before every GROUP
// chunks: F D / (GROUP n) floats a token. With few heads, threads share a sequence: it is cut into segments of whole
// groups, the sum of K^T V of each segment comes first, then all segments run at once (backward: the sums of Q^T dN).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <c10/util/Unroll.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();  // floats in a vector: 16 (AVX512), 8 (AVX2) or 4 (NEON)
constexpr int64_t BLOCK = 16;       // tokens: scores are skipped above the diagonal in blocks of this size
constexpr int64_t GROUP = 4;        // chunks: backward is given the state before each group, and makes those between
constexpr float FLOOR = 1e-15f, CEIL = 1e15f;  // feature_maps.py

int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// ---------------------------------------------------------------- products of small matrices

struct Left {  // the left-hand matrix: element (i, k) is p[i * row + k * col]
  const float* p;
  int64_t row, col;
};

// C (R rows, N vectors) = A B, or C + A B, in registers
template <int R, int N>
void tile(float* C, int64_t ldc, Left A, const float* B, int64_t ldb, int64_t depth, bool add) {
  Vec c[R * N];
  if (add) c10::ForcedUnroll<R * N>{}([&](auto i) { c[i] = Vec::loadu(C + i / N * ldc + i % N * W); });
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[N];
    c10::ForcedUnroll<N>{}([&](auto n) { b[n] = Vec::loadu(B + k * ldb + n * W); });
    c10::ForcedUnroll<R>{}([&](auto r) {
      const Vec a(A.p[r * A.row + k * A.col]);
      c10::ForcedUnroll<N>{}([&](auto n) { c[r * N + n] = at::vec::fmadd(a, b[n], c[r * N + n]); });
    });
  }
  c10::ForcedUnroll<R * N>{}([&](auto i) { c[i].store(C + i / N * ldc + i % N * W); });
}

// N vectors of columns: the rows in equal tiles of at most 6
template <int N>
void columns(float* C, int64_t ldc, Left A, const float* B, int64_t ldb, int64_t rows, int64_t depth, bool add) {
  const int64_t tiles = (rows + 5) / 6;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = rows * t / tiles;
    const Left a{A.p + i * A.row, A.row, A.col};
    switch (rows * (t + 1) / tiles - i) {
      case 6: tile<6, N>(C + i * ldc, ldc, a, B, ldb, depth, add); break;
      case 5: tile<5, N>(C + i * ldc, ldc, a, B, ldb, depth, add); break;
      case 4: tile<4, N>(C + i * ldc, ldc, a, B, ldb, depth, add); break;
      case 3: tile<3, N>(C + i * ldc, ldc, a, B, ldb, depth, add); break;
      case 2: tile<2, N>(C + i * ldc, ldc, a, B, ldb, depth, add); break;
      case 1: tile<1, N>(C + i * ldc, ldc, a, B, ldb, depth, add); break;
    }
  }
}

// C (rows, cols) = A B, or C + A B; A is (rows, depth), B (depth, cols); cols is a multiple of W
void product(float* C, int64_t ldc, Left A, const float* B, int64_t ldb, int64_t rows, int64_t cols, int64_t depth,
             bool add) {
  constexpr int N = W == 8 ? 2 : 4;  // 6 N sums, N vectors of B and one of A fit the registers: 16 of AVX2, 32 else
  int64_t j = 0;
  for (; j + N * W <= cols; j += N * W) columns<N>(C + j, ldc, A, B + j, ldb, rows, depth, add);
  switch ((cols - j) / W) {
    case 3: columns<3>(C + j, ldc, A, B + j, ldb, rows, depth, add); break;
    case 2: columns<2>(C + j, ldc, A, B + j, ldb, rows, depth, add); break;
    case 1: columns<1>(C + j, ldc, A, B + j, ldb, rows, depth, add); break;
  }
}

// B (cols, rows) = A^T; rows and cols are multiples of W
void transpose(const float* A, int64_t lda, float* B, int64_t ldb, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W) {
      Vec x[W], y[W];
      for (int r = 0; r < W; ++r) x[r] = Vec::loadu(A + (i + r) * lda + j);
#pragma GCC unroll 4
      for (int step = 1; step < W; step *= 2) {  // a perfect shuffle, log2(W) times
#pragma GCC unroll 8
        for (int r = 0; r < W / 2; ++r) std::tie(y[2 * r], y[2 * r + 1]) = at::vec::interleave2(x[r], x[r + W / 2]);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) x[r] = y[r];
      }
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) x[r].store(B + (j + r) * ldb + i);
    }
}

float dot(const float* a, const float* b, int64_t n) {
  return at::vec::map2_reduce_all<float>(
      [](Vec x, Vec y) { return x * y; }, [](Vec x, Vec y) { return x + y; }, a, b, n);
}

float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
}

// ---------------------------------------------------------------- sizes and memory

struct Sizes {
  int64_t B, H, T, F, D;      // D: of the values
  int64_t n, chunks;          // tokens in a chunk; chunks in the sequence
  int64_t ldd;                // D rounded up to whole vectors: rows of V, S, y
  int64_t segments;           // pieces of a sequence that run at once

  Sizes(const Tensor& q, const Tensor& v, int64_t features)
      : B(q.size(0)), H(q.size(1)), T(q.size(2)), F(features), D(v.size(3)) {
    n = std::max<int64_t>(64, round_up(D, BLOCK));
    chunks = (T + n - 1) / n;
    ldd = round_up(D, W);
    segments = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads() / std::max<int64_t>(1, B * H), groups()));
  }
  int64_t groups() const { return (chunks + GROUP - 1) / GROUP; }
  int64_t first_chunk(int64_t segment) const { return std::min(chunks, groups() * segment / segments * GROUP); }
  int64_t tokens(int64_t chunk) const { return std::min(n, T - chunk * n); }
};

// Raises for tensors that the pointers below would misread
void check(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq, const Optional& bq,
           const Optional& Wk, const Optional& bk, const Optional& S, const Optional& z, const Optional& mask) {
  auto is = [](const Tensor& x, at::IntArrayRef sizes, at::ScalarType type, const char* name) {
    TORCH_CHECK(x.sizes() == sizes, "hedgehog: ", name, " is ", x.sizes(), ", not ", sizes);
    TORCH_CHECK(x.device().is_cpu() && x.is_contiguous() && x.scalar_type() == type, "hedgehog: ", name,
                " must be contiguous, ", type, ", on the CPU");
  };
  for (const Tensor& x : {q, k, v}) {
    TORCH_CHECK(x.dim() == 4 && x.sizes().slice(0, 3) == q.sizes().slice(0, 3),
                "hedgehog: q, k and v must be (B, H, T, D)");
    TORCH_CHECK(x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) &&
                    (x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0),
                "hedgehog: q, k and v must be float32 or bfloat16, on the CPU, the last dimension dense");
  }
  TORCH_CHECK(q.size(3) == k.size(3), "hedgehog: q has ", q.size(3), " dimensions a head, and k ", k.size(3));
  const int64_t B = q.size(0), H = q.size(1), width = q.size(3), F = Wq ? 2 * width : width;
  for (const Optional& weight : {Wq, Wk})
    if (weight) is(*weight, {H, width, width}, at::kFloat, "weight");
  for (const Optional& b : {bq, bk})
    if (b) is(*b, {H, 1, width}, at::kFloat, "bias");
  const bool together = Wq.has_value() == Wk.has_value() && Wq.has_value() == bq.has_value() &&
                        Wq.has_value() == bk.has_value() && S.has_value() == z.has_value();
  TORCH_CHECK(together, "hedgehog: W and b, S and z come together");
  if (S) is(*S, {B, H, F, v.size(3)}, at::kFloat, "S"), is(*z, {B, H, F}, at::kFloat, "z");
  if (mask) is(*mask, {B, q.size(2)}, at::kBool, "key_mask");
}

class Workspace {  // one allocation for all the small matrices of a thread
 public:
  explicit Workspace(std::initializer_list<int64_t> sizes) {
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 16);
    memory_ = at::empty({total}, at::kFloat);
    float* p = memory_.mutable_data_ptr<float>();
    for (int64_t size : sizes) parts_.push_back(p), p += round_up(size, 16);
  }
  float* operator[](int i) const { return parts_[i]; }

 private:
  Tensor memory_;
  std::vector<float*> parts_;
};

// tokens t .. t + count of one head of x (B, H, T, width), float32 or bfloat16, into rows (n, ld) filled up with zeros
void load(const Tensor& x, int64_t head, int64_t t, int64_t count, int64_t n, float* rows, int64_t ld) {
  const int64_t H = x.size(1), width = x.size(3), stride = x.stride(2);
  const int64_t start = head / H * x.stride(0) + head % H * x.stride(1) + t * x.stride(2);
  auto copy = [&](auto* p) {
    for (int64_t i = 0; i < count; ++i, p += stride) {
      for (int64_t d = 0; d < width; d += 64 / sizeof(*p)) __builtin_prefetch(p + n * stride + d, 0, 2);
      std::copy_n(p, width, rows + i * ld);
      std::fill(rows + i * ld + width, rows + (i + 1) * ld, 0.f);
    }
  };
  if (x.scalar_type() == at::kFloat) copy(x.const_data_ptr<float>() + start);
  else copy(x.const_data_ptr<at::BFloat16>() + start);
  std::fill(rows + count * ld, rows + n * ld, 0.f);
}

// rows (count, ld) into tokens t .. t + count of one head of x (B, H, T, width), contiguous
void store(const float* rows, int64_t ld, Tensor& x, int64_t head, int64_t t, int64_t count) {
  const int64_t T = x.size(2), width = x.size(3);
  float* p = x.mutable_data_ptr<float>() + (head * T + t) * width;
  for (int64_t i = 0; i < count; ++i) std::copy_n(rows + i * ld, width, p + i * width);
}

// A state (S, z) in memory: S (F, ldd) and after it z (F)
struct State {
  static int64_t size(const Sizes& s) { return s.F * (s.ldd + 1); }

  static void load(const Optional& S, const Optional& z, int64_t head, const Sizes& s, float* to) {
    std::fill_n(to, size(s), 0.f);
    if (!S) return;
    const float* from = S->const_data_ptr<float>() + head * s.F * s.D;
    for (int64_t f = 0; f < s.F; ++f) std::copy_n(from + f * s.D, s.D, to + f * s.ldd);
    std::copy_n(z->const_data_ptr<float>() + head * s.F, s.F, to + s.F * s.ldd);
  }
  // the state before (or after) every segment, (segments, B H, size): given for one, made for the others below
  static Tensor at_segment(const Optional& S, const Optional& z, const Sizes& s, int64_t segment) {
    Tensor states = at::empty({s.segments, s.B * s.H, size(s)}, at::kFloat);
    for (int64_t head = 0; head < s.B * s.H; ++head)
      load(S, z, head, s, states.mutable_data_ptr<float>() + (segment * s.B * s.H + head) * size(s));
    return states;
  }
  static void store(const float* from, Tensor& S, Tensor& z, int64_t head, const Sizes& s) {
    float* to = S.mutable_data_ptr<float>() + head * s.F * s.D;
    for (int64_t f = 0; f < s.F; ++f) std::copy_n(from + f * s.ldd, s.D, to + f * s.D);
    std::copy_n(from + s.F * s.ldd, s.F, z.mutable_data_ptr<float>() + head * s.F);
  }
  static void add(float* to, const float* from, const Sizes& s) {
    for (int64_t i = 0; i < size(s); ++i) to[i] += from[i];
  }
};

// ---------------------------------------------------------------- the queries or the keys, and their features

struct Side {
  Tensor x;               // (B, H, T, width): what the map sees; without a map, the features
  Optional weight, bias;  // (H, width, width), (H, 1, width)
  Optional mask;          // (B, T): keys only

  int64_t width() const { return x.size(3); }
  int64_t ld() const { return round_up(width(), W); }
  bool mapped() const { return weight.has_value(); }
  int64_t n_features() const { return mapped() ? 2 * width() : width(); }
  const float* head_weight(int64_t head) const {
    return weight->const_data_ptr<float>() + head % x.size(1) * width() * width();
  }

  // features PT (F, n) of a chunk; X (n, ld) and XT (ld, n) are left for backward
  void features(const Sizes& s, int64_t head, int64_t chunk, float* X, float* XT, float* PT) const {
    const int64_t t = chunk * s.n, count = s.tokens(chunk), D = width(), n = s.n;
    load(x, head, t, count, n, X, ld());
    if (mapped()) {
      for (int64_t i = 0; i < n * ld(); i += W)
        at::vec::clamp(Vec::loadu(X + i), Vec(-CEIL), Vec(CEIL)).store(X + i);
      transpose(X, ld(), XT, n, n, ld());
      const float* b = bias->const_data_ptr<float>() + head % x.size(1) * D;
      for (int64_t e = 0; e < D; ++e) std::fill_n(PT + e * n, n, b[e]);
      product(PT, n, {head_weight(head), 1, D}, XT, n, D, n, D, true);  // u^T = W^T x^T + b
      for (int64_t i = 0; i < n; i += W) hedgehog(PT + i, PT + D * n + i, D, n);
    } else {
      transpose(X, ld(), XT, n, n, ld());
      std::copy_n(XT, D * n, PT);
    }
    hide(s, head, chunk, PT);
  }

  // zero the features of tokens that do not exist or are masked (keys only)
  void hide(const Sizes& s, int64_t head, int64_t chunk, float* PT) const {
    const int64_t t = chunk * s.n, count = s.tokens(chunk);
    const bool* real = mask ? mask->const_data_ptr<bool>() + head / x.size(1) * s.T + t : nullptr;
    for (int64_t j = 0; j < s.n; ++j)
      if (j >= count || (real && !real[j]))
        for (int64_t f = 0; f < s.F; ++f) PT[f * s.n + j] = 0.f;
  }

  // W tokens, one in each lane: u (D rows) becomes softmax(u) in p and softmax(-u) in m
  static void hedgehog(float* p, float* m, int64_t D, int64_t n) {
    Vec top = Vec::loadu(p), low = top, sum_p(0.f), sum_m(0.f);
    for (int64_t d = 1; d < D; ++d) {
      const Vec u = Vec::loadu(p + d * n);
      top = at::vec::maximum(top, u), low = at::vec::minimum(low, u);
    }
    // exp(low - u) = exp(low - top) / exp(u - top), whose constant factor cancels: a division instead of a second
    // exp, in those lanes where it cannot overflow (each token decides for itself: others must not change its bits)
    const Vec narrow = (top - low) <= Vec(80.f);
    const bool all = narrow.zero_mask() == 0;
    for (int64_t d = 0; d < D; ++d) {
      const Vec u = Vec::loadu(p + d * n), e = (u - top).exp_u20();
      Vec f = Vec(1.f) / e;
      if (!all) f = Vec::blendv((low - u).exp_u20(), f, narrow);
      sum_p += e, sum_m += f;
      e.store(p + d * n), f.store(m + d * n);
    }
    sum_p = Vec(1.f) / sum_p, sum_m = Vec(1.f) / sum_m;
    for (int64_t d = 0; d < D; ++d) {
      at::vec::fmadd(Vec::loadu(p + d * n), sum_p, Vec(FLOOR)).store(p + d * n);
      at::vec::fmadd(Vec::loadu(m + d * n), sum_m, Vec(FLOOR)).store(m + d * n);
    }
  }

  // features (F) of the only token of a head; x is scratch
  void token(int64_t head, float* x_, float* phi) const {
    const int64_t D = width();
    load(x, head, 0, 1, 1, x_, ld());
    if (!mapped()) return void(std::copy_n(x_, D, phi));
    const float *weight = head_weight(head), *b = bias->const_data_ptr<float>() + head % x.size(1) * D;
    for (int64_t d = 0; d < D; ++d) x_[d] = x_[d] < -CEIL ? -CEIL : x_[d] > CEIL ? CEIL : x_[d];
    std::copy_n(b, D, phi);
    product(phi, D, {x_, D, 1}, weight, D, 1, D / W * W, D, true);  // u = x W + b
    for (int64_t e = D / W * W; e < D; ++e)
      for (int64_t d = 0; d < D; ++d) phi[e] += x_[d] * weight[d * D + e];
    for (int64_t e = 0; e < D; ++e) phi[D + e] = -phi[e];
    softmax(phi, D), softmax(phi + D, D);
  }

  static void softmax(float* u, int64_t D) {
    const float top = at::vec::reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, u, D);
    at::vec::map<float>([=](Vec x) { return (x - Vec(top)).exp_u20(); }, u, u, D);
    const Vec total(at::vec::reduce_all<float>([](Vec a, Vec b) { return a + b; }, u, D));
    at::vec::map<float>([=](Vec x) { return x / total + Vec(FLOOR); }, u, u, D);
  }
};

// AT (n, n) = K Q^T, one row for each key, zero where the query comes before the key
void scores(const Sizes& s, const float* KT, const float* QT, float* AT) {
  const int64_t n = s.n;
  for (int64_t j = 0; j < n; j += BLOCK) {
    product(AT + j * n + j, n, {KT + j, 1, n}, QT + j, n, BLOCK, n - j, s.F, false);
    for (int64_t row = j; row < j + BLOCK; ++row) std::fill(AT + row * n + j, AT + row * n + row, 0.f);
  }
}

// S += K^T V, z += K^T c, with c = 1 (nullptr) for keys and values; for queries and (dN, dd) c = dd
void accumulate(const Sizes& s, const float* KT, const float* V, const float* c, float* state) {
  product(state, s.ldd, {KT, s.n, 1}, V, s.ldd, s.F, s.ldd, s.n, true);
  for (int64_t f = 0; f < s.F; ++f) {
    Vec total(0.f);
    for (int64_t i = 0; i < s.n; i += W) {
      const Vec k = Vec::loadu(KT + f * s.n + i);
      total = c ? at::vec::fmadd(k, Vec::loadu(c + i), total) : total + k;
    }
    state[s.F * s.ldd + f] += sum(total);
  }
}

// The state before each segment (or, from_end, after it): `first` (B H, State::size), plus the sums over the
// segments on the way there, which `add_chunk(workspace, head, chunk, state)` makes
template <class AddChunk>
void between_segments(const Sizes& s, Tensor& first, bool from_end, std::initializer_list<int64_t> sizes,
                      const AddChunk& add_chunk) {
  if (s.segments == 1) return;
  const int64_t heads = s.B * s.H, size = State::size(s);
  Tensor sums = at::zeros({s.segments, heads, size}, at::kFloat);
  float *sum = sums.mutable_data_ptr<float>(), *to = first.mutable_data_ptr<float>();
  at::parallel_for(0, heads * (s.segments - 1), 1, [&](int64_t begin, int64_t end) {
    const Workspace w(sizes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads + from_end, head = task % heads;
      for (int64_t c = s.first_chunk(segment); c < s.first_chunk(segment + 1); ++c)
        add_chunk(w, head, c, sum + (segment * heads + head) * size);
    }
  });
  for (int64_t i = 1; i < s.segments; ++i) {
    const int64_t segment = from_end ? s.segments - 1 - i : i, previous = from_end ? segment + 1 : segment - 1;
    for (int64_t head = 0; head < heads; ++head) {
      std::copy_n(to + (previous * heads + head) * size, size, to + (segment * heads + head) * size);
      State::add(to + (segment * heads + head) * size, sum + (previous * heads + head) * size, s);
    }
  }
}

// ---------------------------------------------------------------- forward

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// y (B, H, T, D), d (B, H, T), the new state S (B, H, F, D) and z (B, H, F), and states for backward.
// `keep`: make states; `carry`: make the new state (without it S and z are of no use).
Forward forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq, const Optional& bq,
                const Optional& Wk, const Optional& bk, const Optional& S0, const Optional& z0, const Optional& mask,
                bool keep, bool carry) {
  check(q, k, v, Wq, bq, Wk, bk, S0, z0, mask);
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s(q, v, queries.n_features());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s);
  Tensor y = at::empty({s.B, s.H, s.T, s.D}, at::kFloat), d = at::empty({s.B, s.H, s.T}, at::kFloat);
  Tensor S = at::empty({s.B, s.H, s.F, s.D}, at::kFloat), z = at::empty({s.B, s.H, s.F}, at::kFloat);
  Tensor states = at::empty({keep ? heads : 0, s.groups(), size}, at::kFloat);
  Tensor before = State::at_segment(S0, z0, s, 0);  // the state before each segment, and then within it

  const std::initializer_list<int64_t> sizes{n * keys.ld(), keys.ld() * n, s.F * n, s.F * n, n * n, n * s.ldd,
                                             n * s.ldd};
  between_segments(s, before, false, sizes, [&](const Workspace& w, int64_t head, int64_t chunk, float* state) {
    float *X = w[0], *XT = w[1], *KT = w[2], *V = w[5];
    keys.features(s, head, chunk, X, XT, KT);
    load(v, head, chunk * n, s.tokens(chunk), n, V, s.ldd);
    accumulate(s, KT, V, nullptr, state);
  });

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace w(sizes);
    float *X = w[0], *XT = w[1], *KT = w[2], *QT = w[3], *AT = w[4], *V = w[5], *N = w[6];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      float* state = before.mutable_data_ptr<float>() + task * size;
      for (int64_t c = s.first_chunk(segment); c < s.first_chunk(segment + 1); ++c) {
        const int64_t t = c * n, count = s.tokens(c);
        const bool past = c > 0 || S0;
        if (keep && c % GROUP == 0)
          std::copy_n(state, size, states.mutable_data_ptr<float>() + (head * s.groups() + c / GROUP) * size);
        queries.features(s, head, c, X, XT, QT);
        keys.features(s, head, c, X, XT, KT);
        load(v, head, t, count, n, V, s.ldd);
        scores(s, KT, QT, AT);

        if (past) product(N, s.ldd, {QT, 1, n}, state, s.ldd, n, s.ldd, s.F, false);  // N = Q S
        for (int64_t i = 0; i < n; i += BLOCK)                                        //   + A V, of keys j < i + BLOCK
          product(N + i * s.ldd, s.ldd, {AT + i, 1, n}, V, s.ldd, BLOCK, s.ldd, i + BLOCK, past);

        const float* zs = state + s.F * s.ldd;
        float* ds = d.mutable_data_ptr<float>() + head * s.T + t;
        float* ys = y.mutable_data_ptr<float>() + (head * s.T + t) * s.D;
        for (int64_t i = 0; i < count; i += W) {  // d = Q z + A 1
          Vec total(0.f);
          if (past)
            for (int64_t f = 0; f < s.F; ++f) total = at::vec::fmadd(Vec::loadu(QT + f * n + i), Vec(zs[f]), total);
          for (int64_t j = 0; j < std::min(n, i + W); ++j) total += Vec::loadu(AT + j * n + i);
          total.store(ds + i, std::min(W, count - i));
        }
        for (int64_t i = 0; i < count; ++i) {  // y = N / d
          const float scale = ds[i] > 0 ? 1 / ds[i] : 1;
          for (int64_t e = 0; e < s.D; ++e) ys[i * s.D + e] = N[i * s.ldd + e] * scale;
        }
        if (carry || c + 1 < s.chunks) accumulate(s, KT, V, nullptr, state);
      }
      if (segment == s.segments - 1) State::store(state, S, z, head, s);
    }
  });
  return {y, d, S, z, states};
}

// ---------------------------------------------------------------- backward

// Through one side's feature map: the gradients of W and b, summed in a place of its own for each task
class MapGradients {
 public:
  MapGradients(const Side& side, const Sizes& s) : side_(side), s_(s) {
    const int64_t D = side.width(), tasks = side.mapped() ? s.segments * s.B : 0;
    dWT_ = at::zeros({tasks, s.H, D, side.ld()}, at::kFloat);
    db_ = at::zeros({tasks, s.H, 1, D}, at::kFloat);
  }

  // from the features PT of a chunk and their gradient dPT (F, n) to dx; XT and rows are scratch
  void chunk(int64_t task, int64_t chunk, const float* X, float* XT, const float* PT, float* dPT, float* rows,
             Tensor& dx) {
    const int64_t head = task % (s_.B * s_.H), n = s_.n, count = s_.tokens(chunk), D = side_.width(), ld = side_.ld();
    if (side_.mapped()) {
      float *dWT = dWT_.mutable_data_ptr<float>() + task * D * ld, *db = db_.mutable_data_ptr<float>() + task * D;
      for (int64_t i = 0; i < n; i += W) hedgehog(PT + i, PT + D * n + i, dPT + i, dPT + D * n + i, D, n);
      product(XT, n, {side_.head_weight(head), D, 1}, dPT, n, D, n, D, false);  // dx^T = W du^T
      product(dWT, ld, {dPT, n, 1}, X, ld, D, ld, count, true);                // dW^T += du^T x
      for (int64_t e = 0; e < D; ++e)
        for (int64_t i = 0; i < n; i += W) db[e] += sum(Vec::loadu(dPT + e * n + i));
      dPT = XT;
    }
    transpose(dPT, n, rows, ld, ld, n);
    if (side_.mapped())  // the clamp to CEIL lets no gradient through
      for (int64_t i = 0; i < n * ld; ++i) rows[i] = std::abs(X[i]) < CEIL ? rows[i] : 0.f;
    store(rows, ld, dx, head, chunk * n, count);
  }

  // du = p (dp - p.dp) - m (dm - m.dm) for W tokens, in place of dp
  static void hedgehog(const float* p, const float* m, float* dp, const float* dm, int64_t D, int64_t n) {
    auto probability = [](const float* x) { return Vec::loadu(x) - Vec(FLOOR); };
    Vec p_dp(0.f), m_dm(0.f);
    for (int64_t d = 0; d < D * n; d += n) {
      p_dp = at::vec::fmadd(probability(p + d), Vec::loadu(dp + d), p_dp);
      m_dm = at::vec::fmadd(probability(m + d), Vec::loadu(dm + d), m_dm);
    }
    for (int64_t d = 0; d < D * n; d += n) {
      const Vec du_p = probability(p + d) * (Vec::loadu(dp + d) - p_dp);
      const Vec du_m = probability(m + d) * (Vec::loadu(dm + d) - m_dm);
      (du_p - du_m).store(dp + d);
    }
  }

  // (H, D, D) and (H, 1, D); without a map no elements
  Tensor weight() const {
    if (!side_.mapped()) return at::empty({0}, at::kFloat);
    return dWT_.sum(0).narrow(2, 0, side_.width()).transpose(1, 2).contiguous();
  }
  Tensor bias() const { return side_.mapped() ? db_.sum(0) : at::empty({0}, at::kFloat); }

 private:
  const Side& side_;
  const Sizes& s_;
  Tensor dWT_, db_;
};

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of q, k, v, Wq, bq, Wk, bk (without maps of no meaning), S0, z0
Backward backward(const Tensor& dy, const Optional& dS, const Optional& dz, const Tensor& q, const Tensor& k,
                  const Tensor& v, const Optional& Wq, const Optional& bq, const Optional& Wk, const Optional& bk,
                  const Optional& mask, const Tensor& y, const Tensor& d, const Tensor& states) {
  check(q, k, v, Wq, bq, Wk, bk, dS, dz, mask);
  TORCH_CHECK(dy.sizes() == v.sizes() && (dy.stride(3) == 1 || dy.size(3) <= 1 || dy.numel() == 0),
              "hedgehog: dy must be like v");
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s(q, v, queries.n_features());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s), ld = keys.ld();
  Tensor dq = at::empty(q.sizes(), at::kFloat), dk = at::empty(k.sizes(), at::kFloat);
  Tensor dv = at::empty(v.sizes(), at::kFloat);
  MapGradients map_q(queries, s), map_k(keys, s);
  Tensor after = State::at_segment(dS, dz, s, s.segments - 1);  // (dS, dz) after each segment, and then within it

  // dN (n, ldd) = dy / d, dd (n) = -(dy . y) / d
  auto through_division = [&](int64_t head, int64_t chunk, float* dN, float* dd) {
    const int64_t t = chunk * n, count = s.tokens(chunk);
    const float* ds = d.const_data_ptr<float>() + head * s.T + t;
    const float* ys = y.const_data_ptr<float>() + (head * s.T + t) * s.D;
    load(dy, head, t, count, n, dN, s.ldd);
    std::fill_n(dd, n, 0.f);
    for (int64_t i = 0; i < count; ++i) {
      const float scale = ds[i] > 0 ? 1 / ds[i] : 1;
      float* row = dN + i * s.ldd;
      if (ds[i] > 0) dd[i] = -scale * dot(row, ys + i * s.D, s.D);
      for (int64_t e = 0; e < s.D; ++e) row[e] *= scale;
    }
  };

  const std::initializer_list<int64_t> sizes{
      n * ld, ld * n, s.F * n, n * n, n * n, n * n, s.ldd * n, n * s.ldd, s.ldd * n, n, round_up(s.F, W) * n,
      round_up(s.F, W) * n, n * s.ldd, n * ld, GROUP * n * ld, GROUP * s.F * n, GROUP * n * s.ldd, GROUP * size};
  between_segments(s, after, true, sizes, [&](const Workspace& w, int64_t head, int64_t chunk, float* state) {
    float *X = w[0], *XT = w[1], *QT = w[2], *dN = w[7], *dd = w[9];
    queries.features(s, head, chunk, X, XT, QT);
    through_division(head, chunk, dN, dd);
    accumulate(s, QT, dN, dd, state);
  });

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace w(sizes);
    float *Xq = w[0], *XT = w[1], *QT = w[2], *AT = w[3], *dAT = w[4], *dA = w[5], *VT = w[6], *dN = w[7], *dNT = w[8],
          *dd = w[9], *dQT = w[10], *dKT = w[11], *dV = w[12], *rows = w[13];
    float *Xs = w[14], *KTs = w[15], *Vs = w[16], *group = w[17];  // of a group: keys, values, states
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      float* dstate = after.mutable_data_ptr<float>() + task * size;
      for (int64_t c = s.first_chunk(segment + 1) - 1; c >= s.first_chunk(segment); --c) {
        const int64_t t = c * n, count = s.tokens(c), first = c / GROUP * GROUP, place = c - first;
        if (place == GROUP - 1 || c == s.chunks - 1) {  // entering a group: its keys, values and states, in order
          std::copy_n(states.const_data_ptr<float>() + (head * s.groups() + c / GROUP) * size, size, group);
          for (int64_t i = 0; i <= place; ++i) {
            keys.features(s, head, first + i, Xs + i * n * ld, XT, KTs + i * s.F * n);
            load(v, head, (first + i) * n, s.tokens(first + i), n, Vs + i * n * s.ldd, s.ldd);
            if (i == place) break;
            std::copy_n(group + i * size, size, group + (i + 1) * size);
            accumulate(s, KTs + i * s.F * n, Vs + i * n * s.ldd, nullptr, group + (i + 1) * size);
          }
        }
        const float *Xk = Xs + place * n * ld, *KT = KTs + place * s.F * n, *V = Vs + place * n * s.ldd;
        const float* state = group + place * size;
        queries.features(s, head, c, Xq, XT, QT);
        through_division(head, c, dN, dd);
        transpose(V, s.ldd, VT, n, n, s.ldd);
        transpose(dN, s.ldd, dNT, n, n, s.ldd);

        scores(s, KT, QT, AT);
        for (int64_t j = 0; j < n; j += BLOCK) {  // dA^T = triu(V dN^T + 1 dd^T)
          for (int64_t row = j; row < j + BLOCK; ++row) std::copy_n(dd, n, dAT + row * n);
          product(dAT + j * n + j, n, {V + j * s.ldd, s.ldd, 1}, dNT + j, n, BLOCK, n - j, s.ldd, true);
          for (int64_t row = j; row < j + BLOCK; ++row) std::fill_n(dAT + row * n + j, row - j, 0.f);
        }
        transpose(dAT, n, dA, n, n, n);

        for (int64_t f = 0; f < s.F; ++f) {
          const float z = state[s.F * s.ldd + f], dz = dstate[s.F * s.ldd + f];
          for (int64_t i = 0; i < n; ++i) dQT[f * n + i] = z * dd[i], dKT[f * n + i] = dz;
        }
        product(dQT, n, {state, s.ldd, 1}, dNT, n, s.F, n, s.ldd, true);      // dQ^T = S dN^T + z dd^T
        product(dKT, n, {dstate, s.ldd, 1}, VT, n, s.F, n, s.ldd, true);      // dK^T = dS V^T + dz 1^T
        product(dV, s.ldd, {KT, 1, n}, dstate, s.ldd, n, s.ldd, s.F, false);  // dV = K dS
        for (int64_t b = 0; b < n; b += BLOCK) {  // + K^T dA^T, + Q^T dA, + A^T dN: of pairs j <= i only
          product(dQT + b, n, {KT + b, n, 1}, dAT + b * n + b, n, s.F, n - b, BLOCK, true);
          product(dKT, n, {QT + b, n, 1}, dA + b * n, n, s.F, b + BLOCK, BLOCK, true);
          product(dV + b * s.ldd, s.ldd, {AT + b * n + b, n, 1}, dN + b * s.ldd, s.ldd, BLOCK, s.ldd, n - b, true);
        }
        accumulate(s, QT, dN, dd, dstate);
        keys.hide(s, head, c, dKT);
        store(dV, s.ldd, dv, head, t, count);
        map_q.chunk(task, c, Xq, XT, QT, dQT, rows, dq);
        map_k.chunk(task, c, Xk, XT, KT, dKT, rows, dk);
      }
    }
  });
  Tensor dS0 = at::empty({s.B, s.H, s.F, s.D}, at::kFloat), dz0 = at::empty({s.B, s.H, s.F}, at::kFloat);
  const float* first = after.const_data_ptr<float>();
  for (int64_t head = 0; head < heads; ++head) State::store(first + head * size, dS0, dz0, head, s);
  return {dq, dk, dv, map_q.weight(), map_q.bias(), map_k.weight(), map_k.bias(), dS0, dz0};
}

// ---------------------------------------------------------------- one token

// N vectors of columns of S + k v^T -> next, and of y = q next
template <int N>
void step(const float* S, float* next, int64_t lds, const float* q, const float* k, const float* v, float* y, int64_t F) {
  Vec value[N], sum[N];
  c10::ForcedUnroll<N>{}([&](auto i) { value[i] = Vec::loadu(v + i * W); });
  for (int64_t f = 0; f < F; ++f) {
    const Vec q_f(q[f]), k_f(k[f]);
    c10::ForcedUnroll<N>{}([&](auto i) {
      const Vec s = at::vec::fmadd(k_f, value[i], Vec::loadu(S + f * lds + i * W));
      s.store(next + f * lds + i * W);
      sum[i] = at::vec::fmadd(q_f, s, sum[i]);
    });
  }
  c10::ForcedUnroll<N>{}([&](auto i) { sum[i].store(y + i * W); });
}

// One more token for every head after the state S (B, H, F, D), z (B, H, F): y (B, H, 1, D) and the next state
std::tuple<Tensor, Tensor, Tensor> decode(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq,
                                          const Optional& bq, const Optional& Wk, const Optional& bk, const Tensor& S,
                                          const Tensor& z) {
  check(q, k, v, Wq, bq, Wk, bk, S, z, {});
  TORCH_CHECK(q.size(2) == 1, "hedgehog: decode takes one token, not ", q.size(2));
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, {}};
  const int64_t heads = S.size(0) * S.size(1), F = S.size(2), D = S.size(3), ld = queries.ld();
  Tensor y = at::empty(v.sizes(), at::kFloat), next_S = at::empty_like(S), next_z = at::empty_like(z);
  const float *Ss = S.const_data_ptr<float>(), *zs = z.const_data_ptr<float>();
  float *next_Ss = next_S.mutable_data_ptr<float>(), *next_zs = next_z.mutable_data_ptr<float>();
  float* ys = y.mutable_data_ptr<float>();
  at::parallel_for(0, heads, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, F * D)), [&](int64_t begin, int64_t end) {
    const Workspace w{ld, 2 * ld, 2 * ld, round_up(D, W), round_up(D, W)};
    float *x = w[0], *phi_q = w[1], *phi_k = w[2], *value = w[3], *N = w[4];
    for (int64_t head = begin; head < end; ++head) {
      queries.token(head, x, phi_q);
      keys.token(head, x, phi_k);
      load(v, head, 0, 1, 1, value, round_up(D, W));
      const float *S_h = Ss + head * F * D, *z_h = zs + head * F;
      float *to_S = next_Ss + head * F * D, *to_z = next_zs + head * F, d = 0;
      for (int64_t f = 0; f < F; ++f) d += phi_q[f] * (to_z[f] = z_h[f] + phi_k[f]);
      int64_t e = 0;
      for (; e + 4 * W <= D; e += 4 * W) step<4>(S_h + e, to_S + e, D, phi_q, phi_k, value + e, N + e, F);
      for (; e + W <= D; e += W) step<1>(S_h + e, to_S + e, D, phi_q, phi_k, value + e, N + e, F);
      for (; e < D; ++e) {
        N[e] = 0;
        for (int64_t f = 0; f < F; ++f) N[e] += phi_q[f] * (to_S[f * D + e] = S_h[f * D + e] + phi_k[f] * value[e]);
      }
      for (e = 0; e < D; ++e) ys[head * D + e] = N[e] / (d > 0 ? d : 1);
    }
  });
  return {y, next_S, next_z};
}

// A B, `times` times over by every thread: how fast `product` is on matrices in the cache (bench.py)
Tensor multiply(const Tensor& A, const Tensor& B, int64_t times) {
  for (const Tensor& x : {A, B})
    TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat, "hedgehog: A, B must be float32");
  TORCH_CHECK(A.size(1) == B.size(0) && B.size(1) % W == 0, "hedgehog: A, B must be (m, k), (k, n), n whole vectors");
  const int64_t rows = A.size(0), depth = A.size(1), cols = B.size(1);
  Tensor Cs = at::empty({at::get_num_threads(), rows, cols}, at::kFloat);
  at::parallel_for(0, Cs.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t i = 0; i < times; ++i)
        product(Cs.mutable_data_ptr<float>() + c * rows * cols, cols, {A.const_data_ptr<float>(), depth, 1},
                B.const_data_ptr<float>(), cols, rows, cols, depth, false);
  });
  return Cs[0];
}

}  // namespace

// fused/compiled.py has what a compiler of PyTorch needs to know of these: shapes, and the gradient of forward
TORCH_LIBRARY(hedgehog, m) {
  auto cpu = [](auto f) { return torch::dispatch(c10::DispatchKey::CPU, f); };
  m.def("multiply(Tensor A, Tensor B, int times) -> Tensor", cpu(multiply));
  m.def("forward(Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, Tensor? bk, Tensor? S, Tensor? z, "
        "Tensor? mask, bool keep, bool carry) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", cpu(forward));
  m.def("backward(Tensor dy, Tensor? dS, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, "
        "Tensor? bk, Tensor? mask, Tensor y, Tensor d, Tensor states) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", cpu(backward));
  m.def("decode(Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, Tensor? bk, Tensor S, "
        "Tensor z) -> (Tensor, Tensor, Tensor)", cpu(decode));
}
