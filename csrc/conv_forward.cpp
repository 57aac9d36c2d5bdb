// fastrex::conv_forward and fastrex::conv_input_grad for bfloat16 channels-last tensors on CPUs with AVX512-BF16.
//
// Both are one product over gathered pixels (conv_forward.inl); this file says which pixels meet which weights, and
// shares the work out. Weights come as they are stored, (O, kh, kw, I), and are packed in every call, each panel by the
// thread that then finds it in its own L2 where there are many.
#include "conv.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>

namespace fastrex::conv {
namespace {

constexpr int64_t PANEL = 64;         // columns of a tile
constexpr int64_t CACHE = 1 << 20;    // L2 of one core
constexpr int64_t BLOCK = CACHE / 4;  // a block of source pixels that several parts read

// A line of positions (all of one y, or all of one x): its taps that fall inside the source, one bit each, and where it
// begins in source and target, in elements.
struct Line {
  uint64_t taps;
  int64_t source, target;
};

// Positions that share a list of taps: all of a convolution's; those of one remainder modulo the stride of its input
// gradient, so that only taps that meet something are multiplied.
struct Part {
  int64_t height, width, taps, tiles;
  const Line *down, *across;
  const int64_t *shift, *tap;  // per tap: from a row's source to the tap's pixel; which tap of the weights it is
};

struct Product {
  const uint16_t *source, *zeros;  // zeros: a pixel for the taps outside
  uint16_t* target;
  int64_t images, group;  // rows of `group` images are interleaved
  int64_t source_image, target_image;
  int64_t taps, run, columns;  // of the weights: taps, values of k, columns
  int64_t ahead;               // bytes from the pixels of a tile to the next tile's
};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prfchw,prefer-vector-width=512")
#include "conv_forward.inl"
#pragma GCC pop_options

// What a Part points to.
struct Taps {
  std::vector<Line> down, across;
  std::vector<int64_t> shift, tap;
};

// Builds a part position by position: position i of an axis meets source index i * step + offset for each tap.
class Builder {
 public:
  Builder(int64_t height, int64_t width, int64_t pixel) : height_(height), width_(width), pixel_(pixel) {}

  void tap(int64_t dy, int64_t dx, int64_t index) {
    dy_.push_back(dy);
    dx_.push_back(dx);
    taps_.tap.push_back(index);
    taps_.shift.push_back((dy * width_ + dx) * pixel_);
  }
  // `begin` and `pitch`: where the first position lies in the target, and how far apart they are.
  void down(int64_t count, int64_t step, int64_t begin, int64_t pitch) {
    axis(taps_.down, dy_, count, step, height_, width_ * pixel_, begin, pitch);
  }
  void across(int64_t count, int64_t step, int64_t begin, int64_t pitch) {
    axis(taps_.across, dx_, count, step, width_, pixel_, begin, pitch);
  }
  Taps finish() { return std::move(taps_); }

 private:
  static void axis(std::vector<Line>& lines, const std::vector<int64_t>& offsets, int64_t count, int64_t step,
                   int64_t size, int64_t stride, int64_t begin, int64_t pitch) {
    for (int64_t i = 0; i < count; ++i) {
      uint64_t bits = 0;
      for (size_t t = 0; t < offsets.size(); ++t) {
        const int64_t at = i * step + offsets[t];
        if (at >= 0 && at < size) bits |= uint64_t{1} << t;
      }
      lines.push_back({bits, i * step * stride, begin + i * pitch});
    }
  }

