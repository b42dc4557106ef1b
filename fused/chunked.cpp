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
//     BFloat16    oneDNN's, which PyTorch exports: AMX or AVX512-BF16, with float32 sums. A left-hand matrix has dense
//                 rows; of a right-hand one two rows take turns (`left`, `right` and their transposed forms)
//
// In both types float32 are the softmax over features, the denominators, the state and all sums. T is BFloat16 if q, k
// and v are, and the processor multiplies it: then what is multiplied is rounded where it is computed, and kept so.
// Features are kept as Q^T, K^T (F, n): the softmax over features then runs down a column, 16 tokens in a vector,
// without horizontal sums.
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
constexpr int64_t BLOCK = sizeof(T) == 2 ? 64 : 16;  // tokens: above the diagonal, blocks of scores are skipped
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

// A matrix A (rows, cols) of type T, or A^T, as a product takes it: where it is, or a copy at `to`. A has room for
// whole vectors both ways. An odd last row of what becomes a right-hand matrix has zeros below it.

template <class T>
Left<T> left(const T* A, int64_t ld) { return {A, ld, 1}; }
Left<float> left_transposed(const float* A, int64_t ld, int64_t, int64_t, float*, int64_t = 0) { return {A, 1, ld}; }
Right<float> right(const float* A, int64_t ld, int64_t, int64_t, float*) { return {A, ld}; }
Right<float> right_transposed(const float* A, int64_t ld, int64_t rows, int64_t cols, float* to) {
  transpose(A, ld, to, rows, rows, cols);
  return {to, rows};
}

Vec load_vec(const float* p) { return Vec::loadu(p); }
Vec load_vec(const BFloat16* p) {
  Vec x;
  at::vec::load_to_float(p, x);
  return x;
}
void store_vec(Vec x, float* to) { x.store(to); }  // rounds, if `to` is of BFloat16
Vec rounded(Vec x, const float*) { return x; }
float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
}

#ifdef __AVX512BF16__
void store_vec(Vec x, BFloat16* to) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
Vec rounded(Vec x, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

// 16 pairs of numbers, of columns j .. j + 15 and rows 2 i, 2 i + 1: one below the other
struct Pairs {
  const BFloat16* A;
  int64_t ld;
  Vec operator()(int64_t i, int64_t j) const {
    const BFloat16* p = A + 2 * i * ld + j;
    const __m256i below = _mm256_loadu_si256((const __m256i*)(p + ld));
    const __m512i two = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)), below, 1);
    return take_turns(two);
  }
  static Vec take_turns(__m512i two) {  // the second half between the numbers of the first
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i turns = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(turns, two));
  }
};

void transpose(const BFloat16* A, int64_t lda, BFloat16* B, int64_t ldb, int64_t rows, int64_t cols) {
  transpose(Pairs{A, lda}, reinterpret_cast<float*>(B), ldb / 2, rows / 2, cols);
}
Left<BFloat16> left_transposed(const BFloat16* A, int64_t ld, int64_t rows, int64_t cols, BFloat16* to,
                               int64_t row = 0) {  // row: numbers from one row of the copy to the next
  rows = round_up(rows, 2 * W), row = row ? row : rows;
  transpose(A, ld, to, row, rows, cols);
  return {to, row, 1};
}
Right<BFloat16> right(const BFloat16* A, int64_t ld, int64_t rows, int64_t cols, BFloat16* to) {
  const Pairs pairs{A, ld};
  for (int64_t i = 0; i < (rows + 1) / 2; ++i)
    for (int64_t j = 0; j < cols; j += W) pairs(i, j).store(to + 2 * (i * cols + j));
  return {to, cols};
}
Right<BFloat16> right_transposed(const BFloat16* A, int64_t ld, int64_t rows, int64_t cols, BFloat16* to) {
  auto words = [=](int64_t i, int64_t j) { return Vec::loadu(A + i * ld + 2 * j); };
  transpose(words, reinterpret_cast<float*>(to), rows, rows, round_up(cols, 2 * W) / 2);
  return {to, rows};
}

void product(float* C, int64_t ldc, Left<BFloat16> A, Right<BFloat16> B, int64_t rows, int64_t cols, int64_t depth,
             bool add) {
  at::native::cpublas::brgemm(rows, cols, round_up(depth, 2), A.row, B.ld, ldc, add, A.p, B.p, C);
}
#endif

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

// One allocation for all the small matrices of a thread. Space::parts(s, take) names them: take(pointer, count) is told
// how many numbers each of them has.
template <class Space>
class Workspace : public Space {
 public:
  explicit Workspace(const Sizes& s) {
    auto bytes = [](auto* p, int64_t count) { return round_up(count * sizeof(*p), 64); };
    int64_t total = 0;
    this->parts(s, [&](auto*& part, int64_t count) { total += bytes(part, count); });
    memory_ = at::empty({total}, at::kByte);
    uint8_t* next = memory_.mutable_data_ptr<uint8_t>();
    this->parts(s, [&](auto*& part, int64_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
      next += bytes(part, count);
    });
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
#ifdef __AVX512BF16__
    if (rounds<typename Space::Number>) at::native::cpublas::brgemm_release();
#endif
  }

 private:
  Tensor memory_;
};

// n numbers of one type as those of another
template <class T>
void convert(const T* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + ALIGN<T> <= n; i += ALIGN<T>) Vec::loadu(from + i).store(to + i);
  for (; i < n; ++i) to[i] = from[i];
}
void convert(const BFloat16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) load_vec(from + i).store(to + i);
  for (; i < n; ++i) to[i] = from[i];
}
void convert(const float* from, BFloat16* to, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + W <= n; i += W) store_vec(Vec::loadu(from + i), to + i);
#endif
  at::vec::convert(from + i, to + i, n - i);
}

// tokens t .. t + count of one head of x (B, H, T, width), float32 or bfloat16, into rows (n, ld) filled up with zeros
template <class T>
void load(const Tensor& x, int64_t head, int64_t t, int64_t count, int64_t n, T* rows, int64_t ld) {
  const int64_t H = x.size(1), width = x.size(3), stride = x.stride(2);
  const int64_t start = head / H * x.stride(0) + head % H * x.stride(1) + t * x.stride(2);
  auto copy = [&](auto* p) {
    for (int64_t i = 0; i < count; ++i, p += stride) {
      convert(p, rows + i * ld, width);
      if (width < ld) std::fill(rows + i * ld + width, rows + (i + 1) * ld, T(0.f));
    }
  };
  if (x.scalar_type() == at::kFloat) copy(x.const_data_ptr<float>() + start);
  else copy(x.const_data_ptr<BFloat16>() + start);
  std::fill(rows + count * ld, rows + n * ld, T(0.f));
}

// rows (count, ld) into tokens t .. t + count of one head of x (B, H, T, width), contiguous, float32 or bfloat16
void store(const float* rows, int64_t ld, Tensor& x, int64_t head, int64_t t, int64_t count) {
  const int64_t T = x.size(2), width = x.size(3), start = (head * T + t) * width;
  auto copy = [&](auto* p) {
    for (int64_t i = 0; i < count; ++i) convert(rows + i * ld, p + i * width, width);
  };
  if (x.scalar_type() == at::kFloat) copy(x.mutable_data_ptr<float>() + start);
  else copy(x.mutable_data_ptr<BFloat16>() + start);
}

