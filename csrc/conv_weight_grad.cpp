// conv_weight_grad: dW[o, t, i] = sum_{n, p} dY[n, p, o] X[n, p s + t - padding, i], the gradient of a convolution's
// weight, of bfloat16 in fp32 and in the weight's channels-last order (O, kh, kw, I).
//
// The sum goes over pixels, and vdpbf16ps adds two products: here those of two images at the same place, because then
// a tap's shift never parts a pair, and pixels that a tap finds outside of the map are skipped, not multiplied by zero.
// (The last one of an odd number of images is paired with zeros.) A block of some rows of some pairs of images is
// packed into panels that stay in the L2 cache; for each tap its sum is a product of contiguous runs of pixels, in
// tiles of 8 x 32 fp32 sums in registers, which are added to dW once per block; meanwhile the next block is fetched. A
// few input channels (a stem) would leave most of a vector empty: there whole patches of the input are packed, whose
// (tap, channel) are the columns.
//
// Reads both tensors once (the input's rows again where blocks meet; all of one of them per further part of dW), writes
// dW once per block. Large dW: threads share its rows or columns. Small dW, many pixels: the blocks are split into
// slices, each with its own sum, added up at the end in their order. Blocks and slices depend on the sizes only, so the
// number of threads changes no bit.
#include "conv.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <array>
#if defined(__x86_64__)
#include <immintrin.h>

namespace fastrex::conv_weight_grad {

using at::Tensor;
using conv::reached;
using conv::Span;

constexpr int64_t FEW_CHANNELS = 12;   // up to here patches are packed
constexpr int64_t BLOCK_PIXELS = 224;  // 32 packed input channels of a block are 28 KiB: they stay in the L1 cache
constexpr int64_t RUN_PIXELS = 48;     // so many pixels of a row, of several pairs, before another row is taken
constexpr int64_t MOST_SLICES = 16;

// Sizes, and how the pixels are cut into blocks.
struct Plan {
  int64_t images, height, width, channels, outputs, out_height, out_width, kernel, stride, padding;
  int64_t pairs, chunk, chunks;  // pairs of images, of which `chunk` are in a block
  int64_t rows;                  // rows of the gradient in a block
  int64_t input_rows;            // rows of the input that they reach
  int64_t phases, places;        // an input row, packed by w mod stride: [phases][places][pairs of the block]
  int64_t first_place;           // the first w / stride, counted from the padding's start
  bool patches;
  int64_t columns;               // of dW: kernel * kernel * channels
  int64_t slices;
};

inline int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan plan_of(const Tensor& grad, const Tensor& input, int64_t kernel, int64_t stride, int64_t padding) {
  Plan p{};
  p.images = input.size(0), p.channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
  p.outputs = grad.size(1), p.out_height = grad.size(2), p.out_width = grad.size(3);
  p.kernel = kernel, p.stride = stride, p.padding = padding;
  p.columns = kernel * kernel * p.channels;
  p.patches = p.channels <= FEW_CHANNELS && kernel > 1;
  p.pairs = ceil(p.images, 2);
  p.chunks = ceil(p.pairs, std::min(p.pairs, ceil(RUN_PIXELS, p.out_width)));
  p.chunk = ceil(p.pairs, p.chunks);
  p.chunks = ceil(p.pairs, p.chunk);
  const int64_t fit = std::clamp<int64_t>(BLOCK_PIXELS / (p.out_width * p.chunk), 1, p.out_height);
  p.rows = ceil(p.out_height, ceil(p.out_height, fit));
  p.input_rows = (p.rows - 1) * stride + kernel;
  if (!p.patches) p.input_rows = std::min(p.input_rows, p.height);
  p.phases = std::min(stride, kernel);
  p.first_place = padding / stride;
  p.places = (p.width - 1 + padding) / stride + 1 - p.first_place;
  const int64_t read = 2 * (grad.numel() + input.numel()), written = 4 * p.outputs * p.columns;
  const int64_t most = std::min({read / (8 * written), MOST_SLICES, p.chunks * p.out_height});
  for (p.slices = 1; 2 * p.slices <= most;) p.slices *= 2;
  return p;
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
namespace bf16 {
#include "conv_weight_grad.inl"
}  // namespace bf16
#pragma GCC pop_options

Tensor conv_weight_grad(const Tensor& grad, const Tensor& input, int64_t kernel, int64_t stride, int64_t padding) {
  const auto options = grad.options().dtype(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast);
  const std::array<int64_t, 4> sizes{grad.size(1), input.size(1), kernel, kernel};
  if (!grad.numel() || !input.numel()) return at::zeros(sizes, options.memory_format(std::nullopt));
  TORCH_INTERNAL_ASSERT(grad.is_contiguous(at::MemoryFormat::ChannelsLast));
  TORCH_INTERNAL_ASSERT(input.is_contiguous(at::MemoryFormat::ChannelsLast));
  const Plan p = plan_of(grad, input, kernel, stride, padding);
  Tensor output = at::empty(sizes, options);
  const auto* g = reinterpret_cast<const uint16_t*>(grad.const_data_ptr<c10::BFloat16>());
  const auto* x = reinterpret_cast<const uint16_t*>(input.const_data_ptr<c10::BFloat16>());
  float* out = output.mutable_data_ptr<float>();
  // A part is a range of dW's rows or of the input's channels, whichever are more: the other tensor is packed per part.
  const int64_t threads = fastrex::num_threads(), numel = p.outputs * p.columns;
  const bool by_rows = p.patches || p.outputs >= p.channels;
  const int64_t panels = ceil(by_rows ? p.outputs : p.channels, bf16::PART);
  const int64_t parts = std::min(panels, ceil(threads, p.slices)), tasks = p.slices * parts;
  const int64_t slots = std::min(threads, tasks), share = bf16::scratch_bytes(p);
  const Tensor sums = at::empty({(p.slices - 1) * numel}, grad.options().dtype(at::kFloat));
  const Tensor scratch = at::empty({slots * share + 64}, grad.options().dtype(at::kByte));
  float* sum = sums.mutable_data_ptr<float>();
  auto* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr()) + 63) / 64 * 64);
  fastrex::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t task = tasks * slot / slots; task < tasks * (slot + 1) / slots; ++task) {
        const int64_t slice = task / parts, part = task % parts;
        const int64_t from = panels * part / parts * bf16::PART, to = panels * (part + 1) / parts * bf16::PART;
        const bf16::Range all_rows{0, p.outputs}, all_channels{0, p.channels};
        const bf16::Range rows = by_rows ? bf16::Range{from, std::min(to, p.outputs)} : all_rows;
        const bf16::Range channels = by_rows ? all_channels : bf16::Range{from, std::min(to, p.channels)};
        bf16::slice_sums(p, g, x, slice, rows, channels, slice ? sum + (slice - 1) * numel : out, base + slot * share);
      }
  });
  if (p.slices > 1)
    fastrex::parallel_for(0, numel, 16384, [&](int64_t begin, int64_t end) {
      bf16::add_slices(out, sum, p.slices - 1, numel, begin, end);
    });
  return output;
}

}  // namespace fastrex::conv_weight_grad

TORCH_LIBRARY_IMPL(fastrex, CPU, m) {
  if (fastrex::conv::bf16_products()) m.impl("conv_weight_grad", fastrex::conv_weight_grad::conv_weight_grad);
}
#endif