  int64_t height_, width_, pixel_;
  std::vector<int64_t> dy_, dx_;
  Taps taps_;
};

using Pack = void (*)(const Product&, const uint16_t* weight, int64_t panel, int64_t tap, char* packed);

// Packs the weights and runs the product. How work is shared out never changes a bit: a tile is one thread's.
void multiply_all(const Product& product, const std::vector<Taps>& taps, const uint16_t* weight, Pack pack) {
  const int64_t panels = (product.columns + PANEL - 1) / PANEL;
  const int64_t panel_bytes = product.taps * ((product.run + 1) / 2) * PANEL * 4;
  const int64_t threads = num_threads();
  std::vector<Part> parts;
  int64_t tiles = 0;
  for (const Taps& t : taps) {
    const int64_t height = static_cast<int64_t>(t.down.size()), width = static_cast<int64_t>(t.across.size());
    const int64_t count = (product.images * height * width + ROWS - 1) / ROWS;
    parts.push_back({height, width, static_cast<int64_t>(t.tap.size()), count, t.down.data(), t.across.data(),
                     t.shift.data(), t.tap.data()});
    tiles += count;
  }
  // A chunk is the same share of every part, since parts differ in their number of taps.
  const auto run = [&](int64_t first, int64_t past, const char* packed, int64_t chunk, int64_t chunks) {
    for (const Part& part : parts)
      sweep(product, part, first, past, packed, part.tiles * chunk / chunks, part.tiles * (chunk + 1) / chunks);
  };
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  if (panels * panel_bytes <= CACHE || panels < threads) {
    // All of the weights stay in L2: threads share the pixels, and a tile's pixels meet all panels in turn.
    const at::Tensor packed = at::empty({panels * panel_bytes}, bytes);
    char* all = static_cast<char*>(packed.mutable_data_ptr());
    const int64_t grain = (32 << 10) * product.taps / panel_bytes + 1;
    fastrex::parallel_for(0, panels * product.taps, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        pack(product, weight, i / product.taps, i % product.taps, all + i / product.taps * panel_bytes);
    });
    int64_t blocks = parts.size() == 1 ? 1 : (product.images * product.source_image * 2 + BLOCK - 1) / BLOCK;
    blocks = std::min(std::max<int64_t>(1, tiles / 8), (blocks + threads - 1) / threads * threads);
    fastrex::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) run(0, panels, all, block, blocks);
    });
    return;
  }
  // Threads share the panels: each packs one into its own L2 and sweeps the pixels, which are far fewer.
  const int64_t chunks = panels % threads == 0 || panels >= 4 * threads ? 1 : threads;
  fastrex::parallel_for(0, panels * chunks, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor packed = at::empty({panel_bytes}, bytes);
    char* own = static_cast<char*>(packed.mutable_data_ptr());
    int64_t held = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / chunks;
      if (panel != held)
        for (int64_t tap = 0; tap < product.taps; ++tap) pack(product, weight, panel, tap, own);
      held = panel;
      run(panel, panel + 1, own, item % chunks, chunks);
    }
  });
}

// The product of tensors: `source` channels-last, into `output`.
at::Tensor multiplied(Product product, const std::vector<Taps>& taps, const at::Tensor& source,
                      const at::Tensor& weight, Pack pack, const at::Tensor& output) {
  const at::Tensor zeros = at::zeros({product.run}, source.options());
  product.zeros = static_cast<const uint16_t*>(zeros.const_data_ptr());
  product.source = static_cast<const uint16_t*>(source.const_data_ptr());
  product.target = static_cast<uint16_t*>(output.mutable_data_ptr());
  multiply_all(product, taps, static_cast<const uint16_t*>(weight.const_data_ptr()), pack);
  return output;
}

// How many images' rows are interleaved. At one position of many images a tap outside is outside for a whole tile and
// is skipped: a third less time for maps of 3x3, 7 % for 6x6. Not where so many images would not stay in L2.
int64_t interleaved(int64_t images, int64_t kernel, int64_t image_bytes) {
  if (kernel == 1 || image_bytes > CACHE / 4) return 1;
  return std::min(images, CACHE / image_bytes);
}

// Pixels all around, so that every tap is inside: [N, H + 2p, W + 2p, C].
at::Tensor padded(const at::Tensor& input, int64_t padding) {
  const int64_t channels = input.size(1), height = input.size(2), width = input.size(3);
  const int64_t tall = height + 2 * padding, wide = width + 2 * padding;
  const at::Tensor output = at::empty({input.size(0), tall, wide, channels}, input.options());
  const auto* from = static_cast<const uint16_t*>(input.const_data_ptr());
  auto* to = static_cast<uint16_t*>(output.mutable_data_ptr());
  const int64_t grain = (32 << 10) / (wide * channels) + 1;
  fastrex::parallel_for(0, input.size(0) * tall, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % tall - padding;
      uint16_t* row = to + i * wide * channels;
      std::memset(row, 0, wide * channels * 2);
      if (y >= 0 && y < height)
        std::memcpy(row + padding * channels, from + (i / tall * height + y) * width * channels, width * channels * 2);
    }
  });
  return output;
}

// A bit of Line::taps for every tap.
bool fits(int64_t kernel) { return kernel <= 8; }

