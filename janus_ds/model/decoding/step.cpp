// All layers of the encoder, or of the decoder over the rows of one pass; and products with packed weights.
//
// Plain C interface, called through ctypes (native_step.py). GCC's vector types (also clang's) carry the
// arithmetic, each as wide as a register (GCC keeps wider ones in memory, which takes most of the time). It is compiled
// for the machine it runs on; only bf16 and int8 products name instructions.
//
// Letters: B sentences (of NAR and AUX: their length candidates), R content rows of a sentence, Q rows of a sentence (R,
// or 2R with query rows), N columns of the pool, S source tokens, D width, H heads, E width of a head. Rows stand as all
// content rows, sentence by sentence, then all query rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE, NEON
#endif
constexpr int PANEL = 32;  // outputs whose weights stand side by side
constexpr int PARTS = PANEL / LANES;
constexpr int TILE = LANES == 16 ? 12 : 3;  // rows whose sums stay in registers
constexpr int INT8_STEP = 16;  // to a multiple of it the inputs of int8 products are padded
#if defined(__AVX512VNNI__)
constexpr int ZERO_POINT = 128;  // its instruction takes unsigned activations
#else
constexpr int ZERO_POINT = 0;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint32_t LooseWords __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

using Bf16 = uint16_t;
using Int8 = int8_t;

Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
Floats load(const Bf16* p) {
  Words wide = __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Words) << 16;
  return reinterpret_cast<Floats>(wide);
}
void store(float* p, Floats x) { *reinterpret_cast<LooseFloats*>(p) = x; }
void put(float* to, float x) { *to = x; }
void put(Bf16* to, float x) {  // rounds to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}
Floats largest(Floats a, Floats b) { return a > b ? a : b; }
Floats magnitude(Floats x) { return largest(x, -x); }
template <class Combine> float fold(Floats x, Combine combine) {
  float parts[LANES];
  std::memcpy(parts, &x, sizeof parts);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) parts[i] = combine(parts[i], parts[i + width]);
  return parts[0];
}
float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  return fold(x, [](float a, float b) { return a + b; });
#endif
}

// e^x to 2 units of the last place: 2^n by the exponent's bits, the rest by its Taylor series.
Floats exponential(Floats x) {
  x = largest(x, Floats{} - 87.0f);
  Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * reinterpret_cast<Floats>(power);
}