// Whether a number of x is as large as CEIL, and x with these clamped to it (in bfloat16: the next number above it)
bool reaches_ceil(const float* x, int64_t n) {
  Vec size(0.f);
  for (int64_t i = 0; i < n; i += W) size = at::vec::maximum(size, Vec::loadu(x + i).abs());
  return (size < Vec(CEIL)).zero_mask() != 0;
}
template <class T>
void clamp(T* x, int64_t n) {
  const Vec top(rounds<T> ? CEIL * 1.004f : CEIL);
  for (int64_t i = 0; i < n; i += W) store_vec(at::vec::clamp(load_vec(x + i), Vec(0.f) - top, top), x + i);
}
#ifdef __AVX512BF16__
bool reaches_ceil(const BFloat16* x, int64_t n) {  // numbers without their sign are in the order of their bits
  __m512i size = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 2 * W)
    size = _mm512_max_epu16(size, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi16(0x7fff)));
  return _mm512_cmpgt_epu16_mask(size, _mm512_set1_epi16(BFloat16(CEIL).x)) != 0;
}
#endif

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
  static bool any(const float* state, const Sizes& s) {  // whether it is not zero
    return std::any_of(state, state + size(s), [](float x) { return x != 0; });
  }
  static void add(float* to, const float* from, const Sizes& s) {
    for (int64_t i = 0; i < size(s); ++i) to[i] += from[i];
  }
};

template <class T>
void mean_of(const float* state, const Sizes& s, float* c) {  // where it is needed: where products round
  if (rounds<T>) State::mean(state, s, c);
  else std::fill_n(c, s.ldd, 0.f);
}

// ---------------------------------------------------------------- the queries or the keys, and their features

template <class T>
Vec exp(Vec x, const T*) { return x.exp_u20(); }
template <class T>
Vec reciprocal(Vec x, const T*) { return Vec(1.f) / x; }
#ifdef __AVX512BF16__  // to 1e-4, which rounding would lose
Vec exp(Vec x, const BFloat16*) {  // 2^t, where 2^(t - floor(t)) is a polynomial
  const __m512 t = x * Vec(1.44269504f), r = _mm512_reduce_ps(t, 9);
  Vec y = at::vec::fmadd(Vec(r), Vec(0.07802457f), Vec(0.2260672f));
  y = at::vec::fmadd(at::vec::fmadd(y, Vec(r), Vec(0.69583347f)), Vec(r), Vec(0.99992523f));
  return _mm512_scalef_ps(y, t);
}
Vec reciprocal(Vec x, const BFloat16*) { return _mm512_rcp14_ps(x); }
#endif

// Rows of a tensor that are needed soon. They are fetched a cache line at a time, between computations: many at once
// wait for each other.
struct Ahead {
  const char* p = nullptr;
  int64_t stride = 0, bytes = 0;  // from row to row; of a row

  static Ahead of(const Tensor& x, int64_t head, int64_t t) {  // from token t on
    const int64_t H = x.size(1), size = x.itemsize();
    const int64_t start = head / H * x.stride(0) + head % H * x.stride(1) + t * x.stride(2);
    return {static_cast<const char*>(x.const_data_ptr()) + start * size, x.stride(2) * size, x.size(3) * size};
  }
  Ahead from(int64_t row) const { return {p + row * stride, stride, bytes}; }
  void fetch(int64_t row, int64_t line) const {
    if (line * 64 < bytes) __builtin_prefetch(p + row * stride + line * 64, 0, 2);
  }
};

template <class T>
struct Map {  // W of one head, ready for products
  Left<T> WT, rest;      // rest: what W^T loses when it is rounded
  bool inexact = false;  // whether it loses anything
};

template <class T>
struct MapSpace {  // what the features of a chunk need
  T *X, *XT, *WT;  // the inputs; as products take them; W
  float *u, *e;    // u^T = W^T x^T; exponentials of u and -u
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    const int64_t widest = std::max({s.n, s.ldx, s.ldd});  // forward puts values, scores and numerators there, too
    take(X, s.n * widest), take(u, s.n * widest);
    take(XT, s.ldx * s.n), take(WT, 4 * s.ldx * s.ldx), take(e, s.F * W);
  }
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
  bool shares_weight(const Side& other) const {
    return mapped() && weight->const_data_ptr<float>() == other.weight->const_data_ptr<float>();
  }
  // W (ldx, ldx), rounded and filled up with zeros; rest: what it loses, and whether it loses anything
  template <class T>
  bool round_weight(const Sizes& s, int64_t head, T* to, T* rest) const {
    const int64_t D = width(), ld = s.ldx;
    if (D < ld) std::fill_n(to, ld * ld, T(0.f)), std::fill_n(rest, ld * ld, T(0.f));
    bool inexact = false;
    for (int64_t i = 0; i < D; ++i) {
      const float* exact = head_weight(head) + i * D;
      convert(exact, to + i * ld, D);
      for (int64_t j = 0; rounds<T> && j < D; j += W) {
        const Vec lost = Vec::loadu(exact + j, std::min(W, D - j)) - load_vec(to + i * ld + j);
        store_vec(lost, rest + i * ld + j);
        inexact |= (lost != Vec(0.f)).zero_mask() != (1 << W) - 1;
      }
    }
    return inexact;
  }

  Map<float> map(const Sizes&, int64_t head, float*) const {
    return mapped() ? Map<float>{{head_weight(head), 1, width()}} : Map<float>{};
  }
#ifdef __AVX512BF16__
  Map<BFloat16> map(const Sizes& s, int64_t head, BFloat16* to) const {
    if (!mapped()) return {};
    const int64_t ld = s.ldx;
    BFloat16 *rows = to + 2 * ld * ld, *rest = to + 3 * ld * ld;
    const bool inexact = round_weight(s, head, rows, rest);
    const Left<BFloat16> WT = left_transposed(rows, ld, ld, ld, to);
    return {WT, inexact ? left_transposed(rest, ld, ld, ld, to + ld * ld) : WT, inexact};
  }
