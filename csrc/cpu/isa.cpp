// All CPU kernels for one instruction set: compiled once for each, with FDA_ISA its name.
//
// Everything here has internal linkage or lives in the namespace of the instruction set, and no
// header of the C++ library is included: the linker must never merge an inline function compiled
// for AVX-512 with one that a smaller machine runs.
#include "activation.h"
#include "alignment.h"
#include "attention_reverse.h"
#include "gated.h"
#include "kernels.h"
#include "norm_backward.h"
#include "norm_reverse.h"
#include "optimizer.h"
#include "similarity.h"

#define FDA_STRING_(name) #name
#define FDA_STRING(name) FDA_STRING_(name)

namespace fda {
namespace FDA_ISA {

extern const Kernels table = {
    FDA_STRING(FDA_ISA),
    activation_forward,
    activation_slope,
    activation_reverse,
    gated_forward,
    gated_backward,
    gated_tangent,
    gated_reverse,
    norm_forward,
    norm_backward,
    norm_tangent,
    norm_reverse,
    similarity_forward,
    similarity_reverse,
    alignment_dots,
    alignment_mix,
    alignment_coefficients,
    attention_scratch,
    attention_forward,
    attention_backward,
    attention_tangent,
    attention_reverse,
    attention_adjoint,
    adamw_step,
    coefficients_update,
};

}  // namespace FDA_ISA
}  // namespace fda