// x (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz and Stegun 7.1.26, within 1.5e-7.
Floats gelu(Floats x) {
  Floats z = magnitude(x) * 0.70710678f, t = 1.0f / (z * 0.3275911f + 1.0f);
  Floats p = t * 1.061405429f - 1.453152027f;
  for (float c : {1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
  Floats erf = 1.0f - p * t * exponential(-z * z);
  return x * 0.5f * (1.0f + (x < 0 ? -erf : erf));
}

}  // namespace

extern "C" {
enum Activation : int64_t { NONE, RELU, GELU };
struct Matrix {  // weights of `out` outputs, in panels; see packed() in native_step.py
  const void* weight;
  const float *scale, *sum, *bias;  // scale and sum of int8 alone; bias may be null
  int64_t in, out;
};
struct Norm {
  const float *weight, *bias;
};
struct Layer {
  Matrix qkv, self_out, cross_query, cross_out, inner, outer;  // of an encoder: cross_query has no outputs
  Norm self_norm, cross_norm, outer_norm;
  void *keys, *values;                             // (B, H, N, E) of the pool
  const void *source_keys, *source_values;         // (B / share, H, S, E)
};
struct Step {
  int64_t sentences, content, queries, columns, end, source, width, heads;  // B, R, Q - R, N, end, S, D, H
  int64_t layers, activation, threads, share, mask_rows, picks;
  double epsilon;
  const int64_t* column;    // (B, R) columns that the content rows take; null: the last ones before `end`
  const float* mask;        // (B, mask_rows = Q or 1, end) additive; null: all columns are seen
  const uint8_t* valid;     // (B / share, S) source tokens that are no padding
  const int64_t* picked;    // `picks` rows, ascending, that the last layer computes; null: query rows, if any, or all
};
}

namespace {

// Products

// Rows as a product takes them, each `step` wide: bf16 and int8 weights are multiplied by codes of their kind, which
// stand in words of 4 bytes; the scale of int8 is the largest magnitude of a row.
template <class W> struct Input {
  const float* x;
  int64_t step;
  Input(const float* x, int64_t, int64_t in) : x(x), step(in) {}
};
template <> struct Input<Bf16> {
  int64_t step;
  std::vector<Bf16> codes;
  const Bf16* x;
  Input(const float* from, int64_t rows, int64_t in) : step(in + in % 2), codes(rows * step), x(codes.data()) {
    for (int64_t r = 0; r < rows; r++, from += in)
      for (int64_t i = 0; i < in; i++) put(&codes[r * step + i], from[i]);
  }
};
template <> struct Input<Int8> {
  int64_t step;
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  const uint8_t* x;
  Input(const float* from, int64_t rows, int64_t in)
      : step((in + INT8_STEP - 1) / INT8_STEP * INT8_STEP), codes(rows * step), scale(rows), x(codes.data()) {
    for (int64_t r = 0; r < rows; r++, from += in) {
      auto part = [&](int64_t i) {
        Floats some = {};
        if (i + LANES <= in) return load(from + i);
        std::memcpy(&some, from + i, (in - i) * sizeof(float));
        return some;
      };
      Floats most = {};
      for (int64_t i = 0; i < in; i += LANES) most = largest(magnitude(part(i)), most);
      scale[r] = std::max(fold(most, [](float a, float b) { return a > b ? a : b; }), 1e-12f);
      float levels = 127.0f / scale[r];
      for (int64_t i = 0; i < in; i += LANES) {
        Floats rounded = (part(i) * levels + 12582912.0f) - 12582912.0f;
        Bytes code = __builtin_convertvector(__builtin_convertvector(rounded, Ints) + ZERO_POINT, Bytes);
        std::memcpy(&codes[r * step + i], &code, LANES);
      }
    }
  }
};

// sums += products of LANES words of weights and one of a row.
Floats dot(Floats sums, const float* weight, const float* x) { return sums + load(weight) * *x; }
Floats dot(Floats sums, const Bf16* weight, const Bf16* x) {
  uint32_t two;
  std::memcpy(&two, x, 4);
#if defined(__AVX512BF16__)
  __m512bh w = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weight));
  __m512bh x2 = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
  return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), w, x2));
#else
  Words pairs = *reinterpret_cast<const LooseWords*>(weight), x2 = Words{} + two;
  sums += reinterpret_cast<Floats>(pairs << 16) * reinterpret_cast<Floats>(x2 << 16);
  return sums + reinterpret_cast<Floats>(pairs & 0xffff0000u) * reinterpret_cast<Floats>(x2 & 0xffff0000u);
#endif
}
Ints dot(Ints sums, const Int8* weight, const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
  __m512i w = _mm512_loadu_si512(weight);
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), _mm512_set1_epi32(four), w));
#elif defined(__AVX2__)
  __m256i part[LANES / 8], x8 = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
  std::memcpy(part, &sums, sizeof part);
  for (int i = 0; i < LANES / 8; i++) {  // |w| and x with w's sign: pairs of products fit 16 bits, codes are at most 127
    __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight) + i);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x8, w));
    part[i] = _mm256_add_epi32(part[i], _mm256_madd_epi16(pairs, one));
  }
  std::memcpy(&sums, part, sizeof part);
  return sums;
#else
  for (int o = 0; o < LANES; o++)
    for (int i = 0; i < 4; i++) sums[o] += weight[4 * o + i] * static_cast<int8_t>(x[i]);
  return sums;
#endif
}

template <class W> Floats dequantized(const Matrix&, const Input<W>&, int64_t, int64_t, Floats sums) { return sums; }
Floats dequantized(const Matrix& m, const Input<Int8>& input, int64_t r, int64_t o, Ints sums) {
  Ints zero = *reinterpret_cast<const LooseInts*>(m.sum + o) * ZERO_POINT;
  return __builtin_convertvector(sums - zero, Floats) * load(m.scale + o) * input.scale[r];
}

