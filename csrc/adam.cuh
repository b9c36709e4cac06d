// Adam's constants inside a kernel, from a step that the host or the device knows.
#pragma once

#include "adam.h"
#include "launchers.cuh"

namespace fda {
namespace cuda {

// 1 - beta^step is -expm1(step log beta): 1 - 0.999^1 keeps its digits in float32.
__device__ __forceinline__ Adam constants(const AdamArguments& a) {
  Adam out{a.beta2, a.gain1, a.gain2, a.step_size, a.root, a.eps};
  if (a.step) {
    const float step = static_cast<float>(*a.step);
    out.step_size = a.lr / -expm1f(step * a.log_beta1);
    out.root = __fsqrt_rn(-expm1f(step * a.log_beta2));
  }
  return out;
}

}  // namespace cuda
}  // namespace fda
