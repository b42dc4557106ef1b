// Linear attention on a CPU in one pass: feature map, chunks, state and denominator.
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
// The bidirectional form has no scores: (S, z) are sums over all keys before the first query, (dS, dz) over all queries.
//
// Everything is a product of small matrices that stay in the cache. `product` makes them all, of one of two types T:
//
//     float       one routine, below: the right-hand matrix is read in vectors along its rows, the left-hand one element
//                 by element, with any strides
//     BFloat16    oneDNN's, which PyTorch exports: AMX or AVX512-BF16, with float32 sums. Both matrices are rounded
//                 copies, in the order that the processor wants (`left`, `right`)
//
// In both types float32 are the softmax over features, the denominators, the state and all sums. T is BFloat16 if q, k
// and v are, and the processor multiplies it. What is a right-hand matrix somewhere is kept that way round: features as
// Q^T, K^T (F, n): the softmax over features then runs down a column, 16 tokens in a vector, without horizontal sums.
//
// For backward, forward keeps only (S, z) before every GROUP chunks: F D / (GROUP n) floats a token. With few heads,
// threads share a sequence: it is cut into segments of whole groups, the sum of K^T V of each segment comes first, then
// all segments run at once (backward: the sums of Q^T dN).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <c10/util/Unroll.h>
#include <torch/library.h>
#ifdef __AVX512BF16__  // build.py says so for processors that multiply bfloat16, by AMX or in vectors
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>
#endif

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Optional = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();  // floats in a vector: 16 (AVX512), 8 (AVX2) or 4 (NEON)
constexpr int64_t GROUP = 4;        // chunks: backward is given the state before each group, and makes those between
template <class T>                  // what is multiplied: float or BFloat16
constexpr int64_t ALIGN = W * sizeof(float) / sizeof(T);  // numbers in a vector
template <class T>
constexpr int64_t BLOCK = sizeof(T) == 2 ? 32 : 16;  // tokens: above the diagonal, blocks of scores are skipped
template <class T>
constexpr bool rounds = sizeof(T) == 2;
constexpr float FLOOR = 1e-15f, CEIL = 1e15f;  // feature_maps.py

int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// ---------------------------------------------------------------- products of small matrices

template <class T>
struct Left {  // the left-hand matrix: element (i, k) is p[i * row + k * col]; in bfloat16 col is 1
  const T* p;
  int64_t row, col;
  Left at(int64_t i, int64_t k) const { return {p + i * row + k * col, row, col}; }
};

template <class T>
struct Right {  // the right-hand matrix: rows of ld numbers; in bfloat16 rows 2 k and 2 k + 1 take turns at each number
  const T* p;
  int64_t ld;
  Right at(int64_t k, int64_t j) const { return {p + k * ld + (sizeof(T) == 2 ? 2 : 1) * j, ld}; }
};

// C (R rows, N vectors) = A B, or C + A B, in registers
template <int R, int N>
void tile(float* C, int64_t ldc, Left<float> A, const float* B, int64_t ldb, int64_t depth, bool add) {
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
void columns(float* C, int64_t ldc, Left<float> A, const float* B, int64_t ldb, int64_t rows, int64_t depth, bool add) {
  const int64_t tiles = (rows + 5) / 6;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = rows * t / tiles;
    const Left<float> a = A.at(i, 0);
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
void product(float* C, int64_t ldc, Left<float> A, Right<float> B, int64_t rows, int64_t cols, int64_t depth,
             bool add) {
  constexpr int N = W == 8 ? 2 : 4;  // 6 N sums, N vectors of B and one of A fit the registers: 16 of AVX2, 32 else
  int64_t j = 0;
  for (; j + N * W <= cols; j += N * W) columns<N>(C + j, ldc, A, B.p + j, B.ld, rows, depth, add);
  switch ((cols - j) / W) {
    case 3: columns<3>(C + j, ldc, A, B.p + j, B.ld, rows, depth, add); break;
    case 2: columns<2>(C + j, ldc, A, B.p + j, B.ld, rows, depth, add); break;
    case 1: columns<1>(C + j, ldc, A, B.p + j, B.ld, rows, depth, add); break;
  }
}

// A transposed matrix of 32-bit words, B (cols, rows); load(i, j) is the vector at row i, column j
template <class Load>
void transpose(const Load& load, float* B, int64_t ldb, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W) {
      Vec x[W], y[W];
      for (int r = 0; r < W; ++r) x[r] = load(i + r, j);
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

// B (cols, rows) = A^T; rows and cols are multiples of W
void transpose(const float* A, int64_t lda, float* B, int64_t ldb, int64_t rows, int64_t cols) {
  transpose([=](int64_t i, int64_t j) { return Vec::loadu(A + i * lda + j); }, B, ldb, rows, cols);
}

// The float32 matrix A (rows, cols), or A^T, as a product takes it. Numbers of type float stay where they are, unless
// a right-hand matrix is transposed. BFloat16 is rounded, into `to`. A has room for whole vectors both ways, and zeros
// there.

Left<float> left(const float* A, int64_t ld, int64_t, int64_t, float*) { return {A, ld, 1}; }
Left<float> left_transposed(const float* A, int64_t ld, int64_t, int64_t, float*) { return {A, 1, ld}; }
Right<float> right(const float* A, int64_t ld, int64_t, int64_t, float*) { return {A, ld}; }
Right<float> right_transposed(const float* A, int64_t ld, int64_t rows, int64_t cols, float* to) {
  transpose(A, ld, to, rows, rows, cols);
  return {to, rows};
}

#ifdef __AVX512BF16__
// 16 pairs of numbers: side by side in a row, or one below the other
struct InRow {
  const float* A;
  int64_t ld;
  Vec operator()(int64_t i, int64_t j) const {
    const float* p = A + i * ld + 2 * j;
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + W), _mm512_loadu_ps(p)));
  }
};
struct InColumn {
  const float* A;
  int64_t ld;
  Vec operator()(int64_t i, int64_t j) const {
    const float* p = A + 2 * i * ld + j;
    const __m512bh two = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + ld), _mm512_loadu_ps(p));
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i turns = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(turns, (__m512i)two));
  }
};

template <class Pairs>
void copy(const Pairs& pairs, BFloat16* to, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += W) pairs(i, j).store(to + 2 * (i * cols + j));
}

Left<BFloat16> left(const float* A, int64_t ld, int64_t rows, int64_t cols, BFloat16* to) {
  cols = round_up(cols, 2 * W);
  copy(InRow{A, ld}, to, rows, cols / 2);
  return {to, cols, 1};
}
Left<BFloat16> left_transposed(const float* A, int64_t ld, int64_t rows, int64_t cols, BFloat16* to) {
  rows = round_up(rows, 2 * W);
  transpose(InColumn{A, ld}, reinterpret_cast<float*>(to), rows / 2, rows / 2, cols);
  return {to, rows, 1};
}
Right<BFloat16> right(const float* A, int64_t ld, int64_t rows, int64_t cols, BFloat16* to) {
  copy(InColumn{A, ld}, to, (rows + 1) / 2, cols);
  return {to, cols};
}
Right<BFloat16> right_transposed(const float* A, int64_t ld, int64_t rows, int64_t cols, BFloat16* to) {
  cols = round_up(cols, 2 * W);
  transpose(InRow{A, ld}, reinterpret_cast<float*>(to), rows, rows, cols / 2);
  return {to, rows};
}