#endif

  // features PT (F, n) of a chunk; its inputs X (n, ldx) are left for backward. Rows of `a` and `b` come nearer meanwhile.
  template <class T>
  void features(const Sizes& s, const MapSpace<T>& w, const Map<T>& map, int64_t head, int64_t chunk, T* X, T* PT,
                Ahead a = {}, Ahead b = {}) const {
    const int64_t t = chunk * s.n, count = s.tokens(chunk), D = width(), n = s.n;
    load(x, head, t, count, n, X, s.ldx);
    if (mapped()) {
      if (reaches_ceil(X, n * s.ldx)) clamp(X, n * s.ldx);
      const Right<T> xT = right_transposed(X, s.ldx, n, s.ldx, w.XT);
      product(w.u, n, map.WT, xT, D, n, D, false);  // u^T - b = W^T x^T
      if (map.inexact) product(w.u, n, map.rest, xT, D, n, D, true);
      const float* bias_of_head = bias->const_data_ptr<float>() + head % x.size(1) * D;
      for (int64_t i = 0; i < n; i += W)
        hedgehog(w.u + i, bias_of_head, D, n, w.e, PT + i, PT + D * n + i, a.from(i), b.from(i));
    } else {
      transpose(X, s.ldx, PT, n, n, s.ldx);
    }
    std::fill(PT + s.F * n, PT + s.ldf * n, T(0.f));
    hide(s, head, chunk, PT);
  }

  // zero the features of tokens that do not exist or are masked (keys only)
  template <class T>
  void hide(const Sizes& s, int64_t head, int64_t chunk, T* PT) const {
    const int64_t t = chunk * s.n, count = s.tokens(chunk);
    const bool* real = mask ? mask->const_data_ptr<bool>() + head / x.size(1) * s.T + t : nullptr;
    for (int64_t j = 0; j < s.n; ++j)
      if (j >= count || (real && !real[j]))
        for (int64_t f = 0; f < s.F; ++f) PT[f * s.n + j] = 0.f;
  }

  // W tokens, one in each lane: from u - b (D rows) softmax(u) in p and softmax(-u) in m. Softmax does not need its
  // largest exponent if all are small: exp(-u) is then a division, 1 / exp(u). Each token decides for itself, because
  // others must not change its bits.
  template <class T>
  static void hedgehog(const float* u, const float* b, int64_t D, int64_t n, float* e, T* p, T* m, Ahead next = {},
                       Ahead other = {}) {
    float* f = e + D * W;
    Vec size(0.f), sum_p(0.f), sum_m(0.f);
#pragma GCC unroll 4
    for (int64_t d = 0; d < D; ++d) {
      const Vec x = Vec::loadu(u + d * n) + Vec(b[d]), plus = exp(x, p), minus = reciprocal(plus, p);
      size = at::vec::clamp_min(size, x.abs());  // NaN is in the sums
      sum_p += plus, sum_m += minus;
      plus.store(e + d * W), minus.store(f + d * W);
      next.fetch(d % W, d / W), other.fetch(d % W, d / W);
    }
    const Vec small = size <= Vec(40.f);
    if (small.zero_mask()) {
      Vec top = Vec::loadu(u) + Vec(b[0]), low = top, wide_p(0.f), wide_m(0.f);
      for (int64_t d = 1; d < D; ++d) {
        const Vec x = Vec::loadu(u + d * n) + Vec(b[d]);
        top = at::vec::maximum(top, x), low = at::vec::minimum(low, x);
      }
      for (int64_t d = 0; d < D; ++d) {
        const Vec x = Vec::loadu(u + d * n) + Vec(b[d]), plus = exp(x - top, p), minus = exp(low - x, p);
        wide_p += plus, wide_m += minus;
        Vec::blendv(plus, Vec::loadu(e + d * W), small).store(e + d * W);
        Vec::blendv(minus, Vec::loadu(f + d * W), small).store(f + d * W);
      }
      sum_p = Vec::blendv(wide_p, sum_p, small), sum_m = Vec::blendv(wide_m, sum_m, small);
    }
    sum_p = Vec(1.f) / sum_p, sum_m = Vec(1.f) / sum_m;
#pragma GCC unroll 4
    for (int64_t d = 0; d < D; ++d) {
      store_vec(at::vec::fmadd(Vec::loadu(e + d * W), sum_p, Vec(FLOOR)), p + d * n);
      store_vec(at::vec::fmadd(Vec::loadu(f + d * W), sum_m, Vec(FLOOR)), m + d * n);
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

// W numbers of a row, from column j on: zero beyond column i, or before it
Vec columns_up_to(int64_t i, const float* row, int64_t j) {
  return j + W <= i + 1 ? Vec::loadu(row + j) : Vec::loadu(row + j, std::max<int64_t>(0, i + 1 - j));
}
Vec columns_from(int64_t i, Vec x, int64_t j) {
  return j >= i ? x : j + W <= i ? Vec(0.f) : Vec::blendv(x, Vec(0.f), Vec::arange(float(j), 1.f) < Vec(float(i)));
}

// A row of `end` numbers, rounded, with zeros beyond column i: the sum of it
float keep_columns(const float* row, int64_t i, int64_t end, float* to) {
  Vec total(0.f);
  for (int64_t j = 0; j < end; j += W) {
    const Vec x = columns_up_to(i, row, j);
    x.store(to + j);
    total += x;
  }
  return sum(total);
}
#ifdef __AVX512BF16__
float keep_columns(const float* row, int64_t i, int64_t end, BFloat16* to) {
  Vec total(0.f);
  for (int64_t j = 0; j < end; j += 2 * W) {
    const __m512bh x = _mm512_cvtne2ps_pbh(columns_up_to(i, row, j + W), columns_up_to(i, row, j));
    _mm512_storeu_si512(to + j, (__m512i)x);
    total = _mm512_dpbf16_ps(total, x, (__m512bh)_mm512_set1_epi16(0x3f80));  // ones
  }
  return sum(total);
}
#endif

// A (n, lda) = Q K^T, a row for each query, zero where the key comes later; total (n) = A 1
template <class T>
void scores(const Sizes& s, Left<T> Q, Right<T> KT, float* exact, T* A, int64_t lda, float* total) {
  const int64_t n = s.n;
  for (int64_t b = 0; b < n; b += BLOCK<T>) {
    const int64_t end = std::min(n, b + BLOCK<T>);
    product(exact + b * n, n, Q.at(b, 0), KT, end - b, end, s.F, false);
    for (int64_t i = b; i < end; ++i) total[i] = keep_columns(exact + i * n, i, end, A + i * lda);
  }
}

// AT (n, n) = K Q^T + 1 c^T, a row for each key, zero where the query comes earlier; c: n numbers, or none
template <class T>
void scores_of_keys(const Sizes& s, Left<T> K, Right<T> QT, int64_t depth, const float* c, float* exact, T* AT) {
  const int64_t n = s.n;
  for (int64_t b = 0; b < n; b += BLOCK<T>) {
    const int64_t end = std::min(n, b + BLOCK<T>);
    product(exact + b * n + b, n, K.at(b, 0), QT.at(0, b), end - b, n - b, depth, false);
    for (int64_t j = b; j < end; ++j)
      for (int64_t i = b; i < n; i += W) {
        const Vec x = Vec::loadu(exact + j * n + i);
        store_vec(columns_from(j, c ? x + Vec::loadu(c + i) : x, i), AT + j * n + i);
      }
  }
}

// The sum of a row of numbers, or of their products with c
template <class T>
float sum_of(const T* row, const float* c, int64_t n) {
  Vec total(0.f);
  for (int64_t i = 0; i < n; i += W)
    total = c ? at::vec::fmadd(load_vec(row + i), Vec::loadu(c + i), total) : total + load_vec(row + i);
  return sum(total);
}

#ifdef __AVX512BF16__
template <>
float sum_of(const BFloat16* row, const float* c, int64_t n) {
  Vec total(0.f);
  for (int64_t i = 0; i < n; i += 2 * W) {
    const __m512i x = _mm512_loadu_si512(row + i);
    if (!c) {
      total = _mm512_dpbf16_ps(total, (__m512bh)x, (__m512bh)_mm512_set1_epi16(0x3f80));  // ones
    } else {
      total = at::vec::fmadd(load_vec(row + i), Vec::loadu(c + i), total);
      total = at::vec::fmadd(load_vec(row + i + W), Vec::loadu(c + i + W), total);
    }
  }
  return sum(total);
}
#endif

// z Q^T (n): in float32, whatever T is
template <class T>
void weigh(const float* z, const T* QT, int64_t F, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 2 * W) {
    Vec total[4];  // of even and odd features
    auto add = [&](int64_t f, int at) {
      for (int j = 0; j < 2; ++j)
        total[at + j] = at::vec::fmadd(Vec(z[f]), load_vec(QT + f * n + i + j * W), total[at + j]);
    };
    int64_t f = 0;
    for (; f + 2 <= F; f += 2) add(f, 0), add(f + 1, 2);
    if (f < F) add(f, 0);
    (total[0] + total[2]).store(to + i), (total[1] + total[3]).store(to + i + W);
  }
}

// S += K^T V, z += K^T c, with c = 1 (nullptr) for keys and values; for queries and (dN, dd) c = dd
template <class T>
void accumulate(const Sizes& s, const T* KT, Right<T> V, const float* c, float* state) {
  product(state, s.ldd, left(KT, s.n), V, s.F, s.ldd, s.n, true);
  for (int64_t f = 0; f < s.F; ++f) state[s.F * s.ldd + f] += sum_of(KT + f * s.n, c, s.n);
}

// What add_chunks(workspace, task, head, first chunk, last, sum) adds for the segments first .. last, and zeros for the
// others: (segments, B H, State::size)
template <class Space, class AddChunks>
Tensor segment_sums(const Sizes& s, int64_t first, int64_t last, const AddChunks& add_chunks) {
  const int64_t heads = s.B * s.H, size = State::size(s);
  Tensor sums = at::zeros({s.segments, heads, size}, at::kFloat);
  float* sum = sums.mutable_data_ptr<float>();
  at::parallel_for(heads * first, heads * last, 1, [&](int64_t begin, int64_t end) {
    const Workspace<Space> w(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads;
      add_chunks(w, task, task % heads, s.first_chunk(segment), s.first_chunk(segment + 1), sum + task * size);
    }
  });
  return sums;
}

// The state before each segment (or, from_end, after it): `first` (B H, State::size), plus the sums over the
// segments on the way there
template <class Space, class AddChunks>
void between_segments(const Sizes& s, Tensor& first, bool from_end, const AddChunks& add_chunks) {
  if (s.segments == 1) return;
  const int64_t heads = s.B * s.H, size = State::size(s);
  const Tensor sums = segment_sums<Space>(s, from_end, s.segments - 1 + from_end, add_chunks);
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

template <class T>
struct KeySpace {  // what the sum of K^T V and K^T 1 over some chunks needs
  using Number = T;
  MapSpace<T> map;
  T *KT, *V, *U;  // features; values; V as products take it
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    map.parts(s, take), take(KT, s.ldf * s.n), take(V, s.n * s.ldd), take(U, s.n * s.ldd);
  }
};

template <class T>
void add_keys(const KeySpace<T>& w, const Sizes& s, const Side& keys, const Tensor& v, int64_t head, int64_t c,
              int64_t end, float* sum) {
  const Map<T> map = keys.map(s, head, w.map.WT);
  for (; c < end; ++c) {
    const int64_t next = (c + 1) * s.n;
    keys.features(s, w.map, map, head, c, w.map.X, w.KT, Ahead::of(keys.x, head, next), Ahead::of(v, head, next));
    load(v, head, c * s.n, s.tokens(c), s.n, w.V, s.ldd);
    accumulate(s, w.KT, right(w.V, s.ldd, s.n, s.ldd, w.U), nullptr, sum);
  }
}

// What products take for S: in bfloat16 S - z mean^T, where mean is about that of v, so that rounding loses little
// (backward says more); else S. Zeros below an odd last row.
const float* for_rounding(const float* S, const Sizes&, const float*, float*) { return S; }
#ifdef __AVX512BF16__
const BFloat16* for_rounding(const float* S, const Sizes& s, const float* mean, BFloat16* to) {
  const float* z = S + s.F * s.ldd;
  for (int64_t f = 0; f < s.F; ++f)
    for (int64_t e = 0; e < s.ldd; e += W)
      store_vec(Vec::loadu(S + f * s.ldd + e) - Vec(z[f]) * Vec::loadu(mean + e), to + f * s.ldd + e);
  std::fill(to + s.F * s.ldd, to + s.ldf * s.ldd, BFloat16(0.f));
  return to;
}
#endif

// The same as a right-hand matrix
Right<float> right_of_state(const float* S, const Sizes& s, const float*, float*) { return {S, s.ldd}; }
#ifdef __AVX512BF16__
Right<BFloat16> right_of_state(const float* S, const Sizes& s, const float* mean, BFloat16* to) {
  const float* z = S + s.F * s.ldd;
  for (int64_t f = 0; f < s.ldf; f += 2)
    for (int64_t e = 0; e < s.ldd; e += W) {
      auto row = [&](int64_t f) {
        return f < s.F ? Vec::loadu(S + f * s.ldd + e) - Vec(z[f]) * Vec::loadu(mean + e) : Vec(0.f);
      };
      Pairs::take_turns((__m512i)_mm512_cvtne2ps_pbh(row(f + 1), row(f))).store(to + f * s.ldd + 2 * e);
    }
  return {to, s.ldd};
}
#endif

// y = (N + Qz mean^T) / d of tokens t .. t + count, in the place of N and then in y
void divide(const Sizes& s, const float* d, const float* Qz, const float* mean, float* N, Tensor& y, int64_t head,
            int64_t t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Vec scale(d[i] > 0 ? 1 / d[i] : 1), past(Qz[i]);
    for (int64_t e = 0; e < s.ldd; e += W) {
      const Vec numerator = at::vec::fmadd(past, Vec::loadu(mean + e), Vec::loadu(N + i * s.ldd + e));
      (numerator * scale).store(N + i * s.ldd + e);
    }
  }
  store(N, s.ldd, y, head, t, count);
}

