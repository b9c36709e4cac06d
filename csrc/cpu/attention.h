// One key/value head of one sequence in a core's cache: reading, writing, rows of scores.
//
// The query heads that share a key head are stacked: G heads of T tokens are Q = G T rows. Head
// matrices are [Q or T, hp] or transposed [size, tp], score matrices [Q, tp]; hp and tp are size
// and T rounded up to whole vectors. What lies beyond size or T is zero: it is never used, but
// denormal numbers that happen to lie there would slow every product down.
#pragma once

#include "../math.h"
#include "matrix.h"

namespace fda {
namespace FDA_ISA {

struct AttentionLayout {
  int64_t N, T, query, key_value, size;
  int64_t window;  // a token sees this many tokens up to itself; 0: all, before and after
  int64_t rotary;  // columns of each q and k head that are rotated; 0: none
  float scale;
  const float *cos, *sin;  // [T, rotary]

  AttentionLayout(const int64_t* sizes, float scale, const float* cos, const float* sin)
      : N(sizes[0]),
        T(sizes[1]),
        query(sizes[2]),
        key_value(sizes[3]),
        size(sizes[4]),
        window(sizes[5]),
        rotary(sizes[6]),
        scale(scale),
        cos(cos),
        sin(sin) {}
  int64_t group() const { return query / key_value; }
  int64_t Q() const { return group() * T; }
  int64_t hp() const { return padded(size); }
  int64_t tp() const { return padded(T); }
  int64_t packed() const { return (query + 2 * key_value) * size; }
};

// Scratch of one thread, handed out piece by piece.
struct Arena {
  float* next;
  float* take(int64_t count) {
    float* piece = next;
    next += padded(count);
    return piece;
  }
};

// Which head an item of work is: sequence n, key/value head h.
struct AttentionHead {
  AttentionLayout l;
  int64_t n, h;
  int64_t query_column() const { return h * l.group() * l.size; }
  int64_t key_column() const { return (l.query + h) * l.size; }
  int64_t value_column() const { return (l.query + l.key_value + h) * l.size; }
  int64_t scores() const { return (n * l.key_value + h) * l.Q() * l.tp(); }
};

// One head's row turned by its position's angle, or back.
static void rotate_row(const AttentionLayout& l, int64_t t, bool back, float* row) {
  const int64_t half = l.rotary / 2;
  const float* cos = l.cos + t * l.rotary;
  const float* sin = l.sin + t * l.rotary;
  for (int64_t i = 0; i < half; ++i) {
    const float a = row[i], b = row[half + i];
    row[i] = a * cos[i] + b * (back ? sin[half + i] : -sin[i]);
    row[half + i] = b * cos[half + i] + a * (back ? -sin[i] : sin[half + i]);
  }
}

static void zero_beyond(int64_t rows, int64_t used, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = used; i < width; ++i) out[r * width + i] = 0.0f;
  }
}

// The stacked query heads of a packed tensor (rotated), or of an output (plain): [Q, hp].
static float* read_queries(const AttentionHead& head, const float* from, bool from_packed,
                           Arena& arena) {
  const AttentionLayout& l = head.l;
  const int64_t width = from_packed ? l.packed() : l.query * l.size;
  float* out = arena.take(l.Q() * l.hp());
  zero_beyond(l.Q(), l.size, l.hp(), out);
  for (int64_t g = 0; g < l.group(); ++g) {
    for (int64_t t = 0; t < l.T; ++t) {
      float* row = out + (g * l.T + t) * l.hp();
      const float* source =
          from + (head.n * l.T + t) * width + head.query_column() + g * l.size;
      __builtin_memcpy(row, source, l.size * sizeof(float));
      if (from_packed && l.rotary) rotate_row(l, t, false, row);
    }
  }
  return out;
}

// Writes stacked query heads where read_queries found them; a row vector [hp] is added if given.
static void write_queries(const AttentionHead& head, float* rows, bool to_packed,
                          const float* shift, float* to) {
  const AttentionLayout& l = head.l;
  const int64_t width = to_packed ? l.packed() : l.query * l.size;
  for (int64_t g = 0; g < l.group(); ++g) {
    for (int64_t t = 0; t < l.T; ++t) {
      float* row = rows + (g * l.T + t) * l.hp();
      if (to_packed && l.rotary) rotate_row(l, t, true, row);
      float* target = to + (head.n * l.T + t) * width + head.query_column() + g * l.size;
      for (int64_t i = 0; i < l.size; ++i) target[i] = shift ? row[i] + shift[i] : row[i];
    }
  }
}