void product(float* C, int64_t ldc, Left<BFloat16> A, Right<BFloat16> B, int64_t rows, int64_t cols, int64_t depth,
             bool add) {
  at::native::cpublas::brgemm(rows, cols, round_up(depth, 2), A.row, B.ld, ldc, add, A.p, B.p, C);
}
#endif

template <class T>
float rounded(float x) { return static_cast<float>(static_cast<T>(x)); }

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
  int64_t ldx, ldf, ldd;      // width of q, F and D rounded up to whole vectors
  int64_t segments;           // pieces of a sequence that run at once

  template <class Number>
  static Sizes of(const Tensor& q, const Tensor& v, bool mapped) {
    Sizes s{q.size(0), q.size(1), q.size(2), q.size(3) * (mapped ? 2 : 1), v.size(3)};
    s.n = round_up(s.T <= 128 ? std::max<int64_t>(s.T, 1) : std::max<int64_t>(64, s.D), 32);  // whole blocks
    s.chunks = (s.T + s.n - 1) / s.n;
    s.ldx = round_up(q.size(3), ALIGN<Number>);
    s.ldf = round_up(s.F, ALIGN<Number>);
    s.ldd = round_up(s.D, ALIGN<Number>);
    s.segments = std::max<int64_t>(
        1, std::min<int64_t>(at::get_num_threads() / std::max<int64_t>(1, s.B * s.H), s.groups()));
    return s;
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

template <class Number>
class Workspace {  // one allocation for all the small matrices of a thread
 public:
  explicit Workspace(const std::vector<int64_t>& sizes) {
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 16);
    memory_ = at::empty({total}, at::kFloat);
    float* p = memory_.mutable_data_ptr<float>();
    for (int64_t size : sizes) parts_.push_back(p), p += round_up(size, 16);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
#ifdef __AVX512BF16__
    if (sizeof(Number) == 2) at::native::cpublas::brgemm_release();
#endif
  }
  float* operator[](int i) const { return parts_[i]; }
  Number* copy(int i) const { return reinterpret_cast<Number*>(parts_[i]); }

 private:
  Tensor memory_;
  std::vector<float*> parts_;
};

Vec load_vec(const float* p) { return Vec::loadu(p); }
Vec load_vec(const BFloat16* p) {
  Vec x;
  at::vec::load_to_float(p, x);
  return x;
}

void widen(const float* from, float* to, int64_t n) { std::copy_n(from, n, to); }
void widen(const BFloat16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (Vec x; i + W <= n; i += W) at::vec::load_to_float(from + i, x), x.store(to + i);
  for (; i < n; ++i) to[i] = from[i];
}

// tokens t .. t + count of one head of x (B, H, T, width), float32 or bfloat16, into rows (n, ld) filled up with zeros;
// less the centre
void load(const Tensor& x, int64_t head, int64_t t, int64_t count, int64_t n, float* rows, int64_t ld,
          const float* centre = nullptr) {
  const int64_t H = x.size(1), width = x.size(3), stride = x.stride(2);
  const int64_t start = head / H * x.stride(0) + head % H * x.stride(1) + t * x.stride(2);
  auto copy = [&](auto* p) {
    for (int64_t i = 0; i < count; ++i, p += stride) {
      for (int64_t d = 0; d < width; d += 64 / sizeof(*p)) __builtin_prefetch(p + n * stride + d, 0, 2);
      widen(p, rows + i * ld, width);
      std::fill(rows + i * ld + width, rows + (i + 1) * ld, 0.f);
      for (int64_t d = 0; centre && d < ld; d += W)
        (Vec::loadu(rows + i * ld + d) - Vec::loadu(centre + d)).store(rows + i * ld + d);
    }
  };
  if (x.scalar_type() == at::kFloat) copy(x.const_data_ptr<float>() + start);
  else copy(x.const_data_ptr<BFloat16>() + start);
  std::fill(rows + count * ld, rows + n * ld, 0.f);
}

void narrow(const float* from, float* to, int64_t n) { std::copy_n(from, n, to); }
void narrow(const float* from, BFloat16* to, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 2 * W <= n; i += 2 * W) InRow{from, 0}(0, i / 2).store(to + i);
#endif
  at::vec::convert(from + i, to + i, n - i);
}

// rows (count, ld) into tokens t .. t + count of one head of x (B, H, T, width), contiguous, float32 or bfloat16
void store(const float* rows, int64_t ld, Tensor& x, int64_t head, int64_t t, int64_t count) {
  const int64_t T = x.size(2), width = x.size(3), start = (head * T + t) * width;
  auto copy = [&](auto* p) {
    for (int64_t i = 0; i < count; ++i) narrow(rows + i * ld, p + i * width, width);
  };
  if (x.scalar_type() == at::kFloat) copy(x.mutable_data_ptr<float>() + start);
  else copy(x.mutable_data_ptr<BFloat16>() + start);
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
  // c (ldd): the mean of the v in a state, zeros without any
  static void mean(const float* state, const Sizes& s, float* c) {
    const float *z = state + s.F * s.ldd, total = std::accumulate(z, z + s.F, 0.f);
    std::fill_n(c, s.ldd, 0.f);
    for (int64_t f = 0; f < s.F; ++f)
      for (int64_t e = 0; e < s.ldd; ++e) c[e] += state[f * s.ldd + e];
    for (int64_t e = 0; e < s.ldd; ++e) c[e] = total > 0 ? c[e] / total : 0.f;
  }
  // to (F, ldd) = S - z c^T
  static const float* centred(const float* state, const Sizes& s, const float* c, float* to) {
    for (int64_t f = 0; f < s.F; ++f)
      for (int64_t e = 0; e < s.ldd; ++e) to[f * s.ldd + e] = state[f * s.ldd + e] - state[s.F * s.ldd + f] * c[e];
    return to;
  }
  static bool any(const float* state, const Sizes& s) {  // whether it is not zero
    return std::any_of(state, state + size(s), [](float x) { return x != 0; });
  }
  static void add(float* to, const float* from, const Sizes& s) {
    for (int64_t i = 0; i < size(s); ++i) to[i] += from[i];
  }
};

// ---------------------------------------------------------------- the queries or the keys, and their features

template <class T>
struct Map {  // W of one head, ready for products
  Left<T> W, WT, rest;  // rest: what W^T loses when it is rounded
  bool rounded = false;  // whether it loses anything
};

struct Side {
  Tensor x;               // (B, H, T, width): what the map sees; without a map, the features
  Optional weight, bias;  // (H, width, width), (H, 1, width)
  Optional mask;          // (B, T): keys only