// y (rows, last - first) = activation(outputs [first, last) of the rows); `first` is a multiple of PANEL.
template <class W> struct Product {
  using Sums = std::conditional_t<std::is_same_v<W, Int8>, Ints, Floats>;
  const Matrix& m;
  const Input<W>& input;
  int64_t first, last, activation;
  float* y;

  // One piece of code for tiles of any height, which rounds alike in all: a row's result is its own.
  __attribute__((noinline)) Floats finished(Sums sums, int64_t r, int64_t o) const {
    Floats f = dequantized(m, input, r, o, sums);
    if (m.bias) f += load(m.bias + o);
    if (activation == RELU) f = f < 0 ? Floats{} : f;
    return activation == GELU ? gelu(f) : f;
  }

  // C rows from r on times the panel from output o on.
  template <int C> void tile(int64_t r, int64_t o) const {
    constexpr int64_t word = 4 / sizeof(W);
    Sums sums[C][PARTS] = {};
    const W* weight = static_cast<const W*>(m.weight) + o * input.step;
    auto x = input.x + r * input.step;
    for (int64_t i = 0; i < input.step; i += word, weight += word * PANEL) {
#pragma GCC unroll 16
      for (int c = 0; c < C; c++)
#pragma GCC unroll 16
        for (int p = 0; p < PARTS; p++)
          sums[c][p] = dot(sums[c][p], weight + word * LANES * p, x + c * input.step + i);
    }
    for (int c = 0; c < C; c++) {
      float out[PANEL];
      for (int p = 0; p < PARTS; p++) store(out + p * LANES, finished(sums[c][p], r + c, o + p * LANES));
      std::copy_n(out, std::min<int64_t>(PANEL, last - o), y + (r + c) * (last - first) + o - first);
    }
  }

  template <int C = TILE> void rows(int64_t r, int64_t count, int64_t o) const {
    if (count >= C) {
      tile<C>(r, o);
      if (count > C) rows<TILE>(r + C, count - C, o);
    } else if constexpr (C > 1) {
      rows<C - 1>(r, count, o);
    }
  }
};

template <class W>
void multiply(const Matrix& m, int64_t first, int64_t last, const Input<W>& input, int64_t rows, float* y,
              int64_t activation, int64_t threads) {
  const Product<W> product{m, input, first, last, activation, y};
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t o = first; o < last; o += PANEL) product.rows(0, rows, o);
}

// Layers

// x = norm(x + change)
void add_and_norm(const Norm& norm, const float* change, float* x, int64_t rows, int64_t width, float epsilon) {
  for (int64_t r = 0; r < rows; r++, x += width, change += width) {
    Floats total = {}, square = {};
    for (int64_t i = 0; i < width; i += LANES) {
      Floats v = load(x + i) + load(change + i);
      store(x + i, v);
      total += v;
    }
    float mean = sum(total) / width;
    for (int64_t i = 0; i < width; i += LANES) {
      Floats v = load(x + i) - mean;
      square += v * v;
    }
    float inverse = 1.0f / std::sqrt(sum(square) / width + epsilon);
    for (int64_t i = 0; i < width; i += LANES)
      store(x + i, (load(x + i) - mean) * inverse * load(norm.weight + i) + load(norm.bias + i));
  }
}