// ---------------------------------------------------------------- forward

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
struct ForwardSpace {
  using Number = T;
  MapSpace<T> map;
  T *QT, *KT;           // features; K^T as a product takes it comes in the place of Q^T
  T *QA, *SV, *WT;      // as products take them: Q and the scores A side by side, S above V, W of keys
  float *Qz, *d;        // Q z, denominators
  float *state, *mean;  // (S, z), and the mean of v in it
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    map.parts(s, take);
    for (T** p : {&QT, &KT}) take(*p, s.ldf * s.n);
    take(QA, s.n * (s.ldf + s.n)), take(SV, (s.ldf + s.n) * s.ldd), take(WT, 4 * s.ldx * s.ldx);
    take(Qz, s.n), take(d, s.n);
    take(state, State::size(s)), take(mean, s.ldd);
  }
};

// y (B, H, T, D), d (B, H, T), the new state S (B, H, F, D) and z (B, H, F), and states for backward.
// `keep`: make states; `carry`: make the new state (without it S and z are of no use); `narrow`: y has v's type, which
// backward does not take.
template <class T>
Forward forward_in(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq, const Optional& bq,
                   const Optional& Wk, const Optional& bk, const Optional& S0, const Optional& z0,
                   const Optional& mask, bool keep, bool carry, bool narrow) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s), lda = s.ldf + n;
  Tensor y = at::empty({s.B, s.H, s.T, s.D}, narrow ? v.scalar_type() : at::kFloat);
  Tensor d = at::empty({s.B, s.H, s.T}, at::kFloat);
  Tensor S = at::empty({s.B, s.H, s.F, s.D}, at::kFloat), z = at::empty({s.B, s.H, s.F}, at::kFloat);
  Tensor states = at::empty({keep ? heads : 0, s.groups(), size}, at::kFloat);
  const bool tied = keys.shares_weight(queries);
  const bool given = s.segments > 1 || S0;  // whether there is a state before the first chunk of a task
  Tensor before = given ? State::at_segment(S0, z0, s, 0) : at::empty({0}, at::kFloat);  // ... of each segment
  between_segments<KeySpace<T>>(s, before, false, [&](const KeySpace<T>& w, int64_t, int64_t head, int64_t c,
                                                      int64_t end, float* sum) {
    add_keys(w, s, keys, v, head, c, end, sum);
  });

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<ForwardSpace<T>> w(s);
    float* N = w.map.u;  // what is small stays in the innermost cache: one place for u, scores and numerators
    T* v_c = w.map.X;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      if (given) std::copy_n(before.const_data_ptr<float>() + task * size, size, w.state);
      else if (keep || carry || s.chunks > 1) std::fill_n(w.state, size, 0.f);  // else no one reads it
      const Map<T> map_q = queries.map(s, head, w.map.WT), map_k = tied ? map_q : keys.map(s, head, w.WT);
      for (int64_t c = s.first_chunk(segment), first = c; c < s.first_chunk(segment + 1); ++c) {
        const int64_t t = c * n, count = s.tokens(c);
        const bool past = c > 0 || S0;
        if (keep && c % GROUP == 0)
          std::copy_n(w.state, size, states.mutable_data_ptr<float>() + (head * s.groups() + c / GROUP) * size);
        queries.features(s, w.map, map_q, head, c, w.map.X, w.QT, Ahead::of(q, head, t + n), Ahead::of(y, head, t));
        const Left<T> Q = left_transposed(w.QT, n, s.F, n, w.QA, lda);
        if (past) weigh(w.state + s.F * s.ldd, w.QT, s.F, n, w.Qz);
        keys.features(s, w.map, map_k, head, c, w.map.X, w.KT, Ahead::of(k, head, t + n), Ahead::of(v, head, t + n));
        load(v, head, t, count, n, v_c, s.ldd);
        const Right<T> V = right(v_c, s.ldd, n, s.ldd, w.SV + s.ldf * s.ldd);
        scores(s, Q, right(w.KT, n, s.F, n, w.QT), N, w.QA + s.ldf, lda, w.d);  // d = A 1
        Right<T> S{};
        if (past) {  // N = Q S, d += Q z
          if (c < first + GROUP || c % GROUP == 0) mean_of<T>(w.state, s, w.mean);
          S = right_of_state(w.state, s, w.mean, w.SV);
          if (!rounds<T>) product(N, s.ldd, Q, S, n, s.ldd, s.F, false);
          for (int64_t i = 0; i < n; i += W) (Vec::loadu(w.d + i) + Vec::loadu(w.Qz + i)).store(w.d + i);
        } else {
          std::fill_n(w.mean, s.ldd, 0.f), std::fill_n(w.Qz, n, 0.f);
        }
        const bool both = past && rounds<T>;  // N = [Q A] [S V], one product
        const int64_t from = both ? 0 : s.ldf;
        for (int64_t i = 0; i < n; i += BLOCK<T>) {  // N += A V, of keys j < i + BLOCK
          const int64_t last = std::min(n, i + BLOCK<T>);
          product(N + i * s.ldd, s.ldd, left(w.QA + i * lda + from, lda), both ? S : V, last - i, s.ldd,
                  s.ldf + last - from, past && !both);
        }
        std::copy_n(w.d, count, d.mutable_data_ptr<float>() + head * s.T + t);
        divide(s, w.d, w.Qz, w.mean, N, y, head, t, count);
        if (carry || c + 1 < s.chunks) accumulate(s, w.KT, V, nullptr, w.state);
      }
      if (carry && segment == s.segments - 1) State::store(w.state, S, z, head, s);
    }
  });
  return {y, d, S, z, states};
}