  int64_t width() const { return x.size(3); }
  bool mapped() const { return weight.has_value(); }
  const float* head_weight(int64_t head) const {
    return weight->const_data_ptr<float>() + head % x.size(1) * width() * width();
  }

  Map<float> map(const Sizes&, int64_t head, float*) const {
    if (!mapped()) return {};
    const float* p = head_weight(head);
    return {{p, width(), 1}, {p, 1, width()}, {}, false};
  }
#ifdef __AVX512BF16__
  Map<BFloat16> map(const Sizes& s, int64_t head, BFloat16* to) const {
    if (!mapped()) return {};
    const int64_t D = width(), ld = s.ldx;
    std::vector<float> weight(ld * ld, 0.f);
    for (int64_t d = 0; d < D; ++d) std::copy_n(head_weight(head) + d * D, D, weight.data() + d * ld);
    Map<BFloat16> map{left(weight.data(), ld, ld, ld, to), left_transposed(weight.data(), ld, ld, ld, to + ld * ld)};
    for (int64_t i = 0; i < ld * ld; i += W) {
      Vec rounded, exact = Vec::loadu(weight.data() + i);
      at::vec::load_to_float(to + i, rounded);
      map.rounded |= (exact != rounded).zero_mask() != (1 << W) - 1;
      (exact - rounded).store(weight.data() + i);
    }
    if (map.rounded) map.rest = left_transposed(weight.data(), ld, ld, ld, to + 2 * ld * ld);
    return map;
  }
#endif