struct Keys {
  float* rows;  // [T, hp], their mean over tokens taken off
  float* mean;  // [hp]
};

// A key (rotated) or value head of a packed tensor, off its mean: a vector common to all keys, or
// all values, drops out of everything but y and dy, which add the values' mean back.
static Keys read_keys(const AttentionHead& head, const float* from, int64_t column, bool rotated,
                      Arena& arena) {
  const AttentionLayout& l = head.l;
  Keys out{arena.take(l.T * l.hp()), arena.take(l.hp())};
  zero_beyond(l.T, l.size, l.hp(), out.rows);
  for (int64_t i = 0; i < l.hp(); ++i) out.mean[i] = 0.0f;
  for (int64_t t = 0; t < l.T; ++t) {
    float* row = out.rows + t * l.hp();
    __builtin_memcpy(row, from + (head.n * l.T + t) * l.packed() + column, l.size * sizeof(float));
    if (rotated && l.rotary) rotate_row(l, t, false, row);
    for (int64_t i = 0; i < l.size; ++i) out.mean[i] += row[i];
  }
  for (int64_t i = 0; i < l.size; ++i) out.mean[i] /= static_cast<float>(l.T);
  for (int64_t t = 0; t < l.T; ++t) {
    for (int64_t i = 0; i < l.size; ++i) out.rows[t * l.hp() + i] -= out.mean[i];
  }
  return out;
}

static void write_keys(const AttentionHead& head, float* rows, int64_t column, bool rotated,
                       float* to) {
  const AttentionLayout& l = head.l;
  for (int64_t t = 0; t < l.T; ++t) {
    float* row = rows + t * l.hp();
    if (rotated && l.rotary) rotate_row(l, t, true, row);
    __builtin_memcpy(to + (head.n * l.T + t) * l.packed() + column, row, l.size * sizeof(float));
  }
}

// [T, hp] -> [size, tp]
static float* transposed(const AttentionLayout& l, const float* rows, Arena& arena) {
  float* out = arena.take(l.size * l.tp());
  zero_beyond(l.size, l.T, l.tp(), out);
  for (int64_t t = 0; t < l.T; ++t) {
    for (int64_t i = 0; i < l.size; ++i) out[i * l.tp() + t] = rows[t * l.hp() + i];
  }
  return out;
}

// scores [Q, tp] (+)= a [Q, hp] keys^T, the keys transposed
static void scores_of(const AttentionLayout& l, const float* a, const float* keys, float* scores,
                      bool add) {
  matrix_product(l.Q(), l.T, l.size, {a, l.hp(), 1}, keys, l.tp(), scores, l.tp(), add);
}

// out [Q, hp] (+)= scores [Q, tp] rows [T, hp]
static void mix(const AttentionLayout& l, const float* scores, const float* rows, float* out,
                bool add) {
  matrix_product(l.Q(), l.size, l.T, {scores, l.tp(), 1}, rows, l.hp(), out, l.hp(), add);
}

// out [T, hp] (+)= scores^T [T, Q] rows [Q, hp]
static void mix_back(const AttentionLayout& l, const float* scores, const float* rows, float* out,
                     bool add) {
  matrix_product(l.T, l.size, l.Q(), {scores, 1, l.tp()}, rows, l.hp(), out, l.hp(), add);
}

// The tokens that the query of row r may look at: [first, last).
struct Sight {
  int64_t first, last;
  Sight(const AttentionLayout& l, int64_t r) : first(0), last(l.T) {
    if (!l.window) return;
    const int64_t t = r % l.T;
    last = t + 1;
    first = last > l.window ? last - l.window : 0;
  }
};

// sum p a over one row, in float64: where p is nearly one-hot, a at its peak nearly equals the sum
static double mean_under(int64_t T, const float* __restrict__ p, const float* __restrict__ a) {
  double mean = 0.0;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < T; ++i) mean += static_cast<double>(p[i]) * a[i];
  return mean;
}

// a -= sum p a, over one row of T
static void off_mean(int64_t T, const float* __restrict__ p, float* __restrict__ a) {
  const double mean = mean_under(T, p, a);
#pragma omp simd
  for (int64_t i = 0; i < T; ++i) a[i] = static_cast<float>(a[i] - mean);
}

}  // namespace FDA_ISA
}  // namespace fda
