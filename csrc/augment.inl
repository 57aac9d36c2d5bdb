// The passes over one image, for one instruction set. All that is between two barriers (the mean of the contrast, the
// blur) happens to a vector of pixels in registers; the branches on the steps go the same way for a whole image. Lanes
// beyond the width hold zeros until the contrast, so that they add nothing to its mean; they are never written out.

// W pixels of interleaved bytes as one float vector per channel, last pixel first if `flip`.
static inline void load_pixels(const uint8_t* p, bool flip, vf& red, vf& green, vf& blue) {
#if defined(FASTREX_AVX512)
  // Four pixels to a 128-bit lane, whose bytes then become the low ones of 32-bit numbers.
  __m512i bytes = _mm512_maskz_loadu_epi32(0x0fff, p);
  bytes = _mm512_permutexvar_epi32(_mm512_loadu_si512(PIXEL_LANES[flip]), bytes);
  const auto channel = [&](int c) {
    const __m128i order = _mm_loadu_si128((const __m128i*)PIXEL_BYTES[flip][c]);
    return (vf)_mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(order)));
  };
  red = channel(0), green = channel(1), blue = channel(2);
#elif defined(FASTREX_AVX2)
  const __m128i first = _mm_loadu_si128((const __m128i*)p);
  const __m128i second = _mm_srli_si128(_mm_loadu_si128((const __m128i*)(p + 8)), 4);
  const __m256i bytes = _mm256_set_m128i(flip ? first : second, flip ? second : first);
  const auto channel = [&](int c) {
    const __m128i order = _mm_loadu_si128((const __m128i*)PIXEL_BYTES[flip][c]);
    return (vf)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order)));
  };
  red = channel(0), green = channel(1), blue = channel(2);
#else
  for (int i = 0; i < W; ++i) {
    const uint8_t* pixel = p + 3 * (flip ? W - 1 - i : i);
    red[i] = pixel[0], green[i] = pixel[1], blue[i] = pixel[2];
  }
#endif
}

static inline vf gray_of(vf red, vf green, vf blue) { return 0.299f * red + 0.587f * green + 0.114f * blue; }

static inline vf clamp(vf v) { return smaller(larger(v, vf{}), splat(255)); }

// The pixels [x, x + W) of the flipped image; one channel is the grey.
template <int C>
static inline void source(const Image& image, int64_t y, int64_t x, vf (&v)[C]) {
  const uint8_t* line = image.pixels + y * image.width * 3;
  const int64_t left = image.width - x;
  uint8_t edge[3 * W];
  const uint8_t* p = line + 3 * (image.flip ? left - W : x);
  if (__builtin_expect(left < W, 0)) {
    std::memset(edge, 0, sizeof(edge));
    std::memcpy(edge + (image.flip ? 3 * (W - left) : 0), line + (image.flip ? 0 : 3 * x), 3 * left);
    p = edge;
  }
  vf red, green, blue;
  load_pixels(p, image.flip, red, green, blue);
  if constexpr (C == 1) {
    v[0] = gray_of(red, green, blue);
  } else {
    v[0] = red, v[1] = green, v[2] = blue;
  }
}

// Value and chroma stay and a channel is a trapezium of the hue. All is multiplied by the chroma: no division, and a
// grey pixel is no special case. u is the hue in sixths of a turn times the chroma: at most 3 on both sides of red
// before the turn, so that it leaves this range on the side of the turn only.
static inline void rotate_hue(const Step& step, vf& red, vf& green, vf& blue) {
  const vf high = larger(larger(red, green), blue), low = smaller(smaller(red, green), blue), chroma = high - low;
  const vi is_red = high == red, is_green = high == green;
  const vf within = is_red ? green - blue : is_green ? blue - red : red - green;
  const vf sector = is_red ? splat(step.sector[0]) : is_green ? splat(step.sector[1]) : splat(step.sector[2]);
  vf u = sector * chroma + within;
  u = step.side * u > 3.0f * chroma ? u - 6.0f * step.side * chroma : u;
  const vf rise = low - chroma, fall = high + chroma;
  red = smaller(larger(fall - magnitude(u), low), high);
  green = smaller(larger(magnitude(u + chroma) + rise, low), high);
  blue = smaller(larger(magnitude(u - chroma) + rise, low), high);
}

template <int C>
static inline void jitter(const Step* step, const Step* end, vf (&v)[C]) {
  for (; step != end; ++step) {
    const vf factor = splat(step->factor), rest = splat(step->rest);
    switch (step->op) {
      case BRIGHTNESS:
        for (vf& x : v) x = smaller(factor * x, splat(255));
        break;
      case CONTRAST:
        for (vf& x : v) x = clamp(factor * x + rest);
        break;
      case SATURATION:
        if constexpr (C == 3) {
          const vf gray = rest * gray_of(v[0], v[1], v[2]);
          for (vf& x : v) x = clamp(factor * x + gray);
        }
        break;
      case HUE:
        if constexpr (C == 3) rotate_hue(*step, v[0], v[1], v[2]);
    }
  }
}

// Where the channels of line y lie in the scratch.
template <int C>
static inline float* plane(const Image& image, int64_t y, int c) {
  return image.scratch + (y * C + c) * image.stride;
}

// The mean grey before the contrast; the steps before it leave their result in the scratch. Summed in a fixed order:
// along each line, then over the lines, then over the lanes of the vectors.
template <int C>
static float mean_gray(const Image& image, const Step* contrast) {
  vf total{};
  for (int64_t y = 0; y < image.height; ++y) {
    vf line{};
    for (int64_t x = 0; x < image.width; x += W) {
      vf v[C];
      source(image, y, x, v);
      if (contrast != image.steps) {
        jitter(image.steps, contrast, v);
        for (int c = 0; c < C; ++c) store(plane<C>(image, y, c) + x, v[c]);
      }
      if constexpr (C == 1) {
        line += v[0];
      } else {
        line += gray_of(v[0], v[1], v[2]);
      }
    }
    total += line;
  }
  return sum(total) / static_cast<float>(image.height * image.width);
}