  // features PT (F, n) of a chunk; X (n, ldx) is left for backward, XT is scratch
  template <class T>
  void features(const Sizes& s, const Map<T>& map, int64_t head, int64_t chunk, float* X, T* XT, float* PT) const {
    const int64_t t = chunk * s.n, count = s.tokens(chunk), D = width(), n = s.n;
    load(x, head, t, count, n, X, s.ldx);
    if (mapped()) {
      for (int64_t i = 0; i < n * s.ldx; i += W)
        at::vec::clamp(Vec::loadu(X + i), Vec(-CEIL), Vec(CEIL)).store(X + i);
      const Right<T> xT = right_transposed(X, s.ldx, n, s.ldx, XT);
      const float* b = bias->const_data_ptr<float>() + head % x.size(1) * D;
      product(PT, n, map.WT, xT, D, n, D, false);  // u^T = W^T x^T + b
      if (map.rounded) product(PT, n, map.rest, xT, D, n, D, true);
      for (int64_t i = 0; i < n; i += W) hedgehog<T>(PT + i, PT + D * n + i, b, D, n);
    } else {
      transpose(X, s.ldx, PT, n, n, s.ldx);
    }
    std::fill(PT + s.F * n, PT + s.ldf * n, 0.f);
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

  template <class T>
  static Vec exp(Vec x) { return x.exp_u20(); }
  template <class T>
  static Vec reciprocal(Vec x) { return Vec(1.f) / x; }

  template <class T>
  static Vec rounded(Vec x) { return x; }

  // W tokens, one in each lane: u - b (D rows) becomes softmax(u) in p and softmax(-u) in m
  template <class T>
  static void hedgehog(float* p, float* m, const float* b, int64_t D, int64_t n) {
    Vec top = Vec::loadu(p) + Vec(b[0]), low = top, sum_p(0.f), sum_m(0.f);
    for (int64_t d = 1; d < D; ++d) {
      const Vec u = Vec::loadu(p + d * n) + Vec(b[d]);
      top = at::vec::maximum(top, u), low = at::vec::minimum(low, u);
    }
    // exp(low - u) = exp(low - top) / exp(u - top), whose constant factor cancels: a division instead of a second
    // exp, in those lanes where it cannot overflow (each token decides for itself: others must not change its bits)
    const Vec narrow = (top - low) <= Vec(80.f);
    const bool all = narrow.zero_mask() == 0;
    for (int64_t d = 0; d < D; ++d) {
      const Vec u = Vec::loadu(p + d * n) + Vec(b[d]), e = exp<T>(u - top);
      Vec f = reciprocal<T>(e);
      if (!all) f = Vec::blendv(exp<T>(low - u), f, narrow);
      sum_p += e, sum_m += f;
      e.store(p + d * n), f.store(m + d * n);
    }
    sum_p = Vec(1.f) / sum_p, sum_m = Vec(1.f) / sum_m;
    for (int64_t d = 0; d < D; ++d) {
      rounded<T>(at::vec::fmadd(Vec::loadu(p + d * n), sum_p, Vec(FLOOR))).store(p + d * n);
      rounded<T>(at::vec::fmadd(Vec::loadu(m + d * n), sum_m, Vec(FLOOR))).store(m + d * n);
    }
  }

  // features (F) of the only token of a head; x is scratch
  void token(int64_t head, float* x_, float* phi) const {
    const int64_t D = width();
    load(x, head, 0, 1, 1, x_, round_up(D, W));
    if (!mapped()) return void(std::copy_n(x_, D, phi));
    const float *weight = head_weight(head), *b = bias->const_data_ptr<float>() + head % x.size(1) * D;
    for (int64_t d = 0; d < D; ++d) x_[d] = x_[d] < -CEIL ? -CEIL : x_[d] > CEIL ? CEIL : x_[d];
    std::copy_n(b, D, phi);
    product(phi, D, Left<float>{x_, D, 1}, Right<float>{weight, D}, 1, D / W * W, D, true);  // u = x W + b
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

#ifdef __AVX512BF16__  // to 1e-4, which rounding would lose
template <>
Vec Side::exp<BFloat16>(Vec x) { return x.fexp_u20(); }
template <>
Vec Side::reciprocal<BFloat16>(Vec x) { return _mm512_rcp14_ps(x); }
template <>
Vec Side::rounded<BFloat16>(Vec x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}
#endif

// Scores (n, n) = Q K^T, a row for each query, zero where the key comes later; or, upper, K Q^T, a row for each key
template <class T>
void scores(const Sizes& s, Left<T> Q, Right<T> KT, bool upper, float* A) {
  const int64_t n = s.n;
  for (int64_t i = 0; i < n; i += BLOCK<T>) {
    const int64_t begin = upper ? i : 0, end = upper ? n : i + BLOCK<T>;
    product(A + i * n + begin, n, Q.at(i, 0), KT.at(0, begin), BLOCK<T>, end - begin, s.F, false);
    for (int64_t row = i; row < i + BLOCK<T>; ++row)
      std::fill(A + row * n + (upper ? begin : row + 1), A + row * n + (upper ? row : end), 0.f);
  }
}

// S += K^T V, z += K^T c, with c = 1 (nullptr) for keys and values; for queries and (dN, dd) c = dd
template <class T>
void accumulate(const Sizes& s, const float* KT, Left<T> KT_, Right<T> V, const float* c, float* state) {
  product(state, s.ldd, KT_, V, s.F, s.ldd, s.n, true);
  for (int64_t f = 0; f < s.F; ++f) {
    Vec total(0.f);
    for (int64_t i = 0; i < s.n; i += W) {
      const Vec k = Vec::loadu(KT + f * s.n + i);
      total = c ? at::vec::fmadd(k, Vec::loadu(c + i), total) : total + k;
    }
    state[s.F * s.ldd + f] += sum(total);
  }
}

// What add_chunks(workspace, task, head, first chunk, last, sum) adds for the segments first .. last, and zeros for the
// others: (segments, B H, State::size)
template <class T, class AddChunks>
Tensor segment_sums(const Sizes& s, int64_t first, int64_t last, const std::vector<int64_t>& sizes,
                    const AddChunks& add_chunks) {
  const int64_t heads = s.B * s.H, size = State::size(s);
  Tensor sums = at::zeros({s.segments, heads, size}, at::kFloat);
  float* sum = sums.mutable_data_ptr<float>();
  at::parallel_for(heads * first, heads * last, 1, [&](int64_t begin, int64_t end) {
    const Workspace<T> w(sizes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads;
      add_chunks(w, task, task % heads, s.first_chunk(segment), s.first_chunk(segment + 1), sum + task * size);
    }
  });
  return sums;
}

// The state before each segment (or, from_end, after it): `first` (B H, State::size), plus the sums over the
// segments on the way there
template <class T, class AddChunks>
void between_segments(const Sizes& s, Tensor& first, bool from_end, const std::vector<int64_t>& sizes,
                      const AddChunks& add_chunks) {
  if (s.segments == 1) return;
  const int64_t heads = s.B * s.H, size = State::size(s);
  const Tensor sums = segment_sums<T>(s, from_end, s.segments - 1 + from_end, sizes, add_chunks);
  const float* sum = sums.const_data_ptr<float>();
  float* to = first.mutable_data_ptr<float>();
  for (int64_t i = 1; i < s.segments; ++i) {
    const int64_t segment = from_end ? s.segments - 1 - i : i, previous = from_end ? segment + 1 : segment - 1;
    for (int64_t head = 0; head < heads; ++head) {
      std::copy_n(to + (previous * heads + head) * size, size, to + (segment * heads + head) * size);
      State::add(to + (segment * heads + head) * size, sum + (previous * heads + head) * size, s);
    }
  }
}

// All segments: (B H, State::size)
Tensor total(const Tensor& sums) { return sums.size(0) == 1 ? sums[0] : sums.sum(0); }

// The sum of K^T V and K^T 1 over some chunks of a head, in a workspace of these sizes
std::vector<int64_t> sizes_for_keys(const Sizes& s) {
  return {s.n * s.ldx, s.ldx * s.n, s.ldf * s.n, s.n * s.ldd, s.ldf * s.n, s.n * s.ldd, 3 * s.ldx * s.ldx};
}
template <class T>
void add_keys(const Workspace<T>& w, const Sizes& s, const Side& keys, const Tensor& v, int64_t head, int64_t c,
              int64_t end, float* sum) {
  const int64_t n = s.n;
  float *X = w[0], *KT = w[2], *V = w[3];
  const Map<T> map = keys.map(s, head, w.copy(6));
  for (; c < end; ++c) {
    keys.features(s, map, head, c, X, w.copy(1), KT);
    load(v, head, c * n, s.tokens(c), n, V, s.ldd);
    accumulate(s, KT, left(KT, n, s.F, n, w.copy(4)), right(V, s.ldd, n, s.ldd, w.copy(5)), nullptr, sum);
  }
}

// What products take for S: in bfloat16 S - z mean^T, where mean is that of v, so that rounding loses little (backward
// says more); else S, and mean is 0
template <class T>
const float* for_rounding(const float* state, const Sizes& s, float* mean, float* centred) {
  std::fill_n(mean, s.ldd, 0.f);
  if (!rounds<T>) return state;
  State::mean(state, s, mean);
  return State::centred(state, s, mean, centred);
}

// y = (N + Qz mean^T) / d, in the place of N
void divide(const Sizes& s, int64_t count, const float* d, const float* Qz, const float* mean, float* N) {
  for (int64_t i = 0; i < count; ++i) {
    const Vec scale(d[i] > 0 ? 1 / d[i] : 1), past(Qz[i]);
    for (int64_t e = 0; e < s.ldd; e += W) {
      const Vec numerator = at::vec::fmadd(past, Vec::loadu(mean + e), Vec::loadu(N + i * s.ldd + e));
      (numerator * scale).store(N + i * s.ldd + e);
    }
  }
}

// ---------------------------------------------------------------- forward

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// y (B, H, T, D), d (B, H, T), the new state S (B, H, F, D) and z (B, H, F), and states for backward.
// `keep`: make states; `carry`: make the new state (without it S and z are of no use).
template <class T>
Forward forward_in(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq, const Optional& bq,
                   const Optional& Wk, const Optional& bk, const Optional& S0, const Optional& z0,
                   const Optional& mask, bool keep, bool carry) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s);
  Tensor y = at::empty({s.B, s.H, s.T, s.D}, at::kFloat), d = at::empty({s.B, s.H, s.T}, at::kFloat);
  Tensor S = at::empty({s.B, s.H, s.F, s.D}, at::kFloat), z = at::empty({s.B, s.H, s.F}, at::kFloat);
  Tensor states = at::empty({keep ? heads : 0, s.groups(), size}, at::kFloat);
  Tensor before = State::at_segment(S0, z0, s, 0);  // the state before each segment, and then within it

  const std::vector<int64_t> sizes{
      n * s.ldx, s.ldx * n, s.ldf * n, s.ldf * n, n * n, n * s.ldd, n * s.ldd, n * s.ldf, s.ldf * n, s.ldf * n, n * n,
      n * s.ldd, s.ldf * s.ldd, 3 * s.ldx * s.ldx, 3 * s.ldx * s.ldx, n, s.ldf * s.ldd, s.ldd};
  between_segments<T>(s, before, false, sizes_for_keys(s), [&](const Workspace<T>& w, int64_t, int64_t head,
                                                               int64_t c, int64_t end, float* sum) {
    add_keys(w, s, keys, v, head, c, end, sum);
  });

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<T> w(sizes);
    float *X = w[0], *KT = w[2], *QT = w[3], *A = w[4], *V = w[5], *N = w[6], *Qz = w[15], *centred = w[16],
          *mean = w[17];
    T* XT = w.copy(1);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      float* state = before.mutable_data_ptr<float>() + task * size;
      const Map<T> map_q = queries.map(s, head, w.copy(13)), map_k = keys.map(s, head, w.copy(14));
      for (int64_t c = s.first_chunk(segment); c < s.first_chunk(segment + 1); ++c) {
        const int64_t t = c * n, count = s.tokens(c);
        const bool past = c > 0 || S0;
        std::fill_n(mean, s.ldd, 0.f), std::fill_n(Qz, n, 0.f);
        if (keep && c % GROUP == 0)
          std::copy_n(state, size, states.mutable_data_ptr<float>() + (head * s.groups() + c / GROUP) * size);
        queries.features(s, map_q, head, c, X, XT, QT);
        keys.features(s, map_k, head, c, X, XT, KT);
        load(v, head, t, count, n, V, s.ldd);
        const Left<T> Q = left_transposed(QT, n, s.F, n, w.copy(7));
        const Right<T> U = right(V, s.ldd, n, s.ldd, w.copy(11));

        scores(s, Q, right(KT, n, s.F, n, w.copy(8)), false, A);
        const Left<T> weights = left(A, n, n, n, w.copy(10));
        if (past) {  // N = Q S, d = Q z
          const float* S = for_rounding<T>(state, s, mean, centred);
          product(N, s.ldd, Q, right(S, s.ldd, s.F, s.ldd, w.copy(12)), n, s.ldd, s.F, false);
          product(Qz, n, Left<float>{state + s.F * s.ldd, s.F, 1}, Right<float>{QT, n}, 1, n, s.F, false);
        }
        for (int64_t i = 0; i < n; i += BLOCK<T>)  // + A V, of keys j < i + BLOCK
          product(N + i * s.ldd, s.ldd, weights.at(i, 0), U, BLOCK<T>, s.ldd, i + BLOCK<T>, past);

        float* ds = d.mutable_data_ptr<float>() + head * s.T + t;
        for (int64_t i = 0; i < count; ++i) {  // + A 1
          Vec total(0.f);
          for (int64_t j = 0; j <= i; j += W) total += load_vec(weights.at(i, j).p);
          ds[i] = sum(total) + Qz[i];
        }
        divide(s, count, ds, Qz, mean, N);
        store(N, s.ldd, y, head, t, count);
        if (carry || c + 1 < s.chunks) accumulate(s, KT, left(KT, n, s.F, n, w.copy(9)), U, nullptr, state);
      }
      if (segment == s.segments - 1) State::store(state, S, z, head, s);
    }
  });
  return {y, d, S, z, states};
}

