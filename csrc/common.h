// What the operators of csrc/ share: the choice of an instruction set at run time, and small helpers around torch.
//
// Every operator keeps its loops in <op>.inl, which <op>.cpp includes once per instruction set through isa.h; the rest of
// the file (checks, allocation, fastrex::parallel_for, registration) is compiled once, for the baseline.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <omp.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrex {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this CPU; FASTREX_ISA=baseline|avx2|avx512 lowers it (for tests).
inline Isa isa() {
  static const Isa found = [] {
    Isa best = Isa::baseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    if (const char* wanted = std::getenv("FASTREX_ISA")) {
      if (!std::strcmp(wanted, "baseline")) best = Isa::baseline;
      if (!std::strcmp(wanted, "avx2") && best == Isa::avx512) best = Isa::avx2;
    }
    return best;
  }();
  return found;
}

// How many threads this thread's loops take, as torch.set_num_threads has set it.
//
// at::parallel_for asks once per thread, and that question sets the thread back to the process's default; whether it
// has been asked is known per library. A thread that had set its own number (a data loader's) would lose it here.
inline int num_threads() {
  static thread_local const bool asked = [] {
    const int own = at::get_num_threads();
    at::internal::lazy_init_num_threads();
    omp_set_num_threads(own);
    return true;
  }();
  (void)asked;
  return at::get_num_threads();
}

// at::parallel_for with the number of threads that the calling thread has set.
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  num_threads();
  at::parallel_for(begin, end, grain, body);
}

// Stores past the cache are weakly ordered: other threads must see them before this one says that it is done.
inline void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fastrex

// Calls NAME(...) of the namespace that holds the loops for this CPU.
#define FASTREX_DISPATCH(NAME, ...)                                              \
  (::fastrex::isa() == ::fastrex::Isa::avx512 ? avx512::NAME(__VA_ARGS__)        \
   : ::fastrex::isa() == ::fastrex::Isa::avx2 ? avx2::NAME(__VA_ARGS__)          \
                                              : baseline::NAME(__VA_ARGS__))