at::Tensor conv_forward(const at::Tensor& any_input, const at::Tensor& any_weight, int64_t stride, int64_t padding) {
  if (!fits(any_weight.size(2)))
    return at::convolution(any_input, any_weight, {}, {stride, stride}, {padding, padding}, {1, 1}, false, {0, 0}, 1);
  at::Tensor input = any_input.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor weight = any_weight.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t images = input.size(0), channels = input.size(1), columns = weight.size(0), kernel = weight.size(2);
  int64_t height = input.size(2), width = input.size(3);
  const int64_t tall = output_size(height, kernel, stride, padding), wide = output_size(width, kernel, stride, padding);
  const at::Tensor output =
      at::empty({images, columns, tall, wide}, input.options(), at::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  if (channels == 0) return output.zero_();

  // With few channels a row of taps is taken as one run of kernel * channels values.
  const bool flat = kernel > 1 && channels * kernel <= 64;
  const int64_t across = flat ? 1 : kernel;
  if (flat) {
    input = padded(input, padding);
    height += 2 * padding;
    width += 2 * padding;
    padding = 0;
  }
  Builder builder(height, width, channels);
  for (int64_t kh = 0; kh < kernel; ++kh)
    for (int64_t kw = 0; kw < across; ++kw) builder.tap(kh - padding, kw - padding, kh * across + kw);
  builder.down(tall, stride, 0, wide * columns);
  builder.across(wide, stride, 0, columns);
  std::vector<Taps> taps;
  taps.push_back(builder.finish());

  Product product;
  product.images = images;
  product.source_image = height * width * channels;
  product.target_image = tall * wide * columns;
  product.taps = kernel * across;
  product.run = flat ? channels * kernel : channels;
  product.columns = columns;
  product.group = flat ? 1 : interleaved(images, kernel, product.source_image * 2);
  product.ahead = product.group == 1 ? ROWS * stride * channels * 2 : 0;
  return multiplied(product, taps, input, weight, pack_forward, output);
}

at::Tensor conv_input_grad(const at::Tensor& any_grad, const at::Tensor& any_weight, int64_t tall, int64_t wide,
                           int64_t stride, int64_t padding) {
  // Few columns leave most of a tile empty. Only images have so few channels, and nobody asks for their gradient.
  if (!fits(any_weight.size(2)) || (any_weight.size(1) < LANES / 2 && any_grad.numel() > 0)) {
    const at::Tensor input = at::empty({any_grad.size(0), any_weight.size(1), tall, wide}, any_grad.options(),
                                       at::MemoryFormat::ChannelsLast);
    return std::get<0>(at::convolution_backward(any_grad, input, any_weight, std::nullopt, {stride, stride},
                                                {padding, padding}, {1, 1}, false, {0, 0}, 1, {true, false, false}));
  }
  const at::Tensor grad = any_grad.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor weight = any_weight.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t images = grad.size(0), channels = grad.size(1), height = grad.size(2), width = grad.size(3);
  const int64_t columns = weight.size(1), kernel = weight.size(2);
  const at::Tensor output = at::empty({images, columns, tall, wide}, grad.options(), at::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  if (grad.numel() == 0) return output.zero_();

  // Input (y * stride + top, x * stride + left) meets output y + (top + padding - kh) / stride where that is whole.
  std::vector<Taps> taps;
  for (int64_t top = 0; top < std::min(stride, tall); ++top)
    for (int64_t left = 0; left < std::min(stride, wide); ++left) {
      Builder builder(height, width, channels);
      for (int64_t kh = 0; kh < kernel; ++kh)
        for (int64_t kw = 0; kw < kernel; ++kw) {
          const int64_t dy = top + padding - kh, dx = left + padding - kw;
          if (dy % stride == 0 && dx % stride == 0) builder.tap(dy / stride, dx / stride, kh * kernel + kw);
        }
      builder.down((tall - top + stride - 1) / stride, 1, top * wide * columns, stride * wide * columns);
      builder.across((wide - left + stride - 1) / stride, 1, left * columns, stride * columns);
      taps.push_back(builder.finish());
    }

  Product product;
  product.images = images;
  product.source_image = height * width * channels;
  product.target_image = tall * wide * columns;
  product.taps = kernel * kernel;
  product.run = channels;
  product.columns = columns;
  product.group = interleaved(images, kernel, product.source_image * 2);
  product.ahead = product.group == 1 ? ROWS * channels * 2 : 0;
  return multiplied(product, taps, grad, weight, pack_gradient, output);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrex, CPU, m) {
  if (!bf16_products()) return;
  m.impl("conv_forward", conv_forward);
  m.impl("conv_input_grad", conv_input_grad);
}

}  // namespace fastrex::conv
#endif