// ---------------------------------------------------------------- backward

// Through one side's feature map: the gradients of W and b, summed in a place of its own for each task
template <class T>
class MapGradients {
 public:
  MapGradients(const Side& side, const Sizes& s) : side_(side), s_(s) {
    const int64_t D = side.width(), tasks = side.mapped() ? s.segments * s.B : 0;
    dWT_ = at::zeros({tasks, s.H, D, s.ldx}, at::kFloat);
    db_ = at::zeros({tasks, s.H, 1, D}, at::kFloat);
  }

  // from the features PT of a chunk and their gradient dPT (F, n) to dx; XT, rows and copies are scratch
  void chunk(int64_t task, int64_t chunk, const Map<T>& map, const float* X, float* XT, const float* PT, float* dPT,
             float* rows, T* copy, Tensor& dx) {
    const int64_t head = task % (s_.B * s_.H), n = s_.n, count = s_.tokens(chunk), D = side_.width(), ld = s_.ldx;
    if (side_.mapped()) {
      float *dWT = dWT_.mutable_data_ptr<float>() + task * D * ld, *db = db_.mutable_data_ptr<float>() + task * D;
      for (int64_t i = 0; i < n; i += W) hedgehog(PT + i, PT + D * n + i, dPT + i, dPT + D * n + i, D, n);
      std::fill_n(dPT + D * n, n, 0.f);  // for an odd D
      product(XT, n, map.W, right(dPT, n, D, n, copy), D, n, D, false);  // dx^T = W du^T
      const Left<T> duT = left(dPT, n, D, n, copy);
      product(dWT, ld, duT, right(X, ld, n, ld, copy + n * ld), D, ld, n, true);  // dW^T += du^T x
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

// dN (n, ldd) = dy / d, dd (n) = -(dy . y) / d, dd_c = dd + dN c; ys is scratch
template <class T>
void through_division(const Sizes& s, const Tensor& dy, const Tensor& y, const Tensor& d, int64_t head, int64_t chunk,
                      const float* c, float* dN, float* dd, float* dd_c, float* ys) {
  const int64_t n = s.n, t = chunk * n, count = s.tokens(chunk), ldd = s.ldd;
  const float* ds = d.const_data_ptr<float>() + head * s.T + t;
  load(dy, head, t, count, n, dN, ldd);
  load(y, head, t, count, n, ys, ldd, c);
  std::fill_n(dd, n, 0.f), std::fill_n(dd_c, n, 0.f);
  for (int64_t i = 0; i < count; ++i) {
    const float scale = ds[i] > 0 ? 1 / ds[i] : 1;
    float* row = dN + i * ldd;
    if (ds[i] > 0) dd_c[i] = -scale * dot(row, ys + i * ldd, ldd);
    for (int64_t e = 0; e < s.D; ++e) row[e] = rounded<T>(row[e] * scale);
    dd[i] = dd_c[i] - dot(row, c, ldd);
  }
}

// dz + (dS - dS') c, where dS' is dS as products take it
template <class T>
void through_rounding(const Sizes& s, const float* dstate, Left<T> dS, const float* c, float* dz) {
  std::copy_n(dstate + s.F * s.ldd, s.F, dz);
  for (int64_t f = 0; rounds<T> && f < s.F; ++f) {
    Vec total(0.f);
    for (int64_t e = 0; e < s.ldd; e += W)
      total = at::vec::fmadd(Vec::loadu(dstate + f * s.ldd + e) - load_vec(dS.at(f, e).p), Vec::loadu(c + e), total);
    dz[f] += sum(total);
  }
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of q, k, v, Wq, bq, Wk, bk (without maps of no meaning), S0, z0
template <class T>
Backward backward_in(const Tensor& dy, const Optional& dS, const Optional& dz, const Tensor& q, const Tensor& k,
                     const Tensor& v, const Optional& Wq, const Optional& bq, const Optional& Wk, const Optional& bk,
                     const Optional& mask, const Tensor& y, const Tensor& d, const Tensor& states) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s), ldx = s.ldx, ldf = s.ldf, ldd = s.ldd;
  TORCH_CHECK(states.size(0) == heads && states.size(1) == s.groups() && states.size(2) == size,
              "hedgehog: the states are of another forward pass");
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  Tensor dv = at::empty(v.sizes(), v.options());
  MapGradients<T> gradients_q(queries, s), gradients_k(keys, s);
  Tensor after = State::at_segment(dS, dz, s, s.segments - 1);  // (dS, dz) after each segment, and then within it

  // dS V^T + dz 1^T and S dN^T + z dd^T are small differences of large numbers if the mean of v is not zero: the keys
  // before all have about the same v, and attention weights sum to 1. So what a factor loses when it is rounded would
  // count, unless the other factor is small. With any c (ldd), about the mean of v,
  //     S dN^T + z dd^T = (S - z c^T) dN^T + z (dd + dN c)^T,    and with X rounded to X',    X V ~ X' V + (X - X') c
  std::vector<float> centres(heads * ldd, 0.f);
  for (int64_t head = 0; rounds<T> && s.T > 0 && head < heads; ++head) {
    const int64_t rows = std::min(s.T, n);
    const float* last = y.const_data_ptr<float>() + ((head + 1) * s.T - rows) * s.D;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t e = 0; e < s.D; ++e) centres[head * ldd + e] += last[i * s.D + e] / rows;
  }

  const std::vector<int64_t> sizes{
      n * ldx, ldx * n, ldf * n, n * n, n * n, n * ldx, n * ldd, n, (ldf + 1) * n, (ldf + 1) * n, n * ldd,
      GROUP * n * ldx, GROUP * ldf * n, GROUP * n * ldd, GROUP * size, n,
      // as products take them
      ldx * n, 3 * ldx * ldx, 3 * ldx * ldx, ldd * n, ldd * n, n * ldd, n * ldd, ldf * n, ldf * n, ldf * n, ldf * n,
      n * n, n * n, n * n, ldf * ldd, ldf * ldd, ldf * ldd, 2 * ldx * n,
      ldf * ldd, ldf};
  between_segments<T>(s, after, true, sizes, [&](const Workspace<T>& w, int64_t, int64_t head, int64_t c, int64_t end,
                                                 float* sum) {
    float *QT = w[2], *dN = w[6], *dd = w[7];
    const Map<T> map = queries.map(s, head, w.copy(17));
    for (; c < end; ++c) {
      queries.features(s, map, head, c, w[0], w.copy(16), QT);
      through_division<T>(s, dy, y, d, head, c, centres.data() + head * ldd, dN, dd, w[15], w[10]);
      accumulate(s, QT, left(QT, n, s.F, n, w.copy(23)), right(dN, ldd, n, ldd, w.copy(22)), dd, sum);
    }
  });

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<T> w(sizes);
    float *Xq = w[0], *XT = w[1], *QT = w[2], *AT = w[3], *dAT = w[4], *rows = w[5], *dN = w[6], *dd = w[7],
          *dQT = w[8], *dKT = w[9], *dV = w[10];
    float *Xs = w[11], *KTs = w[12], *Vs = w[13], *group = w[14], *dd_c = w[15];  // of a group: keys, values, states
    T *XT_ = w.copy(16), *copy = w.copy(33);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      float *dstate = after.mutable_data_ptr<float>() + task * size, *centred = w[34], *dzs = w[35];
      const float* centre = centres.data() + head * ldd;
      const Map<T> map_q = queries.map(s, head, w.copy(17)), map_k = keys.map(s, head, w.copy(18));
      for (int64_t c = s.first_chunk(segment + 1) - 1; c >= s.first_chunk(segment); --c) {
        const int64_t t = c * n, count = s.tokens(c), first = c / GROUP * GROUP, place = c - first;
        if (place == GROUP - 1 || c == s.chunks - 1) {  // entering a group: its keys, values and states, in order
          std::copy_n(states.const_data_ptr<float>() + (head * s.groups() + c / GROUP) * size, size, group);
          for (int64_t i = 0; i <= place; ++i) {
            float *KT = KTs + i * ldf * n, *V = Vs + i * n * ldd;
            keys.features(s, map_k, head, first + i, Xs + i * n * ldx, XT_, KT);
            load(v, head, (first + i) * n, s.tokens(first + i), n, V, ldd);
            if (i == place) break;
            std::copy_n(group + i * size, size, group + (i + 1) * size);
            accumulate(s, KT, left(KT, n, s.F, n, w.copy(23)), right(V, ldd, n, ldd, w.copy(19)), nullptr,
                       group + (i + 1) * size);
          }
        }
        const float *Xk = Xs + place * n * ldx, *KT = KTs + place * ldf * n, *V = Vs + place * n * ldd;
        const float* state = group + place * size;
        queries.features(s, map_q, head, c, Xq, XT_, QT);
        through_division<T>(s, dy, y, d, head, c, centre, dN, dd, dd_c, dV);
        const Left<T> K = left_transposed(KT, n, s.F, n, w.copy(23)), K_T = left(KT, n, s.F, n, w.copy(24));
        const Left<T> Q_T = left(QT, n, s.F, n, w.copy(25)), V_ = left(V, ldd, n, ldd, w.copy(21));
        const Right<T> VT = right_transposed(V, ldd, n, ldd, w.copy(19));
        const Right<T> dNT = right_transposed(dN, ldd, n, ldd, w.copy(20)), dN_ = right(dN, ldd, n, ldd, w.copy(22));

        scores(s, K, right(QT, n, s.F, n, w.copy(26)), true, AT);
        for (int64_t j = 0; j < n; j += BLOCK<T>) {  // dA^T = triu(V dN^T + 1 dd^T)
          for (int64_t row = j; row < j + BLOCK<T>; ++row) std::copy_n(dd, n, dAT + row * n);
          product(dAT + j * n + j, n, V_.at(j, 0), dNT.at(0, j), BLOCK<T>, n - j, ldd, true);
          for (int64_t row = j; row < j + BLOCK<T>; ++row) std::fill_n(dAT + row * n + j, row - j, 0.f);
        }
        const Left<T> A_T = left(AT, n, n, n, w.copy(27));
        const Right<T> dA_T = right(dAT, n, n, n, w.copy(28)), dA = right_transposed(dAT, n, n, n, w.copy(29));

        const bool past = State::any(state, s), future = State::any(dstate, s);
        const Left<T> dS_ = left(dstate, ldd, s.F, ldd, w.copy(31));
        through_rounding(s, dstate, dS_, centre, dzs);
        for (int64_t f = 0; f < s.F; ++f)
          for (int64_t i = 0; i < n; ++i) dQT[f * n + i] = state[s.F * ldd + f] * dd_c[i], dKT[f * n + i] = dzs[f];
        if (past) {  // dQ^T = S dN^T + z dd^T
          const float* of = rounds<T> ? State::centred(state, s, centre, centred) : state;
          product(dQT, n, left(of, ldd, s.F, ldd, w.copy(30)), dNT, s.F, n, ldd, true);
        }
        if (future) {  // dK^T = dS V^T + dz 1^T, dV = K dS
          product(dKT, n, dS_, VT, s.F, n, ldd, true);
          product(dV, ldd, K, right(dstate, ldd, s.F, ldd, w.copy(32)), n, ldd, s.F, false);
        }
        for (int64_t b = 0; b < n; b += BLOCK<T>) {  // + K^T dA^T, + Q^T dA, + A^T dN: of pairs j <= i only
          product(dQT + b, n, K_T.at(0, b), dA_T.at(b, b), s.F, n - b, BLOCK<T>, true);
          product(dKT, n, Q_T.at(0, b), dA.at(b, 0), s.F, b + BLOCK<T>, BLOCK<T>, true);
          product(dV + b * ldd, ldd, A_T.at(b, b), dN_.at(b, 0), BLOCK<T>, ldd, n - b, future);
        }
        accumulate(s, QT, Q_T, dN_, dd, dstate);
        keys.hide(s, head, c, dKT);
        store(dV, ldd, dv, head, t, count);
        gradients_q.chunk(task, c, map_q, Xq, XT, QT, dQT, rows, copy, dq);
        gradients_k.chunk(task, c, map_k, Xk, XT, KT, dKT, rows, copy, dk);
      }
    }
  });
  Tensor dS0 = at::empty({s.B, s.H, s.F, s.D}, at::kFloat), dz0 = at::empty({s.B, s.H, s.F}, at::kFloat);
  for (int64_t head = 0; head < heads; ++head) {
    const float* first = after.const_data_ptr<float>() + head * size;
    State::store(first, dS0, dz0, head, s);
  }
  return {dq, dk, dv, gradients_q.weight(), gradients_q.bias(), gradients_k.weight(), gradients_k.bias(), dS0, dz0};
}

