// crop_resize_: out[n] = Pillow's crop of a box, then resize to S x S with its antialiased cubic filter, to the bit.
//
//   c[x, i] = round(2^22 * w[x, i] / sum_j w[x, j]),  w[x, i] = cubic((i - centre[x] + 0.5) / max(scale, 1)),  a = -0.5
//   pass(v)[x] = clip((2^21 + sum_i c[x, i] * v[i]) >> 22)      along the rows, and of its bytes along the columns
//
// A thread makes whole crops, those of one image after another. A crop reads its box once and writes its output once;
// coefficients, a block of rows and the window between the two passes are scratch memory that the thread keeps. A pass
// that keeps the size is the identity: Pillow skips it, here its coefficients are 2^22. Pillow before 13 always begins
// with the rows, as here; since then it begins with the columns where it takes that for less work.
#include "common.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrex::crop_resize {

constexpr int PRECISION = 22;

// One direction of a crop: `length` pixels become `size`.
struct Axis {
  int64_t length, size;
  int64_t padded;  // outputs in the tables, the last ones repeated
  int64_t taps;    // the most that an output has
  int64_t groups;  // the most groups of four pixels, from a multiple of four on, that an output reads
  int64_t stride;  // of `fixed`
  double* centre;
  int32_t *start, *count;  // first tap, number of taps
  int32_t* fixed;          // [padded, stride] coefficients, from a multiple of four on
  int32_t* factor;         // [padded, groups, 4] as the loops multiply by them
};

// One crop and the memory that it works in.
struct Job {
  const uint8_t *source, *end;  // first pixel of the box; end of the image's memory
  int64_t stride;               // bytes from row to row
  uint8_t* out;
  Axis x, y;
  double* weight;
  int32_t* block;
  uint8_t *rows, *ring;
  int64_t pitch;  // bytes of one row quad of the ring
  const int32_t** quads;
};

#define FASTREX_LOOPS "crop_resize.inl"
#include "isa.h"

// Beyond isa.h's levels: VNNI multiplies bytes, four at a time.
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define FASTREX_WIDTH 16
#define FASTREX_AVX512 1
#define FASTREX_VNNI 1
namespace vnni {
#include "simd.h"
#include "crop_resize.inl"
}  // namespace vnni
#undef FASTREX_WIDTH
#undef FASTREX_AVX512
#undef FASTREX_VNNI
#pragma GCC pop_options
// FASTREX_ISA=avx512 takes AVX-512 without it.
bool has_vnni() {
  static const bool found =
      isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni") && !std::getenv("FASTREX_ISA");
  return found;
}
#else
namespace vnni = baseline;
bool has_vnni() { return false; }
#endif

using at::Tensor;

constexpr int64_t LANES = 16, PARTS = 2;      // the most that any instruction set has
constexpr int64_t GRAIN_PIXELS = 128 * 128;  // output pixels that are worth another thread

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Memory that a thread keeps from crop to crop: faulting it in anew would cost as much as a small crop.
class Scratch {
 public:
  // `carve` takes its pieces twice: the first time to learn how much they are together.
  template <typename F>
  void lay_out(F carve) {
    used_ = 0;
    carve();
    if (used_ > size_) {
      size_ = 0;
      memory_.reset(new char[used_ + ALIGN]);
      size_ = used_;
    }
    used_ = 0;
    carve();
  }
  template <typename T>
  void take(T*& piece, int64_t count) {
    piece = reinterpret_cast<T*>(round_up(reinterpret_cast<intptr_t>(memory_.get()), ALIGN) + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), ALIGN);
  }

 private:
  static constexpr int64_t ALIGN = 64;
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0, used_ = 0;
};

double stretch(const Axis& axis) { return static_cast<double>(axis.length) / static_cast<double>(axis.size); }

// Sizes from bounds; place() tightens them.
Axis axis_of(int64_t length, int64_t size) {
  Axis axis{};
  axis.length = length;
  axis.size = size;
  axis.padded = round_up(size, LANES / 2);
  axis.taps = std::min(length, 2 * static_cast<int64_t>(std::ceil(2 * std::max(stretch(axis), 1.0))) + 1);
  axis.groups = (axis.taps + 6) / 4;
  axis.stride = 4 * axis.groups;
  return axis;
}

