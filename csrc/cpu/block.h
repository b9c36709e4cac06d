// Blocks of a long vector: small enough for the first-level cache, with stand-ins for nulls.
#pragma once

#include <stdint.h>

#include "parallel.h"

namespace fda {
namespace FDA_ISA {

constexpr int64_t kBlock = 1024;
// A thread is worth waking for this many blocks.
constexpr int64_t kGrain = 16;

alignas(64) static const float kZeros[kBlock] = {};

struct Ones {
  alignas(64) float value[kBlock] = {};
  constexpr Ones() {
    for (int64_t i = 0; i < kBlock; ++i) value[i] = 1.0f;
  }
};
static constexpr Ones kOnes;

// Element `at` of an input, or zeros if it is null.
inline const float* input(const float* p, int64_t at) { return p ? p + at : kZeros; }

// Element `at` of a factor, or ones if it is null.
inline const float* factor(const float* p, int64_t at) { return p ? p + at : kOnes.value; }

// f(at, len) for every block of a row of n elements.
template <typename F>
inline __attribute__((always_inline)) void for_blocks(int64_t n, const F& f) {
  for (int64_t at = 0; at < n; at += kBlock) f(at, at_most(kBlock, n - at));
}

// Element `at` of an output, or scratch if nobody wants it.
inline float* output(float* p, int64_t at, float* scratch) { return p ? p + at : scratch; }

}  // namespace FDA_ISA
}  // namespace fda

// One function template over kinds becomes one call by number.
#define FDA_BY_KIND(kind, function, ...)                                       \
  switch (static_cast<::fda::Kind>(kind)) {                                    \
    case ::fda::Kind::gelu: return function<::fda::Kind::gelu>(__VA_ARGS__);   \
    case ::fda::Kind::gelu_tanh:                                               \
      return function<::fda::Kind::gelu_tanh>(__VA_ARGS__);                    \
    case ::fda::Kind::quick_gelu:                                              \
      return function<::fda::Kind::quick_gelu>(__VA_ARGS__);                   \
    case ::fda::Kind::silu: return function<::fda::Kind::silu>(__VA_ARGS__);   \
    case ::fda::Kind::relu: return function<::fda::Kind::relu>(__VA_ARGS__);   \
  }