// ---------------------------------------------------------------- bidirectional: every query sees every key

using Bidirectional = std::tuple<Tensor, Tensor, Tensor>;

// y (B, H, T, D), d (B, H, T) and (S, z) of all keys (B H, State::size). There may be more or fewer keys than queries.
template <class T>
Bidirectional bidirectional_in(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq,
                               const Optional& bq, const Optional& Wk, const Optional& bk, const Optional& mask) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value()), s_k = Sizes::of<T>(k, v, Wq.has_value());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s);
  Tensor y = at::empty({s.B, s.H, s.T, s.D}, at::kFloat), d = at::empty({s.B, s.H, s.T}, at::kFloat);
  auto add = [&](const Workspace<T>& w, int64_t, int64_t head, int64_t c, int64_t end, float* sum) {
    add_keys(w, s_k, keys, v, head, c, end, sum);
  };
  const Tensor states = total(segment_sums<T>(s_k, 0, s_k.segments, sizes_for_keys(s_k), add));

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<T> w({n * s.ldx, s.ldx * n, s.ldf * n, n * s.ldd, n, s.ldd, s.ldf * s.ldd, n * s.ldf,
                          s.ldf * s.ldd, 3 * s.ldx * s.ldx});
    float *X = w[0], *QT = w[2], *N = w[3], *Qz = w[4], *mean = w[5];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      const float *state = states.const_data_ptr<float>() + head * size, *z = state + s.F * s.ldd;
      const Right<T> S = right(for_rounding<T>(state, s, mean, w[6]), s.ldd, s.F, s.ldd, w.copy(8));
      const Map<T> map = queries.map(s, head, w.copy(9));
      for (int64_t c = s.first_chunk(segment); c < s.first_chunk(segment + 1); ++c) {
        queries.features(s, map, head, c, X, w.copy(1), QT);
        product(N, s.ldd, left_transposed(QT, n, s.F, n, w.copy(7)), S, n, s.ldd, s.F, false);  // N = Q S
        product(Qz, n, Left<float>{z, s.F, 1}, Right<float>{QT, n}, 1, n, s.F, false);          // d = Q z
        std::copy_n(Qz, s.tokens(c), d.mutable_data_ptr<float>() + head * s.T + c * n);
        divide(s, s.tokens(c), Qz, Qz, mean, N);
        store(N, s.ldd, y, head, c * n, s.tokens(c));
      }
    }
  });
  return {y, d, states};
}

using BidirectionalBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of q, k, v, Wq, bq, Wk, bk: those of the queries, with dS = Q^T dN and dz = Q^T dd, then those of the keys
template <class T>
BidirectionalBackward bidirectional_backward_in(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Optional& Wq, const Optional& bq, const Optional& Wk,
                                                const Optional& bk, const Optional& mask, const Tensor& y,
                                                const Tensor& d, const Tensor& states) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value()), s_k = Sizes::of<T>(k, v, Wq.has_value());
  const int64_t heads = s.B * s.H, size = State::size(s), ldx = s.ldx, ldf = s.ldf, ldd = s.ldd;
  TORCH_CHECK(states.size(0) == heads && states.size(1) == size, "hedgehog: the state is of another forward pass");
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  Tensor dv = at::empty(v.sizes(), v.options());
  MapGradients<T> gradients_q(queries, s), gradients_k(keys, s_k);

  const int64_t n = s.n, n_k = s_k.n;
  const std::vector<int64_t> sizes{n * ldx, ldx * n, ldf * n, n * ldx, n * ldd, n, n, n * ldd, (ldf + 1) * n, ldd,
                                   ldf * ldd, ldx * n, ldd * n, n * ldd, ldf * n, ldf * ldd, 2 * ldx * n, 3 * ldx * ldx};
  auto add = [&](const Workspace<T>& w, int64_t task, int64_t head, int64_t c, int64_t end, float* sum) {
    float *X = w[0], *QT = w[2], *dN = w[4], *dd = w[5], *dd_c = w[6], *dQT = w[8], *mean = w[9];
    const float *state = states.const_data_ptr<float>() + head * size, *z = state + s.F * ldd;
    const Left<T> S = left(for_rounding<T>(state, s, mean, w[10]), ldd, s.F, ldd, w.copy(15));
    const Map<T> map = queries.map(s, head, w.copy(17));
    for (; c < end; ++c) {
      queries.features(s, map, head, c, X, w.copy(11), QT);
      through_division<T>(s, dy, y, d, head, c, mean, dN, dd, dd_c, w[7]);
      for (int64_t f = 0; f < s.F; ++f)
        for (int64_t i = 0; i < n; ++i) dQT[f * n + i] = z[f] * dd_c[i];
      const Right<T> dNT = right_transposed(dN, ldd, n, ldd, w.copy(12));
      product(dQT, n, S, dNT, s.F, n, ldd, true);  // dQ^T = S dN^T + z dd^T
      accumulate(s, QT, left(QT, n, s.F, n, w.copy(14)), right(dN, ldd, n, ldd, w.copy(13)), dd, sum);
      gradients_q.chunk(task, c, map, X, w[1], QT, dQT, w[3], w.copy(16), dq);
    }
  };
  const Tensor dstates = total(segment_sums<T>(s, 0, s.segments, sizes, add));

  at::parallel_for(0, heads * s_k.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<T> w({n_k * ldx, ldx * n_k, ldf * n_k, n_k * ldx, n_k * ldd, n_k * ldd, (ldf + 1) * n_k, ldd,
                          ldf * ldd, ldf, ldx * n_k, ldd * n_k, n_k * ldf, ldf * ldd, ldf * ldd, 2 * ldx * n_k,
                          3 * ldx * ldx});
    float *X = w[0], *KT = w[2], *V = w[4], *dV = w[5], *dKT = w[6], *mean = w[7], *dz = w[9];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      const float* dstate = dstates.const_data_ptr<float>() + head * size;
      for_rounding<T>(states.const_data_ptr<float>() + head * size, s, mean, w[8]);
      const Left<T> dS = left(dstate, ldd, s.F, ldd, w.copy(13));
      const Right<T> dS_ = right(dstate, ldd, s.F, ldd, w.copy(14));
      through_rounding(s, dstate, dS, mean, dz);
      const Map<T> map = keys.map(s_k, head, w.copy(16));
      for (int64_t c = s_k.first_chunk(segment); c < s_k.first_chunk(segment + 1); ++c) {
        keys.features(s_k, map, head, c, X, w.copy(10), KT);
        load(v, head, c * n_k, s_k.tokens(c), n_k, V, ldd);
        for (int64_t f = 0; f < s.F; ++f) std::fill_n(dKT + f * n_k, n_k, dz[f]);
        product(dKT, n_k, dS, right_transposed(V, ldd, n_k, ldd, w.copy(11)), s.F, n_k, ldd, true);  // dK^T = dS V^T + dz 1^T
        product(dV, ldd, left_transposed(KT, n_k, s.F, n_k, w.copy(12)), dS_, n_k, ldd, s.F, false);  // dV = K dS
        keys.hide(s_k, head, c, dKT);
        store(dV, ldd, dv, head, c * n_k, s_k.tokens(c));
        gradients_k.chunk(task, c, map, X, w[1], KT, dKT, w[3], w.copy(15), dk);
      }
    }
  });
  return {dq, dk, dv, gradients_q.weight(), gradients_q.bias(), gradients_k.weight(), gradients_k.bias()};
}

