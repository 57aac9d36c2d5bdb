// What the convolutions of csrc/ share: which CPUs they are for, and which outputs a tap of the kernel reaches.
//
// They are written for one instruction set only, vdpbf16ps of AVX512-BF16, and are registered only on CPUs that have it
// and no AMX: elsewhere the library's convolutions are as good or better. Python asks the dispatcher what is there.
#pragma once

#include "common.h"

#include <algorithm>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastrex::conv {

// Whether this CPU multiplies pairs of bfloat16 by AVX-512 and not by tiles, in which oneDNN is far ahead.
// FASTREX_ISA=baseline|avx2 says no; FASTREX_ISA=avx512 leaves the tiles of a CPU that has them unused (for tests).
inline bool bf16_products() {
#if defined(__x86_64__)
  static const bool found = [] {
    if (isa() != Isa::avx512 || !__builtin_cpu_supports("avx512bf16")) return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
    const char* wanted = std::getenv("FASTREX_ISA");
    return !tiles || (wanted && !std::strcmp(wanted, "avx512"));
  }();
  return found;
#else
  return false;
#endif
}

inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// The outputs [first, last) of `outputs` whose tap `tap` (along one axis) lies on one of the `size` inputs; output p
// meets input p * stride + tap - padding.
struct Span {
  int64_t first, last;
};
inline Span reached(int64_t tap, int64_t size, int64_t outputs, int64_t stride, int64_t padding) {
  const int64_t shift = padding - tap;
  const int64_t first = shift > 0 ? (shift + stride - 1) / stride : 0;
  const int64_t end = size - 1 + shift;  // the largest p * stride
  const int64_t last = end < 0 ? 0 : std::min(outputs, end / stride + 1);
  return {first, std::max(first, last)};
}

}  // namespace fastrex::conv
