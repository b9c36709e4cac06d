// Loops over OpenMP threads. The caller says how many: as many as torch uses.
#pragma once

#include <stdint.h>


namespace fda {
namespace FDA_ISA {

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(i) for i in [0, n), in contiguous shares; one thread where fewer than `grain` each remain.
template <typename F>
inline void parallel_for(int64_t n, int64_t grain, int threads, const F& f) {
  const int wanted = static_cast<int>(at_most(threads, ceil_div(n, grain)));
  if (wanted <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(wanted)
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace FDA_ISA
}  // namespace fda
