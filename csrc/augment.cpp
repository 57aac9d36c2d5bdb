// augment_: uint8 crops [N, H, W, 3] and their draws -> normalised channels-last crops of one or three channels.
//
//   flip; brightness f x, contrast f x + (1 - f) floor(mean(grey) + 1/2), saturation f x + (1 - f) grey and hue, in the
//   row's own order; grey; Gaussian blur; v >= t -> 255 - v; (v / 255 - mean) / std
//
// A thread owns whole images. It reads the bytes of one and writes its output once; with a contrast it goes over the
// image a second time, from planes of floats in a scratch that stays in the cache, and with a blur its lines wait there
// for the lines below them. An image's bits depend on nothing but the image and its draws.
#include "common.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrex::augment {

enum Jitter { BRIGHTNESS, CONTRAST, SATURATION, HUE };

constexpr int MAX_REACH = 48;  // of a blur: three boxes that reach 16 pixels each

struct Step {
  Jitter op;
  float factor, rest;  // rest = 1 - factor, later times the level of the contrast
  float sector[3];     // the hues of red, green and blue after the turn, in sixths of a turn
  float side;          // the sign of the turn
};

struct Image {
  const uint8_t* pixels;
  int64_t height, width, stride;  // stride of a line in the scratch, in floats
  bool flip, gray;
  int count, reach;  // of steps; of the blur, 0 for none
  float threshold;
  float scale[3], shift[3];
  float taps[MAX_REACH + 1];  // from the middle outwards
  Step steps[4];
  float* scratch;
};

// For 4 pixels of 3 bytes each, as they come and in reverse: 32-bit lanes of 16 pixels, and the bytes of each channel.
alignas(64) constexpr int32_t PIXEL_LANES[2][16] = {{0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0},
                                                    {9, 10, 11, 0, 6, 7, 8, 0, 3, 4, 5, 0, 0, 1, 2, 0}};
alignas(64) constexpr int8_t PIXEL_BYTES[2][3][16] = {{{0, -1, -1, -1, 3, -1, -1, -1, 6, -1, -1, -1, 9, -1, -1, -1},
                                                       {1, -1, -1, -1, 4, -1, -1, -1, 7, -1, -1, -1, 10, -1, -1, -1},
                                                       {2, -1, -1, -1, 5, -1, -1, -1, 8, -1, -1, -1, 11, -1, -1, -1}},
                                                      {{9, -1, -1, -1, 6, -1, -1, -1, 3, -1, -1, -1, 0, -1, -1, -1},
                                                       {10, -1, -1, -1, 7, -1, -1, -1, 4, -1, -1, -1, 1, -1, -1, -1},
                                                       {11, -1, -1, -1, 8, -1, -1, -1, 5, -1, -1, -1, 2, -1, -1, -1}}};

#define FASTREX_LOOPS "augment.inl"
#include "isa.h"

using at::ScalarType;
using at::Tensor;

constexpr int64_t GRAIN = 16 * 1024;  // pixels that are worth another thread

struct Column {
  const char* name;
  float low, high;
};
constexpr float FINITE = std::numeric_limits<float>::max();
constexpr int COLUMNS = 9;
constexpr Column COLUMN[COLUMNS] = {{"FLIP", 0, 1},          {"ORDER", 0, 23},          {"BRIGHTNESS", 0, FINITE},
                                    {"CONTRAST", 0, FINITE}, {"SATURATION", 0, FINITE}, {"HUE", -0.5f, 0.5f},
                                    {"GRAY", 0, 1},          {"BLUR", 0, 16},           {"SOLARIZE", 0, 256}};

void check_values(const float* params, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    for (int c = 0; c < COLUMNS; ++c) {
      const float value = params[row * COLUMNS + c];
      TORCH_CHECK_VALUE(value >= COLUMN[c].low && value <= COLUMN[c].high, "augment: params column ", COLUMN[c].name,
                        " must be in [", COLUMN[c].low, ", ", COLUMN[c].high == FINITE ? INFINITY : COLUMN[c].high,
                        "], got ", value, " in row ", row);
    }
}

// The kernel of three boxes of weight 1 up to the distance `full` and less at full + 1 (Gwosdek et al. 2011), whose
// variances add up to the square of the radius.
void blur_taps(float radius, Image& image) {
  const double variance = double(radius) * radius / 3;
  const int full = static_cast<int>((std::sqrt(12 * variance + 1) - 1) / 2), size = 2 * full + 3;
  const double rim = (2 * full + 1) * (full * (full + 1) - 3 * variance) /
                     (6 * (variance - double(full + 1) * (full + 1)));
  std::vector<double> box(size, 1.0);
  box.front() = box.back() = rim;
  const double weight = std::accumulate(box.begin(), box.end(), 0.0);
  for (double& x : box) x /= weight;
  std::vector<double> kernel = box;
  for (int turn = 0; turn < 2; ++turn) {
    std::vector<double> wide(kernel.size() + size - 1);
    for (int i = 0; i < size; ++i)
      for (size_t j = 0; j < kernel.size(); ++j) wide[i + j] += box[i] * kernel[j];
    kernel = std::move(wide);
  }
  image.reach = 3 * (full + 1);
  for (int i = 0; i <= image.reach; ++i) image.taps[i] = static_cast<float>(kernel[image.reach + i]);
}

using Order = std::array<int, 4>;

// As tuple(itertools.permutations(range(4))).
std::array<Order, 24> all_orders() {
  std::array<Order, 24> orders;
  Order order = {0, 1, 2, 3};
  for (Order& entry : orders) {
    entry = order;
    std::next_permutation(order.begin(), order.end());
  }
  return orders;
}