// One row and one head: out (E) = softmax(q k^T / sqrt(E)) v over the columns listed. `score` has room for them.
template <class T>
void attend(const float* q, const T* keys, const T* values, const int32_t* seen, int64_t count, int64_t width, float* score,
            float* out) {
  float factor = 1.0f / std::sqrt(static_cast<float>(width)), most = -INFINITY;
  for (int64_t j = 0; j < count; j++) {
    const T* key = keys + seen[j] * width;
    Floats products = {};
    for (int64_t e = 0; e < width; e += LANES) products += load(q + e) * load(key + e);
    score[j] = sum(products) * factor;
    most = std::max(most, score[j]);
  }
  for (int64_t j = count; j % LANES; j++) score[j] = -INFINITY;
  Floats total = {};
  for (int64_t j = 0; j < count; j += LANES) {
    Floats weight = load(score + j) == -INFINITY ? Floats{} : exponential(load(score + j) - most);
    store(score + j, weight);
    total += weight;
  }
  float share = 1.0f / sum(total);
  for (int64_t e = 0; e < width; e += 2 * LANES) {
    bool both = e + LANES < width;
    Floats low = {}, high = {};
    for (int64_t j = 0; j < count; j++) {
      const T* value = values + seen[j] * width + e;
      low += load(value) * score[j];
      if (both) high += load(value + LANES) * score[j];
    }
    store(out + e, low * share);
    if (both) store(out + e + LANES, high * share);
  }
}

// Columns that each row sees, one after the other.
struct Seen {
  std::vector<int32_t> columns;
  std::vector<int64_t> start = {0};
  void close() { start.push_back(columns.size()); }
  const int32_t* of(int64_t list) const { return columns.data() + start[list]; }
  int64_t count(int64_t list) const { return start[list + 1] - start[list]; }
};

