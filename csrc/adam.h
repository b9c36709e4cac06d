// One update of Adam on one value, shared by the CPU and CUDA.
#pragma once

#include "math.h"

namespace fda {

struct Adam {
  // gain = 1 - beta, formed in float64: from a float32 beta it would be off by 1e-5 of itself.
  float beta2, gain1, gain2, step_size, root, eps;
};

FDA_FN float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FDA_FN void moments(const Adam& a, float grad, float& avg, float& avg_sq) {
  avg += a.gain1 * (grad - avg);
  avg_sq = a.beta2 * avg_sq + a.gain2 * grad * grad;
}

// The new value; the moments are updated. torch's order of operations.
FDA_FN float adam(const Adam& a, float value, float grad, float& avg, float& avg_sq) {
  moments(a, grad, avg, avg_sq);
  return value - a.step_size * (avg / (square_root(avg_sq) / a.root + a.eps));
}

// The same for a gradient that is grad * t with t constant over the steps, from the moments of grad:
// its own are t * avg and t^2 * avg_sq. deviation is sqrt(avg_sq) / root.
FDA_FN float scaled_adam(const Adam& a, float value, float t, float avg, float deviation) {
  return value - a.step_size * (t * avg / (__builtin_fabsf(t) * deviation + a.eps));
}

}  // namespace fda
