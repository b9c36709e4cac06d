// Products of matrices small enough for the cache of one core.
#pragma once

#include <stdint.h>

#include "block.h"

namespace fda {
namespace FDA_ISA {

// Vector length, rows and vectors of one tile of sums held in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
#else
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;
#endif

typedef float Vector
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

// Leading dimensions are multiples of this, so that rows are whole vectors.
constexpr int64_t kPad = 16;

inline int64_t padded(int64_t n) { return ceil_div(n, kPad) * kPad; }

// The left operand of a product: element (i, p) at data[i * row + p * column].
struct Left {
  const float* data;
  int64_t row, column;
};

template <int Rows, int Vectors>
static inline __attribute__((always_inline)) void matrix_tile(int64_t K, const Left& a,
                                                              const float* b, int64_t ldb,
                                                              float* c, int64_t ldc, bool add) {
  Vector sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Vectors; ++j) {
      const Vector* old = reinterpret_cast<const Vector*>(c + i * ldc) + j;
      sum[i][j] = add ? *old : Vector{};
    }
  }
  for (int64_t p = 0; p < K; ++p) {
    const Vector* row = reinterpret_cast<const Vector*>(b + p * ldb);
    const float* column = a.data + p * a.column;
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const float scale = column[i * a.row];
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) sum[i][j] += scale * row[j];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Vectors; ++j) {
      reinterpret_cast<Vector*>(c + i * ldc)[j] = sum[i][j];
    }
  }
}

template <int Vectors>
static void matrix_columns(int64_t M, int64_t K, Left a, const float* b, int64_t ldb, float* c,
                           int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= M; i += kTileRows) {
    matrix_tile<kTileRows, Vectors>(K, a, b, ldb, c, ldc, add);
    a.data += kTileRows * a.row;
    c += kTileRows * ldc;
  }
  for (; i < M; ++i) {
    matrix_tile<1, Vectors>(K, a, b, ldb, c, ldc, add);
    a.data += a.row;
    c += ldc;
  }
}

// c [M, N] = a [M, K] b [K, N], added to c if `add`. N is rounded up to whole vectors: rows of b
// and c must extend to a multiple of kPad.
static void matrix_product(int64_t M, int64_t N, int64_t K, const Left& a, const float* b,
                           int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t vectors = ceil_div(N, kLanes);
  while (vectors > 0) {
    if (vectors >= kTileVectors) {
      matrix_columns<kTileVectors>(M, K, a, b, ldb, c, ldc, add);
      vectors -= kTileVectors;
      b += kTileVectors * kLanes;
      c += kTileVectors * kLanes;
    } else {
      matrix_columns<1>(M, K, a, b, ldb, c, ldc, add);
      vectors -= 1;
      b += kLanes;
      c += kLanes;
    }
  }
}

}  // namespace FDA_ISA
}  // namespace fda