// Where the taps of each output lie, as Pillow rounds it.
void place(Axis& axis) {
  const double step = stretch(axis), support = 2 * std::max(step, 1.0);
  int32_t taps = 0, groups = 0;
  for (int64_t x = 0; x < axis.padded; ++x) {
    const double centre = (static_cast<double>(std::min(x, axis.size - 1)) + 0.5) * step;
    const int32_t first = std::max(static_cast<int32_t>(centre - support + 0.5), 0);
    const int32_t end = std::min(static_cast<int32_t>(centre + support + 0.5), static_cast<int32_t>(axis.length));
    axis.centre[x] = centre;
    axis.start[x] = first;
    axis.count[x] = end - first;
    taps = std::max(taps, end - first);
    groups = std::max(groups, (end + 3) / 4 - first / 4);
  }
  axis.taps = taps;
  axis.groups = groups;
}

void make(const uint8_t* source, const uint8_t* end, int64_t stride, const int32_t* box, uint8_t* out, int64_t size) {
  thread_local Scratch scratch;
  Job job{};
  job.source = source;
  job.end = end;
  job.stride = stride;
  job.out = out;
  job.x = axis_of(box[3], size);
  job.y = axis_of(box[2], size);
  job.pitch = round_up(12 * job.x.padded, 16 * LANES);
  scratch.lay_out([&] {
    for (Axis* axis : {&job.x, &job.y}) {
      scratch.take(axis->centre, axis->padded);
      scratch.take(axis->start, axis->padded);
      scratch.take(axis->count, axis->padded);
      scratch.take(axis->fixed, axis->padded * axis->stride);
      scratch.take(axis->factor, axis->padded * axis->stride);
    }
    scratch.take(job.weight, std::max(job.x.taps, job.y.taps) * LANES / 2);
    scratch.take(job.block, (job.x.length / 4 + 1 + job.x.groups) * 3 * PARTS * LANES);
    scratch.take(job.rows, (3 * job.x.length + 32) * LANES);
    scratch.take(job.ring, (job.y.groups + LANES / 4) * job.pitch);
    scratch.take(job.quads, job.y.groups);
  });
  place(job.x);
  place(job.y);
  has_vnni() ? vnni::crop(job) : FASTREX_DISPATCH(crop, job);
}

// An image as the crops need it.
struct Image {
  const uint8_t *data, *end;
  int64_t height, width, stride;
};

Image image_of(const Tensor& x, size_t index) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kByte && x.dim() == 3 && x.size(2) == 3, "crop_resize: images[", index,
                    "] must be uint8 [H, W, 3], got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK_VALUE(x.is_cpu(), "crop_resize: images[", index, "] must be on cpu like the others, got ", x.device());
  TORCH_CHECK_VALUE(x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == 3), "crop_resize: images[", index,
                    "] must be contiguous within each row, got strides ", x.strides());
  const int64_t height = x.size(0), width = x.size(1), stride = x.stride(0);
  const uint8_t* data = x.const_data_ptr<uint8_t>();
  return {data, data + (height - 1) * stride + 3 * width, height, width, stride};
}

void check_box(const int32_t* box, const Image& image, int64_t row) {
  const int64_t top = box[0], left = box[1], height = box[2], width = box[3];
  TORCH_CHECK_VALUE(top >= 0 && left >= 0 && height >= 1 && width >= 1 && top + height <= image.height &&
                        left + width <= image.width,
                    "crop_resize: boxes[", row, "] must lie inside its image of ", image.height, " x ", image.width,
                    ", got top ", top, ", left ", left, ", height ", height, ", width ", width);
}

void crop_resize_(Tensor& out, at::TensorList images, const Tensor& boxes) {
  std::vector<Image> source;
  source.reserve(images.size());
  for (size_t i = 0; i < images.size(); ++i) source.push_back(image_of(images[i], i));
  const int64_t count = boxes.size(0), each = static_cast<int64_t>(images.size()), size = out.size(1);
  const int32_t* box = boxes.const_data_ptr<int32_t>();
  for (int64_t n = 0; n < count; ++n) check_box(box + 4 * n, source[n % each], n);
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
  uint8_t* target = out.mutable_data_ptr<uint8_t>();
  const int64_t step = out.stride(0), crops = count / each;
  fastrex::parallel_for(0, count, std::max<int64_t>(1, GRAIN_PIXELS / (size * size)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // Crops of one image follow one another, while it is in the cache.
      const int64_t n = i % crops * each + i / crops;
      const Image& x = source[i / crops];
      const int32_t* b = box + 4 * n;
      make(x.data + b[0] * x.stride + int64_t{3} * b[1], x.end, x.stride, b, target + n * step, size);
    }
  });
}

}  // namespace fastrex::crop_resize

TORCH_LIBRARY_IMPL(fastrex, CPU, m) { m.impl("crop_resize_", fastrex::crop_resize::crop_resize_); }