// The part [PART * W, PART * W + W) of the interleaved channels. The shuffles are constants: g++ then finds short
// sequences for them where an instruction set has no general one.
template <int PART, typename T, int... I>
[[gnu::always_inline]] static inline void store_part(T* out, const vf (&v)[3], std::integer_sequence<int, I...>) {
  constexpr int first = PART * W;
  constexpr vi red_green = {((first + I) % 3 == 1 ? W : 0) + (first + I) / 3 ...};
  constexpr vi with_blue = {((first + I) % 3 == 2 ? W + (first + I) / 3 : I)...};
  store(out + first, __builtin_shuffle(__builtin_shuffle(v[0], v[1], red_green), v[2], with_blue));
}

// Solarised, normalised and written to pixels [x, x + W) of a line of the output.
template <typename T, int C>
[[gnu::always_inline]] static inline void finish(const Image& image, T* line, int64_t x, vf (&v)[C]) {
  constexpr std::make_integer_sequence<int, W> lanes;
  if (image.threshold < 256)
    for (vf& p : v) p = p >= image.threshold ? 255.0f - p : p;
  for (int c = 0; c < C; ++c) v[c] = v[c] * image.scale[c] + image.shift[c];
  const int64_t left = image.width - x;
  T edge[C * W];
  T* out = __builtin_expect(left < W, 0) ? edge : line + C * x;
  if constexpr (C == 1) {
    store(out, v[0]);
  } else {
    store_part<0>(out, v, lanes);
    store_part<1>(out, v, lanes);
    store_part<2>(out, v, lanes);
  }
  if (__builtin_expect(left < W, 0)) std::memcpy(line + C * x, edge, C * left * sizeof(T));
}

// The symmetric sum of taps[i] (at(-i) + at(i)).
template <typename At>
static inline vf filter(const vf* taps, int reach, At at) {
  vf total = taps[0] * at(0);
#pragma GCC unroll 8
  for (int i = 1; i <= reach; ++i) total += taps[i] * (at(-i) + at(i));
  return total;
}

// Blurs line y: down into a buffer that has the edge pixels repeated on both sides, then along it. REACH 0: one that is
// known at run time.
template <int REACH, int C, typename T>
static void blur_line(const Image& image, T* out, int64_t y) {
  constexpr int most = REACH ? REACH : MAX_REACH;
  const int reach = REACH ? REACH : image.reach;
  const int64_t width = image.width, height = image.height, stride = image.stride, padded = stride + 2 * MAX_REACH;
  vf taps[most + 1];
#pragma GCC unroll 8
  for (int i = 0; i <= reach; ++i) taps[i] = splat(image.taps[i]);
  const float* lines[2 * most + 1];
#pragma GCC unroll 16
  for (int i = -reach; i <= reach; ++i) {
    const int64_t at = y + i < 0 ? 0 : y + i < height ? y + i : height - 1;
    lines[reach + i] = image.scratch + at * C * stride;
  }
  // Grey pixels have three equal channels.
  const int channels = image.gray ? 1 : C;
  float* buffer = image.scratch + height * C * stride + MAX_REACH;
  for (int c = 0; c < channels; ++c) {
    float* line = buffer + c * padded;
    for (int64_t x = 0; x < width; x += W)
      store(line + x, filter(taps, reach, [&](int i) { return load(lines[reach + i] + c * stride + x); }));
    for (int64_t x = 0; x < reach; x += W) {
      store(line - W - x, splat(line[0]));
      store(line + width + x, splat(line[width - 1]));
    }
  }
  for (int64_t x = 0; x < width; x += W) {
    vf v[C];
    for (int c = 0; c < C; ++c) {
      const float* line = buffer + c * padded + x;
      v[c] = c < channels ? clamp(filter(taps, reach, [&](int i) { return load(line + i); })) : v[0];
    }
    finish(image, out + y * width * C, x, v);
  }
}

template <int C, typename T>
static void augment_image(Image& image, T* out) {
  Step *first = image.steps, *end = image.steps + image.count;
  bool stored = false;
  for (Step* step = first; step != end; ++step) {
    if (step->op != CONTRAST) continue;
    step->rest *= __builtin_floorf(mean_gray<C>(image, step) + 0.5f);
    stored = step != first;
    first = step;
    break;
  }
  for (int64_t y = 0; y < image.height + image.reach; ++y) {
    for (int64_t x = 0; x < image.width && y < image.height; x += W) {
      vf v[C];
      if (stored) {
        for (int c = 0; c < C; ++c) v[c] = load(plane<C>(image, y, c) + x);
      } else {
        source(image, y, x, v);
      }
      jitter(first, end, v);
      if constexpr (C == 3)
        if (image.gray) v[0] = v[1] = v[2] = gray_of(v[0], v[1], v[2]);
      if (!image.reach) {
        finish(image, out + y * image.width * C, x, v);
      } else {
        for (int c = 0; c < C; ++c) store(plane<C>(image, y, c) + x, v[c]);
      }
    }
    // As soon as the lines below are there.
    if (image.reach == 3 && y >= 3) blur_line<3, C>(image, out, y - 3);
    if (image.reach == 6 && y >= 6) blur_line<6, C>(image, out, y - 6);
    if (image.reach > 6 && y >= image.reach) blur_line<0, C>(image, out, y - image.reach);
  }
}