// ---------------------------------------------------------------- backward

template <class T>
struct MapGradientSpace {
  T *weight, *duT, *du, *X;  // W, as a product takes it; the gradient of u, and the inputs, as products take them
  float *dx, *lanes;         // sums of du over tokens, W at a time
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    take(lanes, s.ldx * W);
    take(weight, 3 * s.ldx * s.ldx), take(duT, s.ldx * s.n), take(du, s.ldx * s.n), take(X, s.n * s.ldx);
    take(dx, s.n * s.ldx);
  }
};

// Through one side's feature map: the gradients of W and b, summed in a place of its own for each task
template <class T>
class MapGradients {
 public:
  MapGradients(const Side& side, const Sizes& s) : side_(side), s_(s) {
    const int64_t D = side.width(), tasks = side.mapped() ? s.segments * s.B : 0;
    dWT_ = at::zeros({tasks, s.H, D, s.ldx}, at::kFloat);
    db_ = at::zeros({tasks, s.H, 1, D}, at::kFloat);
  }

  // W^T of a head; it stays in w.weight
  Right<T> weight(const MapGradientSpace<T>& w, int64_t head) const {
    if (!side_.mapped()) return {};
    const int64_t ld = s_.ldx;
    side_.round_weight(s_, head, w.weight, w.weight + ld * ld);
    return right_transposed(w.weight, ld, ld, ld, w.weight + 2 * ld * ld);
  }

  // from the features PT of a chunk and their gradient dPT (F, n) to dx
  void chunk(const MapGradientSpace<T>& w, int64_t task, int64_t chunk, Right<T> WT, const T* X, const T* PT,
             const float* dPT, Tensor& dx) {
    const int64_t head = task % (s_.B * s_.H), n = s_.n, count = s_.tokens(chunk), D = side_.width(), ld = s_.ldx;
    if (side_.mapped()) {
      float *dWT = dWT_.mutable_data_ptr<float>() + task * D * ld, *db = db_.mutable_data_ptr<float>() + task * D;
      std::fill_n(w.lanes, D * W, 0.f);
      for (int64_t i = 0; i < n; i += W)
        hedgehog(PT + i, PT + D * n + i, dPT + i, dPT + D * n + i, w.duT + i, w.lanes, D, n);
      std::fill(w.duT + D * n, w.duT + ld * n, T(0.f));
      product(w.dx, ld, left_transposed(w.duT, n, D, n, w.du), WT, n, ld, D, false);          // dx = du W^T
      product(dWT, ld, left(w.duT, n), right(X, ld, n, ld, w.X), D, ld, n, true);             // dW^T += du^T x
      for (int64_t e = 0; e < D; ++e) db[e] += sum(Vec::loadu(w.lanes + e * W));
      if (reaches_ceil(X, n * ld))  // the clamp lets no gradient through
        for (int64_t i = 0; i < n * ld; ++i) w.dx[i] = std::abs(float(X[i])) < CEIL ? w.dx[i] : 0.f;
    } else {
      transpose(dPT, n, w.dx, ld, ld, n);
    }
    store(w.dx, ld, dx, head, chunk * n, count);
  }