// ---------------------------------------------------------------- in float32 or in bfloat16

// Whether this call multiplies in bfloat16: if q, k and v are, and processor and library can. The library is oneDNN,
// which can be turned off, or told to do without new instructions.
bool in_bfloat16(const Tensor& q, const Tensor& k, const Tensor& v) {
#ifdef __AVX512BF16__
  static const auto works = [] {
    try {
      const std::vector<BFloat16> ones(2 * W, 1.f);
      std::vector<float> two(W);
      product(two.data(), W, Left<BFloat16>{ones.data(), 2, 1}, Right<BFloat16>{ones.data(), W}, 1, W, 2, false);
      at::native::cpublas::brgemm_release();
      return two == std::vector<float>(W, 2.f);
    } catch (const c10::Error&) {
      return false;
    }
  };
  for (const Tensor& x : {q, k, v})
    if (x.scalar_type() != at::kBFloat16) return false;
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool known = works();
  return known;
#else
  return false;
#endif
}

Forward forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq, const Optional& bq,
                const Optional& Wk, const Optional& bk, const Optional& S0, const Optional& z0, const Optional& mask,
                bool keep, bool carry) {
  check(q, k, v, Wq, bq, Wk, bk, S0, z0, mask);
#ifdef __AVX512BF16__
  if (in_bfloat16(q, k, v)) return forward_in<BFloat16>(q, k, v, Wq, bq, Wk, bk, S0, z0, mask, keep, carry);
#endif
  return forward_in<float>(q, k, v, Wq, bq, Wk, bk, S0, z0, mask, keep, carry);
}

Backward backward(const Tensor& dy, const Optional& dS, const Optional& dz, const Tensor& q, const Tensor& k,
                  const Tensor& v, const Optional& Wq, const Optional& bq, const Optional& Wk, const Optional& bk,
                  const Optional& mask, const Tensor& y, const Tensor& d, const Tensor& states) {
  check(q, k, v, Wq, bq, Wk, bk, dS, dz, mask);
  TORCH_CHECK(dy.sizes() == v.sizes() && (dy.stride(3) == 1 || dy.size(3) <= 1 || dy.numel() == 0),
              "hedgehog: dy must be like v");
#ifdef __AVX512BF16__
  if (in_bfloat16(q, k, v))
    return backward_in<BFloat16>(dy, dS, dz, q, k, v, Wq, bq, Wk, bk, mask, y, d, states);
#endif
  return backward_in<float>(dy, dS, dz, q, k, v, Wq, bq, Wk, bk, mask, y, d, states);
}

void check_bidirectional(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq, const Optional& bq,
                         const Optional& Wk, const Optional& bk, const Optional& mask) {
  check(k, k, v, Wq, bq, Wk, bk, {}, {}, mask);
  check(q, q, q, {}, {}, {}, {}, {}, {}, {});
  TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3),
              "hedgehog: q is ", q.sizes(), " and k ", k.sizes());
}

Bidirectional bidirectional(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq, const Optional& bq,
                            const Optional& Wk, const Optional& bk, const Optional& mask) {
  check_bidirectional(q, k, v, Wq, bq, Wk, bk, mask);
#ifdef __AVX512BF16__
  if (in_bfloat16(q, k, v)) return bidirectional_in<BFloat16>(q, k, v, Wq, bq, Wk, bk, mask);
#endif
  return bidirectional_in<float>(q, k, v, Wq, bq, Wk, bk, mask);
}

BidirectionalBackward bidirectional_backward(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Optional& Wq, const Optional& bq, const Optional& Wk,
                                             const Optional& bk, const Optional& mask, const Tensor& y,
                                             const Tensor& d, const Tensor& states) {
  check_bidirectional(q, k, v, Wq, bq, Wk, bk, mask);
  TORCH_CHECK(dy.sizes() == y.sizes() && (dy.stride(3) == 1 || dy.size(3) <= 1 || dy.numel() == 0),
              "hedgehog: dy must be like y");
#ifdef __AVX512BF16__
  if (in_bfloat16(q, k, v))
    return bidirectional_backward_in<BFloat16>(dy, q, k, v, Wq, bq, Wk, bk, mask, y, d, states);
#endif
  return bidirectional_backward_in<float>(dy, q, k, v, Wq, bq, Wk, bk, mask, y, d, states);
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
  const int64_t heads = S.size(0) * S.size(1), F = S.size(2), D = S.size(3), ld = round_up(q.size(3), W);
  Tensor y = at::empty(v.sizes(), at::kFloat), next_S = at::empty_like(S), next_z = at::empty_like(z);
  const float *Ss = S.const_data_ptr<float>(), *zs = z.const_data_ptr<float>();
  float *next_Ss = next_S.mutable_data_ptr<float>(), *next_zs = next_z.mutable_data_ptr<float>();
  float* ys = y.mutable_data_ptr<float>();
  at::parallel_for(0, heads, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, F * D)), [&](int64_t begin, int64_t end) {
    const Workspace<float> w({ld, 2 * ld, 2 * ld, round_up(D, W), round_up(D, W)});
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
        product(Cs.mutable_data_ptr<float>() + c * rows * cols, cols, Left<float>{A.const_data_ptr<float>(), depth, 1},
                Right<float>{B.const_data_ptr<float>(), cols}, rows, cols, depth, false);
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
  m.def("bidirectional(Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, Tensor? bk, Tensor? mask) -> "
        "(Tensor, Tensor, Tensor)", cpu(bidirectional));
  m.def("bidirectional_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, "
        "Tensor? bk, Tensor? mask, Tensor y, Tensor d, Tensor states) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", cpu(bidirectional_backward));
  m.def("decode(Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, Tensor? bk, Tensor S, "
        "Tensor z) -> (Tensor, Tensor, Tensor)", cpu(decode));
}
