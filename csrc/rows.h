// Rows of features in any of the three dtypes, as the loops see them: plain pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastrex {

enum class Kind { f32, bf16, f16 };

// Elements of a row are adjacent; ``stride`` counts elements.
struct Matrix {
  const char* data = nullptr;
  int64_t stride = 0;
  Kind kind = Kind::f32;
  int64_t size() const { return kind == Kind::f32 ? 4 : 2; }
  const char* row(int64_t r) const { return data + r * stride * size(); }
};

inline Kind kind_of(const char* op, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Kind::f32;
    case at::kBFloat16: return Kind::bf16;
    case at::kHalf: return Kind::f16;
    default: TORCH_CHECK_VALUE(false, op, ": takes float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

inline at::Tensor adjacent(const at::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

inline Matrix matrix(const char* op, const at::Tensor& t) {
  return {(const char*)t.const_data_ptr(), t.stride(0), kind_of(op, t)};
}

}  // namespace fastrex