template <class W> class Layers {
  using T = std::conditional_t<std::is_same_v<W, Bf16>, Bf16, float>;  // of keys and values
  static constexpr int64_t BLOCK = 16;  // rows that a thread takes at a time: neighbours share keys
  const Step& s;
  const int64_t head_width = s.width / s.heads, content = s.sentences * s.content,
                rows = s.sentences * (s.content + s.queries);
  Seen past, source;
  std::vector<int64_t> asked;  // rows that are computed
  std::vector<float> x, q, kv, attended, change, inner;

  // The sentence of a row, and its place among the Q rows of the sentence.
  std::pair<int64_t, int64_t> place(int64_t row) const {
    int64_t query = row >= content, inside = row - query * content;
    return {inside / s.content, inside % s.content + query * s.content};
  }

  // Attention to keys and values (B or B / share, H, stride, E): of the pool, or of the source.
  void attend_rows(const void* keys, const void* values, int64_t stride, bool crossing) {
    int64_t count = asked.size(), pairs = (count + BLOCK - 1) / BLOCK * s.heads;
    const Seen& seen = crossing ? source : past;
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t pair = 0; pair < pairs; pair++) {
      int64_t h = pair % s.heads, start = pair / s.heads * BLOCK;
      std::vector<float> score(stride + LANES);
      for (int64_t i = start; i < std::min(start + BLOCK, count); i++) {
        int64_t b = place(asked[i]).first / (crossing ? s.share : 1), list = crossing ? b : asked[i];
        int64_t at = i * s.width + h * head_width, offset = (b * s.heads + h) * stride * head_width;
        attend(&q[at], static_cast<const T*>(keys) + offset, static_cast<const T*>(values) + offset, seen.of(list),
               seen.count(list), head_width, score.data(), &attended[at]);
      }
    }
  }

  void keep(const Layer& layer) {
    for (int64_t row = 0; row < content; row++) {
      int64_t b = row / s.content, r = row % s.content;
      int64_t column = s.column ? s.column[row] : s.end - s.content + r;
      for (int64_t h = 0; h < s.heads; h++) {
        const float* from = &kv[row * 2 * s.width + h * head_width];
        int64_t to = ((b * s.heads + h) * s.columns + column) * head_width;
        for (int64_t e = 0; e < head_width; e++) {
          put(static_cast<T*>(layer.keys) + to + e, from[e]);
          put(static_cast<T*>(layer.values) + to + e, from[s.width + e]);
        }
      }
    }
  }

  // From now on only the rows that are wanted of the last layer.
  void choose() {
    if (s.picked) asked.assign(s.picked, s.picked + s.picks);
    else if (s.queries) asked.erase(asked.begin(), asked.begin() + content);
    for (size_t i = 0; i < asked.size(); i++)
      if (asked[i] != static_cast<int64_t>(i)) std::copy_n(&x[asked[i] * s.width], s.width, &x[i * s.width]);
  }

  void multiplied(const Matrix& m, int64_t last, const std::vector<float>& from, int64_t activation, std::vector<float>& to) {
    int64_t n = asked.size();
    multiply<W>(m, 0, last, Input<W>(from.data(), n, m.in), n, to.data(), activation, s.threads);
  }

  void sublayer(const Matrix& m, const Norm& norm, const std::vector<float>& from) {
    multiplied(m, m.out, from, NONE, change);
    add_and_norm(norm, change.data(), x.data(), asked.size(), s.width, s.epsilon);
  }

 public:
  // hidden (B, Q, D): the rows that enter; those that leave stand at its beginning.
  Layers(const Step& step, const Layer* layers, float* hidden) : s(step), asked(rows) {
    int64_t per = s.content + s.queries;
    for (auto* part : {&x, &q, &attended, &change}) part->resize(rows * s.width);
    kv.resize(content * 2 * s.width);
    inner.resize(rows * layers[0].inner.out);
    for (int64_t row = 0; row < rows; row++) {
      auto [b, i] = place(row);
      const float* mask = s.mask ? s.mask + (b * s.mask_rows + i % s.mask_rows) * s.end : nullptr;
      for (int64_t n = 0; n < s.end; n++)
        if (!mask || mask[n] == 0.0f) past.columns.push_back(n);
      past.close();
      asked[row] = row;
      std::copy_n(hidden + (b * per + i) * s.width, s.width, &x[row * s.width]);
    }
    for (int64_t b = 0; b < s.sentences / s.share; b++) {
      for (int64_t n = 0; n < s.source; n++)
        if (s.valid[b * s.source + n]) source.columns.push_back(n);
      source.close();
    }
    for (const Layer* layer = layers; layer < layers + s.layers; layer++) {
      const Input<W> all(x.data(), content, s.width);
      multiply<W>(layer->qkv, s.width, 3 * s.width, all, content, kv.data(), NONE, s.threads);
      keep(*layer);
      if (layer == layers + s.layers - 1) choose();
      multiplied(layer->qkv, s.width, x, NONE, q);
      attend_rows(layer->keys, layer->values, s.columns, false);
      sublayer(layer->self_out, layer->self_norm, attended);
      if (layer->cross_query.out) {
        multiplied(layer->cross_query, s.width, x, NONE, q);
        attend_rows(layer->source_keys, layer->source_values, s.source, true);
        sublayer(layer->cross_out, layer->cross_norm, attended);
      }
      multiplied(layer->inner, layer->inner.out, x, s.activation, inner);
      sublayer(layer->outer, layer->outer_norm, inner);
    }
    std::copy_n(x.data(), asked.size() * s.width, hidden);
  }
};

}  // namespace

extern "C" {
enum Kind : int64_t { FLOAT, BF16, INT8 };

// hidden (B, Q, D): the rows that enter the first layer; those that leave the last one, (P, D), stand at its beginning.
void janus_step(const Step* step, const Layer* layers, int64_t kind, float* hidden) {
  if (kind == FLOAT) Layers<float>(*step, layers, hidden);
  if (kind == BF16) Layers<Bf16>(*step, layers, hidden);
  if (kind == INT8) Layers<Int8>(*step, layers, hidden);
}

// y (rows, out) = activation(x W^T + b)
void janus_product(const Matrix* m, int64_t kind, const float* x, int64_t rows, float* y, int64_t activation,
                   int64_t threads) {
  if (kind == FLOAT) multiply<float>(*m, 0, m->out, Input<float>(x, rows, m->in), rows, y, activation, threads);
  if (kind == BF16) multiply<Bf16>(*m, 0, m->out, Input<Bf16>(x, rows, m->in), rows, y, activation, threads);
  if (kind == INT8) multiply<Int8>(*m, 0, m->out, Input<Int8>(x, rows, m->in), rows, y, activation, threads);
}
}
