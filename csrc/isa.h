// Includes the file FASTREX_LOOPS three times, compiled for three instruction sets into three namespaces.
//
//   namespace fastrex::<op> { ... }     declared by the including file:
//   #define FASTREX_LOOPS "<op>.inl"
//   #include "isa.h"
//
// Never -march: the package runs on another machine than it was built on. Standard headers that the loops need are to be
// included before, outside, so that nothing of the standard library is compiled for more than the baseline.
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define FASTREX_WIDTH 16
#define FASTREX_AVX512 1
namespace avx512 {
#include "simd.h"
#include FASTREX_LOOPS
}  // namespace avx512
#undef FASTREX_WIDTH
#undef FASTREX_AVX512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FASTREX_WIDTH 8
#define FASTREX_AVX2 1
namespace avx2 {
#include "simd.h"
#include FASTREX_LOOPS
}  // namespace avx2
#undef FASTREX_WIDTH
#undef FASTREX_AVX2
#pragma GCC pop_options
#endif
#define FASTREX_WIDTH 4
namespace baseline {
#include "simd.h"
#include FASTREX_LOOPS
}  // namespace baseline
#undef FASTREX_WIDTH
#if !defined(__x86_64__)
namespace avx2 = baseline;
namespace avx512 = baseline;
#endif