// What the draws ask for; a step that would change nothing is left out, and so is colour where there is one channel.
void read_params(const float* params, int64_t channels, Image& image) {
  static const std::array<Order, 24> orders = all_orders();
  image.flip = params[0] != 0;
  image.count = 0;
  for (const int op : orders[static_cast<size_t>(params[1])]) {
    const float factor = params[2 + op];
    if (op == HUE ? factor == 0 : factor == 1) continue;
    if (channels == 1 && (op == HUE || op == SATURATION)) continue;
    Step& step = image.steps[image.count++];
    step.op = static_cast<Jitter>(op);
    step.factor = factor;
    step.rest = 1 - factor;
    step.side = factor < 0 ? -1.0f : 1.0f;
    step.sector[0] = 6 * factor, step.sector[1] = 6 * factor + 2, step.sector[2] = 6 * factor - 2;
  }
  image.gray = params[6] != 0 && channels == 3;
  image.reach = 0;
  if (params[7] > 0) blur_taps(params[7], image);
  image.threshold = params[8];
}

// Kept by each thread from call to call: the pages of a fresh one would cost more than the augmentation of a crop.
float* scratch(const Image& image, int64_t channels) {
  thread_local std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
  thread_local int64_t room = 0;
  const int64_t wanted = channels * (image.stride * (image.height + 1) + 2 * MAX_REACH);
  if (wanted > room) {
    const size_t bytes = (wanted * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    room = memory ? wanted : 0;
    TORCH_CHECK(memory, "augment: no memory for ", bytes, " bytes of scratch");
  }
  return memory.get();
}

template <typename T>
void augment_rows(const Tensor& out, const Tensor& images, const Tensor& params, const Image& common) {
  const int64_t channels = out.size(1), in_stride = images.stride(0), out_stride = out.stride(0);
  T* target = out.mutable_data_ptr<T>();
  const uint8_t* source = images.const_data_ptr<uint8_t>();
  const float* draws = params.const_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, GRAIN / (common.height * common.width));
  fastrex::parallel_for(0, images.size(0), grain, [&](int64_t begin, int64_t end) {
    Image image = common;
    image.scratch = scratch(image, channels);
    for (int64_t n = begin; n < end; ++n) {
      image.pixels = source + n * in_stride;
      read_params(draws + n * COLUMNS, channels, image);
      T* row = target + n * out_stride;
      if (channels == 1)
        FASTREX_DISPATCH(augment_image<1>, image, row);
      else
        FASTREX_DISPATCH(augment_image<3>, image, row);
    }
  });
}

// Whether each row, in the given order of the axes, lies contiguous in memory.
bool contiguous_rows(const Tensor& x, std::array<int, 3> axes) {
  int64_t expected = 1;
  for (int i = 2; i >= 0; --i) {
    if (x.size(axes[i]) != 1 && x.stride(axes[i]) != expected) return false;
    expected *= x.size(axes[i]);
  }
  return true;
}

void augment_(const Tensor& out, const Tensor& images, const Tensor& params, at::ArrayRef<double> mean,
              at::ArrayRef<double> std) {
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(3) == 3 && images.scalar_type() == at::kByte &&
                        contiguous_rows(images, {1, 2, 3}),
                    "augment_: images must be uint8 [N, H, W, 3] with contiguous rows");
  const int64_t rows = images.size(0), height = images.size(1), width = images.size(2);
  TORCH_CHECK_VALUE(out.dim() == 4 && out.size(0) == rows && (out.size(1) == 1 || out.size(1) == 3) &&
                        out.size(2) == height && out.size(3) == width && contiguous_rows(out, {2, 3, 1}),
                    "augment_: out must be [N, 1 or 3, H, W] with channels-last rows");
  TORCH_CHECK_VALUE(params.dim() == 2 && params.size(0) == rows && params.size(1) == COLUMNS &&
                        params.scalar_type() == at::kFloat && params.is_contiguous(),
                    "augment_: params must be contiguous float32 [N, 9]");
  TORCH_CHECK_VALUE(mean.size() == 3 && std.size() == 3, "augment_: mean and std must have 3 values");
  TORCH_CHECK_VALUE(out.is_cpu() && images.is_cpu() && params.is_cpu(), "augment_: all tensors must be on cpu");
  check_values(params.const_data_ptr<float>(), rows);
  if (out.numel() == 0) return;
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
  Image common{};
  common.height = height, common.width = width, common.stride = (width + 15) / 16 * 16;
  const bool one = out.size(1) == 1;
  for (int c = 0; c < 3; ++c) {
    const double middle = one ? (mean[0] + mean[1] + mean[2]) / 3 : mean[c];
    const double spread = one ? (std[0] + std[1] + std[2]) / 3 : std[c];
    common.scale[c] = static_cast<float>(1 / (255 * spread));
    common.shift[c] = static_cast<float>(-middle / spread);
  }
  switch (out.scalar_type()) {
    case ScalarType::Float: return augment_rows<float>(out, images, params, common);
    case ScalarType::BFloat16: return augment_rows<c10::BFloat16>(out, images, params, common);
    case ScalarType::Half: return augment_rows<c10::Half>(out, images, params, common);
    default: TORCH_CHECK_TYPE(false, "augment_: out must be float32, bfloat16 or float16, got ", out.scalar_type());
  }
}

}  // namespace fastrex::augment

TORCH_LIBRARY_IMPL(fastrex, CPU, m) { m.impl("augment_", fastrex::augment::augment_); }