  // du = p (dp - p.dp) - m (dm - m.dm) for W tokens, also added to lanes (D, W)
  static void hedgehog(const T* p, const T* m, const float* dp, const float* dm, T* du, float* lanes,
                       int64_t D, int64_t n) {
    auto probability = [](const T* x) { return load_vec(x) - Vec(FLOOR); };
    Vec p_dp(0.f), m_dm(0.f);
    for (int64_t d = 0; d < D * n; d += n) {
      p_dp = at::vec::fmadd(probability(p + d), Vec::loadu(dp + d), p_dp);
      m_dm = at::vec::fmadd(probability(m + d), Vec::loadu(dm + d), m_dm);
    }
#pragma GCC unroll 4
    for (int64_t d = 0; d < D * n; d += n, lanes += W) {
      const Vec du_p = probability(p + d) * (Vec::loadu(dp + d) - p_dp);
      const Vec du_m = probability(m + d) * (Vec::loadu(dm + d) - m_dm);
      store_vec(du_p - du_m, du + d);
      (Vec::loadu(lanes) + du_p - du_m).store(lanes);
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

// dN (n, ldd) = dy / d, dd (n) = -(dy . y) / d, dd_c = dd + dN c; dys and ys (n, ldd) are scratch
template <class T>
void through_division(const Sizes& s, const Tensor& dy, const Tensor& y, const Tensor& d, int64_t head, int64_t chunk,
                      const float* c, float* dys, float* ys, T* dN, float* dd, float* dd_c) {
  const int64_t n = s.n, t = chunk * n, count = s.tokens(chunk), ldd = s.ldd;
  const float* ds = d.const_data_ptr<float>() + head * s.T + t;
  load(dy, head, t, count, count, dys, ldd);
  load(y, head, t, count, count, ys, ldd);
  std::fill(dN + count * ldd, dN + n * ldd, T(0.f)), std::fill_n(dd, n, 0.f), std::fill_n(dd_c, n, 0.f);
  for (int64_t i = 0; i < count; ++i) {
    const float scale = ds[i] > 0 ? 1 / ds[i] : 1;
    Vec along_y(0.f), along_c(0.f);
    for (int64_t e = 0; e < ldd; e += W) {
      const Vec g = Vec::loadu(dys + i * ldd + e) * Vec(scale), centre = Vec::loadu(c + e), of_N = rounded(g, dN);
      along_y = at::vec::fmadd(g, Vec::loadu(ys + i * ldd + e) - centre, along_y);
      along_c = at::vec::fmadd(of_N, centre, along_c);
      store_vec(of_N, dN + i * ldd + e);
    }
    if (ds[i] > 0) dd_c[i] = -sum(along_y);
    dd[i] = dd_c[i] - sum(along_c);
  }
}

// dS as products take it, with zeros below an odd last row, and dz + (dS - dS') c, where dS' is that
const float* through_rounding(const Sizes& s, const float* dstate, const float*, float*, float* dz) {
  std::copy_n(dstate + s.F * s.ldd, s.F, dz);
  return dstate;
}
#ifdef __AVX512BF16__
const BFloat16* through_rounding(const Sizes& s, const float* dstate, const float* c, BFloat16* dS, float* dz) {
  for (int64_t f = 0; f < s.F; ++f) {
    Vec total(0.f);
    for (int64_t e = 0; e < s.ldd; e += W) {
      const Vec exact = Vec::loadu(dstate + f * s.ldd + e);
      total = at::vec::fmadd(exact - rounded(exact, dS), Vec::loadu(c + e), total);
      store_vec(exact, dS + f * s.ldd + e);
    }
    dz[f] = dstate[s.F * s.ldd + f] + sum(total);
  }
  std::fill(dS + s.F * s.ldd, dS + s.ldf * s.ldd, BFloat16(0.f));
  return dS;
}
#endif

template <class T>
struct QuerySpace {  // what the sum of Q^T dN and Q^T dd over some chunks needs
  using Number = T;
  MapSpace<T> map;
  T *QT, *dN, *right_dN;            // features, the gradient of N; as a product takes it
  float *dys, *ys, *dd, *dd_c;      // see through_division
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    map.parts(s, take), take(QT, s.ldf * s.n);
    for (T** p : {&dN, &right_dN}) take(*p, s.n * s.ldd);
    for (float** p : {&dys, &ys}) take(*p, s.n * s.ldd);
    for (float** p : {&dd, &dd_c}) take(*p, s.n);
  }
};

template <class T>
struct BackwardSpace : QuerySpace<T> {
  MapGradientSpace<T> through_q, through_k;
  T *WT, *Xs, *KTs, *Vs;                         // W of keys; of a group: inputs of keys, features, values
  float* states;                                 // of a group: (S, z) before each chunk
  T *AT, *dAT, *S, *dS;                          // transposed scores and their gradients; S and dS, rounded
  T *K, *Q, *right_V, *VT, *dNT, *dA, *dA_T, *right_dS;  // K, Q^T, V, V^T, dN^T, dA, dA^T and dS as products take them
  float *exact, *dQT, *dKT, *dV, *dz;            // scores; gradients of features and values; of z
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    QuerySpace<T>::parts(s, take), through_q.parts(s, take), through_k.parts(s, take);
    take(WT, 4 * s.ldx * s.ldx);
    take(Xs, GROUP * s.n * s.ldx), take(KTs, GROUP * s.ldf * s.n), take(Vs, GROUP * s.n * s.ldd);
    take(states, GROUP * State::size(s));
    for (T** p : {&AT, &dAT, &dA, &dA_T}) take(*p, s.n * s.n);
    for (T** p : {&S, &dS, &right_dS}) take(*p, s.ldf * s.ldd);
    for (T** p : {&K, &Q}) take(*p, s.ldf * s.n);
    for (T** p : {&right_V, &VT, &dNT}) take(*p, s.n * s.ldd);
    for (float** p : {&dQT, &dKT}) take(*p, s.ldf * s.n);
    take(exact, s.n * s.n), take(dV, s.n * s.ldd), take(dz, s.ldf);
  }
};

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of q, k, v, Wq, bq, Wk, bk (without maps of no meaning), S0, z0
template <class T>
Backward backward_in(const Tensor& dy, const Optional& dS, const Optional& dz, const Tensor& q, const Tensor& k,
                     const Tensor& v, const Optional& Wq, const Optional& bq, const Optional& Wk, const Optional& bk,
                     const Optional& mask, const Tensor& y, const Tensor& d, const Tensor& states) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s), ldx = s.ldx, ldf = s.ldf, ldd = s.ldd, F = s.F;
  TORCH_CHECK(states.size(0) == heads && states.size(1) == s.groups() && states.size(2) == size,
              "hedgehog: the states are of another forward pass");
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  Tensor dv = at::empty(v.sizes(), v.options());
  MapGradients<T> gradients_q(queries, s), gradients_k(keys, s);
  const bool tied = keys.shares_weight(queries);
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

  auto divided = [&](const QuerySpace<T>& w, int64_t head, int64_t c) {
    through_division(s, dy, y, d, head, c, centres.data() + head * ldd, w.dys, w.ys, w.dN, w.dd, w.dd_c);
    return right(w.dN, ldd, n, ldd, w.right_dN);
  };
  between_segments<QuerySpace<T>>(s, after, true, [&](const QuerySpace<T>& w, int64_t, int64_t head, int64_t c,
                                                      int64_t end, float* sum) {
    const Map<T> map = queries.map(s, head, w.map.WT);
    for (; c < end; ++c) {
      const int64_t next = (c + 1) * n;
      queries.features(s, w.map, map, head, c, w.map.X, w.QT, Ahead::of(q, head, next), Ahead::of(dy, head, next));
      accumulate(s, w.QT, divided(w, head, c), w.dd, sum);
    }
  });

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<BackwardSpace<T>> w(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      float* dstate = after.mutable_data_ptr<float>() + task * size;
      const float* centre = centres.data() + head * ldd;
      const Map<T> map_q = queries.map(s, head, w.map.WT), map_k = tied ? map_q : keys.map(s, head, w.WT);
      const Right<T> Wq_T = gradients_q.weight(w.through_q, head);
      const Right<T> Wk_T = tied ? Wq_T : gradients_k.weight(w.through_k, head);
      for (int64_t c = s.first_chunk(segment + 1) - 1; c >= s.first_chunk(segment); --c) {
        const int64_t t = c * n, count = s.tokens(c), first = c / GROUP * GROUP, place = c - first;
        if (place == GROUP - 1 || c == s.chunks - 1) {  // entering a group: its keys, values and states, in order
          std::copy_n(states.const_data_ptr<float>() + (head * s.groups() + c / GROUP) * size, size, w.states);
          for (int64_t i = 0; i <= place; ++i) {
            T *KT = w.KTs + i * ldf * n, *V = w.Vs + i * n * ldd;
            const int64_t next = (first + i + 1) * n;
            keys.features(s, w.map, map_k, head, first + i, w.Xs + i * n * ldx, KT, Ahead::of(k, head, next),
                          Ahead::of(v, head, next));
            load(v, head, (first + i) * n, s.tokens(first + i), n, V, ldd);
            if (i == place) break;
            std::copy_n(w.states + i * size, size, w.states + (i + 1) * size);
            accumulate(s, KT, right(V, ldd, n, ldd, w.right_V), nullptr, w.states + (i + 1) * size);
          }
        }
        const T *Xk = w.Xs + place * n * ldx, *KT = w.KTs + place * ldf * n, *V = w.Vs + place * n * ldd;
        const float *state = w.states + place * size, *z = state + F * ldd;
        queries.features(s, w.map, map_q, head, c, w.map.X, w.QT, Ahead::of(q, head, t - n),
                         Ahead::of(dy, head, t - n));
        const Right<T> dN = divided(w, head, c), dNT = right_transposed(w.dN, ldd, n, ldd, w.dNT);
        const Left<T> K = left_transposed(KT, n, F, n, w.K);

        scores_of_keys(s, K, right(w.QT, n, F, n, w.Q), F, nullptr, w.exact, w.AT);
        scores_of_keys(s, left(V, ldd), dNT, ldd, w.dd, w.exact, w.dAT);  // dA^T = triu(V dN^T + 1 dd^T)
        const Right<T> dA_T = right(w.dAT, n, n, n, w.dA_T), dA = right_transposed(w.dAT, n, n, n, w.dA);

        const bool past = State::any(state, s), future = State::any(dstate, s);
        const T* dS = through_rounding(s, dstate, centre, w.dS, w.dz);
        for (int64_t f = 0; f < F; ++f)
          for (int64_t i = 0; i < n; ++i) w.dQT[f * n + i] = z[f] * w.dd_c[i], w.dKT[f * n + i] = w.dz[f];
        if (past)  // dQ^T = S dN^T + z dd^T
          product(w.dQT, n, left(for_rounding(state, s, centre, w.S), ldd), dNT, F, n, ldd, true);
        if (future) {  // dK^T = dS V^T + dz 1^T, dV = K dS
          product(w.dKT, n, left(dS, ldd), right_transposed(V, ldd, n, ldd, w.VT), F, n, ldd, true);
          product(w.dV, ldd, K, right(dS, ldd, F, ldd, w.right_dS), n, ldd, F, false);
        }
        for (int64_t b = 0; b < n; b += BLOCK<T>) {  // + K^T dA^T, + Q^T dA, + A^T dN: of pairs j <= i only
          const int64_t end = std::min(n, b + BLOCK<T>), depth = end - b;
          product(w.dQT + b, n, left(KT + b, n), dA_T.at(b, b), F, n - b, depth, true);
          product(w.dKT, n, left(w.QT + b, n), dA.at(b, 0), F, end, depth, true);
          product(w.dV + b * ldd, ldd, left(w.AT + b * n + b, n), dN.at(b, 0), depth, ldd, n - b, future);
        }
        accumulate(s, w.QT, dN, w.dd, dstate);
        keys.hide(s, head, c, w.dKT);
        store(w.dV, ldd, dv, head, t, count);
        gradients_q.chunk(w.through_q, task, c, Wq_T, w.map.X, w.QT, w.dQT, dq);
        gradients_k.chunk(w.through_k, task, c, Wk_T, Xk, KT, w.dKT, dk);
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

template <class T>
struct ReadSpace {  // what queries need that read one state
  using Number = T;
  MapSpace<T> map;
  T *QT, *Q, *right_S;  // features, and Q and S as products take them
  float *N, *Qz, *mean;
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    map.parts(s, take);
    for (T** p : {&QT, &Q}) take(*p, s.ldf * s.n);
    take(right_S, s.ldf * s.ldd);
    take(N, s.n * s.ldd), take(Qz, s.n), take(mean, s.ldd);
  }
};

// y (B, H, T, D), d (B, H, T) and (S, z) of all keys (B H, State::size). There may be more or fewer keys than queries.
template <class T>
Bidirectional bidirectional_in(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq,
                               const Optional& bq, const Optional& Wk, const Optional& bk, const Optional& mask) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value()), s_k = Sizes::of<T>(k, v, Wq.has_value());
  const int64_t heads = s.B * s.H, n = s.n, size = State::size(s);
  Tensor y = at::empty({s.B, s.H, s.T, s.D}, at::kFloat), d = at::empty({s.B, s.H, s.T}, at::kFloat);
  auto add = [&](const KeySpace<T>& w, int64_t, int64_t head, int64_t c, int64_t end, float* sum) {
    add_keys(w, s_k, keys, v, head, c, end, sum);
  };
  const Tensor states = total(segment_sums<KeySpace<T>>(s_k, 0, s_k.segments, add));

  at::parallel_for(0, heads * s.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<ReadSpace<T>> w(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      const float* state = states.const_data_ptr<float>() + head * size;
      mean_of<T>(state, s, w.mean);
      const Right<T> S = right_of_state(state, s, w.mean, w.right_S);
      const Map<T> map = queries.map(s, head, w.map.WT);
      for (int64_t c = s.first_chunk(segment); c < s.first_chunk(segment + 1); ++c) {
        queries.features(s, w.map, map, head, c, w.map.X, w.QT, Ahead::of(q, head, (c + 1) * n),
                         Ahead::of(y, head, c * n));
        product(w.N, s.ldd, left_transposed(w.QT, n, s.F, n, w.Q), S, n, s.ldd, s.F, false);  // N = Q S
        weigh(state + s.F * s.ldd, w.QT, s.F, n, w.Qz);                                       // d = Q z
        std::copy_n(w.Qz, s.tokens(c), d.mutable_data_ptr<float>() + head * s.T + c * n);
        divide(s, w.Qz, w.Qz, w.mean, w.N, y, head, c * n, s.tokens(c));
      }
    }
  });
  return {y, d, states};
}

using BidirectionalBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
struct QueryGradientSpace : QuerySpace<T> {
  MapGradientSpace<T> through;
  T *dNT, *S;
  float *dQT, *mean;
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    QuerySpace<T>::parts(s, take), through.parts(s, take);
    take(dNT, s.n * s.ldd), take(S, s.ldf * s.ldd), take(dQT, s.ldf * s.n), take(mean, s.ldd);
  }
};

template <class T>
struct KeyGradientSpace : KeySpace<T> {
  MapGradientSpace<T> through;
  T *dS, *right_dS, *K;
  float *dKT, *dV, *mean, *dz;
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    KeySpace<T>::parts(s, take), through.parts(s, take);
    for (T** p : {&dS, &right_dS}) take(*p, s.ldf * s.ldd);
    take(K, s.ldf * s.n), take(dKT, s.ldf * s.n), take(dV, s.n * s.ldd), take(mean, s.ldd), take(dz, s.ldf);
  }
};

// Gradients of q, k, v, Wq, bq, Wk, bk: those of the queries, with dS = Q^T dN and dz = Q^T dd, then those of the keys
template <class T>
BidirectionalBackward bidirectional_backward_in(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Optional& Wq, const Optional& bq, const Optional& Wk,
                                                const Optional& bk, const Optional& mask, const Tensor& y,
                                                const Tensor& d, const Tensor& states) {
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, mask};
  const Sizes s = Sizes::of<T>(q, v, Wq.has_value()), s_k = Sizes::of<T>(k, v, Wq.has_value());
  const int64_t heads = s.B * s.H, size = State::size(s), ldd = s.ldd, n = s.n, n_k = s_k.n;
  TORCH_CHECK(states.size(0) == heads && states.size(1) == size, "hedgehog: the state is of another forward pass");
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  Tensor dv = at::empty(v.sizes(), v.options());
  MapGradients<T> gradients_q(queries, s), gradients_k(keys, s_k);

  auto add = [&](const QueryGradientSpace<T>& w, int64_t task, int64_t head, int64_t c, int64_t end, float* sum) {
    const float *state = states.const_data_ptr<float>() + head * size, *z = state + s.F * ldd;
    mean_of<T>(state, s, w.mean);
    const Left<T> S = left(for_rounding(state, s, w.mean, w.S), ldd);
    const Map<T> map = queries.map(s, head, w.map.WT);
    const Right<T> WT = gradients_q.weight(w.through, head);
    for (; c < end; ++c) {
      const int64_t next = (c + 1) * n;
      queries.features(s, w.map, map, head, c, w.map.X, w.QT, Ahead::of(q, head, next), Ahead::of(dy, head, next));
      through_division(s, dy, y, d, head, c, w.mean, w.dys, w.ys, w.dN, w.dd, w.dd_c);
      for (int64_t f = 0; f < s.F; ++f)
        for (int64_t i = 0; i < n; ++i) w.dQT[f * n + i] = z[f] * w.dd_c[i];
      product(w.dQT, n, S, right_transposed(w.dN, ldd, n, ldd, w.dNT), s.F, n, ldd, true);  // dQ^T = S dN^T + z dd^T
      accumulate(s, w.QT, right(w.dN, ldd, n, ldd, w.right_dN), w.dd, sum);
      gradients_q.chunk(w.through, task, c, WT, w.map.X, w.QT, w.dQT, dq);
    }
  };
  const Tensor dstates = total(segment_sums<QueryGradientSpace<T>>(s, 0, s.segments, add));

  at::parallel_for(0, heads * s_k.segments, 1, [&](int64_t begin, int64_t end) {
    const Workspace<KeyGradientSpace<T>> w(s_k);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / heads, head = task % heads;
      const float* dstate = dstates.const_data_ptr<float>() + head * size;
      mean_of<T>(states.const_data_ptr<float>() + head * size, s, w.mean);
      const T* dS = through_rounding(s, dstate, w.mean, w.dS, w.dz);
      const Right<T> right_dS = right(dS, ldd, s.F, ldd, w.right_dS), WT = gradients_k.weight(w.through, head);
      const Map<T> map = keys.map(s_k, head, w.map.WT);
      for (int64_t c = s_k.first_chunk(segment); c < s_k.first_chunk(segment + 1); ++c) {
        const int64_t next = (c + 1) * n_k;
        keys.features(s_k, w.map, map, head, c, w.map.X, w.KT, Ahead::of(k, head, next), Ahead::of(v, head, next));
        load(v, head, c * n_k, s_k.tokens(c), n_k, w.V, ldd);
        for (int64_t f = 0; f < s.F; ++f) std::fill_n(w.dKT + f * n_k, n_k, w.dz[f]);
        const Right<T> VT = right_transposed(w.V, ldd, n_k, ldd, w.U);
        product(w.dKT, n_k, left(dS, ldd), VT, s.F, n_k, ldd, true);  // dK^T = dS V^T + dz 1^T
        product(w.dV, ldd, left_transposed(w.KT, n_k, s.F, n_k, w.K), right_dS, n_k, ldd, s.F, false);  // dV = K dS
        keys.hide(s_k, head, c, w.dKT);
        store(w.dV, ldd, dv, head, c * n_k, s_k.tokens(c));
        gradients_k.chunk(w.through, task, c, WT, w.map.X, w.KT, w.dKT, dk);
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
                bool keep, bool carry, bool narrow) {
  check(q, k, v, Wq, bq, Wk, bk, S0, z0, mask);
#ifdef __AVX512BF16__
  if (in_bfloat16(q, k, v)) return forward_in<BFloat16>(q, k, v, Wq, bq, Wk, bk, S0, z0, mask, keep, carry, narrow);
#endif
  return forward_in<float>(q, k, v, Wq, bq, Wk, bk, S0, z0, mask, keep, carry, narrow);
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

struct TokenSpace {  // a token's input, features, value and numerator
  using Number = float;
  float *x, *phi_q, *phi_k, *value, *N;
  template <class Take>
  void parts(const Sizes& s, const Take& take) {
    take(x, s.ldx), take(phi_q, 2 * s.ldx), take(phi_k, 2 * s.ldx), take(value, s.ldd), take(N, s.ldd);
  }
};

// One more token for every head after the state S (B, H, F, D), z (B, H, F): y (B, H, 1, D) and the next state
std::tuple<Tensor, Tensor, Tensor> decode(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& Wq,
                                          const Optional& bq, const Optional& Wk, const Optional& bk, const Tensor& S,
                                          const Tensor& z) {
  check(q, k, v, Wq, bq, Wk, bk, S, z, {});
  TORCH_CHECK(q.size(2) == 1, "hedgehog: decode takes one token, not ", q.size(2));
  const Side queries{q, Wq, bq, {}}, keys{k, Wk, bk, {}};
  const Sizes s = Sizes::of<float>(q, v, Wq.has_value());
  const int64_t heads = S.size(0) * S.size(1), F = S.size(2), D = S.size(3);
  Tensor y = at::empty(v.sizes(), at::kFloat), next_S = at::empty_like(S), next_z = at::empty_like(z);
  const float *Ss = S.const_data_ptr<float>(), *zs = z.const_data_ptr<float>();
  float *next_Ss = next_S.mutable_data_ptr<float>(), *next_zs = next_z.mutable_data_ptr<float>();
  float* ys = y.mutable_data_ptr<float>();
  at::parallel_for(0, heads, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, F * D)), [&](int64_t begin, int64_t end) {
    const Workspace<TokenSpace> w(s);
    const float *phi_q = w.phi_q, *phi_k = w.phi_k, *value = w.value;
    float* N = w.N;
    for (int64_t head = begin; head < end; ++head) {
      queries.token(head, w.x, w.phi_q);
      keys.token(head, w.x, w.phi_k);
      load(v, head, 0, 1, 1, w.value, s.ldd);
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

// ---------------------------------------------------------------- what bench.py and experiments/roofline.py measure

template <class T>
void multiply_in(const Tensor& A, const Tensor& B, int64_t times, float* C) {
  const int64_t rows = A.size(0), depth = A.size(1), cols = B.size(1);
  std::vector<T> pairs(depth * cols);
  const Left<T> a = left(A.const_data_ptr<T>(), depth);
  const Right<T> b = right(B.const_data_ptr<T>(), cols, depth, cols, pairs.data());
  for (int64_t i = 0; i < times; ++i) product(C, cols, a, b, rows, cols, depth, false);
}

// A B, `times` times over by every thread: how fast `product` is on matrices in the cache
Tensor multiply(const Tensor& A, const Tensor& B, int64_t times) {
  const bool narrow = in_bfloat16(A, A, B);
  for (const Tensor& x : {A, B})
    TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == (narrow ? at::kBFloat16 : at::kFloat),
                "hedgehog: A, B must be float32, or bfloat16 where the processor multiplies it");
  const int64_t vector = narrow ? ALIGN<BFloat16> : W;
  TORCH_CHECK(A.size(1) == B.size(0) && B.size(1) % vector == 0 && (!narrow || A.size(1) % 2 == 0),
              "hedgehog: A, B must be (m, k), (k, n), n whole vectors");
  Tensor Cs = at::empty({at::get_num_threads(), A.size(0), B.size(1)}, at::kFloat);
  at::parallel_for(0, Cs.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float* C = Cs.mutable_data_ptr<float>() + c * Cs[0].numel();
#ifdef __AVX512BF16__
      if (narrow) multiply_in<BFloat16>(A, B, times, C), at::native::cpublas::brgemm_release();
      else
#endif
      multiply_in<float>(A, B, times, C);
    }
  });
  return Cs[0];
}

template <class T>
void repeat_in(std::string_view part, const Tensor& x, Tensor& to, int64_t times) {
  const int64_t rows = x.size(0), cols = x.size(1);
  const bool of_float = part == "features" || part == "round";
  const float* exact = of_float ? x.const_data_ptr<float>() : nullptr;
  const T* from = of_float ? nullptr : x.const_data_ptr<T>();
  T* into = part == "weigh" ? nullptr : to.mutable_data_ptr<T>();
  std::vector<float> zeros(rows, 0.f), scratch(2 * rows * W);
  for (int64_t t = 0; t < times; ++t) {
    if (part == "features")  // x is u^T
      for (int64_t i = 0; i < cols; i += W)
        Side::hedgehog(exact + i, zeros.data(), rows, cols, scratch.data(), into + i, into + rows * cols + i);
    else if (part == "round") convert(exact, into, rows * cols);
    else if (part == "transpose") transpose(from, cols, into, rows, rows, cols);
    else if (part == "pairs") right(from, cols, rows, cols, into);
    else weigh(zeros.data(), from, rows, cols, to.mutable_data_ptr<float>());
  }
}

// A part of the kernel other than products, alone, `times` times over by one thread, from x (rows, cols) into `to`: of
// whole vectors both ways, which it does not check
void repeat(std::string_view part, const Tensor& x, Tensor to, int64_t times) {
#ifdef __AVX512BF16__
  if (x.scalar_type() == at::kBFloat16 || to.scalar_type() == at::kBFloat16)
    return repeat_in<BFloat16>(part, x, to, times);
#endif
  repeat_in<float>(part, x, to, times);
}

}  // namespace

// fused/compiled.py has what a compiler of PyTorch needs to know of these: shapes, and the gradient of forward
TORCH_LIBRARY(hedgehog, m) {
  auto cpu = [](auto f) { return torch::dispatch(c10::DispatchKey::CPU, f); };
  m.def("multiply(Tensor A, Tensor B, int times) -> Tensor", cpu(multiply));
  m.def("repeat(str part, Tensor x, Tensor(a!) to, int times) -> ()", cpu(repeat));
  m.def("forward(Tensor q, Tensor k, Tensor v, Tensor? Wq, Tensor? bq, Tensor? Wk, Tensor? bk, Tensor? S, Tensor? z, "
        "Tensor? mask, bool keep, bool carry, bool narrow=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        cpu(forward));
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
