// Loops of batch_norm_act over the rows of one segment; see batch_norm_act.cpp for the formulas and the cut.
//
// A thread owns a segment: it reads x (and the gradient) once per pass and writes every output once, strictly in the
// order of memory: four rows side by side, which would load a channel's numbers once instead of four times, took twice as
// long on large tensors. Numbers per channel stay in the first cache levels.

constexpr int V = BLOCK / W;

static inline uint32_t lanes_above(vf y, vf limit) {  // a NaN counts: torch's ReLU passes it, and its gradient
#if defined(FASTREX_AVX512)
  return _mm512_cmp_ps_mask((__m512)y, (__m512)limit, _CMP_NLE_UQ);
#elif defined(FASTREX_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)y, (__m256)limit, _CMP_NLE_UQ));
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpnle_ps((__m128)y, (__m128)limit));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(!(y[i] <= limit[i])) << i;
  return bits;
#endif
}

// `v` in the lanes whose bit is set, else 0.
static inline vf keep(vf v, uint32_t bits) {
#if defined(FASTREX_AVX512)
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = 1 << i;
  vi own = (static_cast<int32_t>(bits) - vi{}) & lane;
  return (vf)((vi)v & (own == lane));
#endif
}

// mean (fp32 part), scale and shift, `fold` times side by side; shift holds what the fp32 part of the mean lacks.
static void scale_and_shift(const Shape& shape, const double* mean, const double* var, const float* weight,
                            const float* bias, double eps, float* to_mean, float* to_scale, float* to_shift) {
  const int64_t C = shape.channels;
  for (int64_t c = 0; c < C; ++c) {
    float high = static_cast<float>(mean[c]);
    double scale = weight[c] / __builtin_sqrt(var[c] + eps);
    to_mean[c] = high;
    to_scale[c] = static_cast<float>(scale);
    to_shift[c] = static_cast<float>(bias[c] - (mean[c] - high) * scale);
  }
  for (int64_t j = 1; j < shape.fold; ++j)
    for (float* to : {to_mean, to_scale, to_shift}) std::memcpy(to + j * C, to, C * sizeof(float));
}

// dx = scale * g + (x - mean) * slope + offset
static void slope_and_offset(const Shape& shape, const double* mean, const double* var, const double* sums,
                             double count, double eps, const float* scale, float* slope, float* offset) {
  const int64_t C = shape.channels;
  for (int64_t c = 0; c < C; ++c) {
    double step = -scale[c] * sums[C + c] / (count * (var[c] + eps));
    slope[c] = static_cast<float>(step);
    offset[c] = static_cast<float>(-scale[c] * sums[c] / count - step * (mean[c] - static_cast<float>(mean[c])));
  }
  for (int64_t j = 1; j < shape.fold; ++j)
    for (float* to : {slope, offset}) std::memcpy(to + j * C, to, C * sizeof(float));
}

// Adds `rows` rows of x to sums of (x - shift) and of its square. Sums of narrow rows stay in registers: from row to
// row they would come back from memory too late. Wide rows are read in the order of memory.
template <typename T>
static inline void add_moments(const T* x, int64_t rows, int64_t width, const float* shift, float* sum_d,
                               float* sum_dd) {
  constexpr int N = 4;
  if (width <= 2 * N * W && width % (N * W) == 0) {
    for (int64_t c = 0; c < width; c += N * W) {
      vf s[N], a[N], b[N];
      for (int v = 0; v < N; ++v) {
        const int64_t k = c + v * W;
        s[v] = load(shift + k), a[v] = load(sum_d + k), b[v] = load(sum_dd + k);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < N; ++v) {
          vf d = load(x + r * width + c + v * W) - s[v];
          a[v] += d;
          b[v] += d * d;
        }
      for (int v = 0; v < N; ++v) store(sum_d + c + v * W, a[v]), store(sum_dd + c + v * W, b[v]);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += W) {
      vf d = load(x + r * width + c) - load(shift + c);
      store(sum_d + c, load(sum_d + c) + d);
      store(sum_dd + c, load(sum_dd + c) + d * d);
    }
}

// Mean and centred second moment of rows [first, last); shifted by a chunk's first row, so that a large mean costs
// nothing (Chan, Golub and LeVeque 1979, also for joining chunks). work: 3 * width floats.
template <typename T>
static void segment_moments(const Shape& shape, const T* x, int64_t first, int64_t last, float* work,
                            double* __restrict mean, double* __restrict moment) {
  const int64_t width = shape.width, C = shape.channels;
  const int64_t whole = shape.total / width;
  float *shift = work, *sum_d = work + width, *sum_dd = work + 2 * width;
  for (int64_t k = 0; k < width; ++k) mean[k] = moment[k] = 0;
  for (int64_t start = first; start < last; start += CHUNK) {
    const int64_t stop = std::min(start + CHUNK, last), full = std::min(stop, whole);
    std::memset(work, 0, 3 * width * sizeof(float));
    if (start < whole)
      for (int64_t c = 0; c < width; c += W) store(shift + c, load(x + start * width + c));
    else
      for (int64_t c = 0; c < shape.total - start * width; ++c) shift[c] = x[start * width + c];
    int64_t r = start + 1;
    if (r < full) add_moments(x + r * width, full - r, width, shift, sum_d, sum_dd), r = full;
    for (; r < stop; ++r)  // the array's ragged end
      for (int64_t c = 0; c < shape.total - r * width; ++c) {
        float d = static_cast<float>(x[r * width + c]) - shift[c];
        sum_d[c] += d;
        sum_dd[c] += d * d;
      }
    for (int64_t j = 0; j < shape.fold; ++j) {
      const double before = static_cast<double>(shape.count(first, start, j));
      const double n = static_cast<double>(shape.count(start, stop, j));
      if (n == 0) continue;
      const double inverse = 1 / n, share = n / (before + n), pull = before * share;
      for (int64_t k = j * C; k < (j + 1) * C; ++k) {
        double a = sum_d[k], delta = shift[k] + a * inverse - mean[k];
        mean[k] += delta * share;
        moment[k] += sum_dd[k] - a * a * inverse + delta * delta * pull;
      }
    }
  }
}

// Joins partial batches for channels [first, last), in their order.
static void join_moments(int64_t first, int64_t last, const double* counts, int64_t parts, const double* means,
                         const double* moments, int64_t stride, double* __restrict mean, double* __restrict moment) {
  for (int64_t c = first; c < last; ++c) mean[c] = moment[c] = 0;
  double before = 0;
  for (int64_t i = 0; i < parts; ++i) {
    if (counts[i] == 0) continue;
    const double share = counts[i] / (before + counts[i]), pull = before * share;
    const double *from_mean = means + i * stride, *from_moment = moments + i * stride;
    for (int64_t c = first; c < last; ++c) {
      double delta = from_mean[c] - mean[c];
      mean[c] += delta * share;
      moment[c] += from_moment[c] + delta * delta * pull;
    }
    before += counts[i];
  }
}

// One block of BLOCK elements at `at`, the channels' numbers at `c`.
template <bool RESIDUAL, bool RELU, bool STREAM, typename T>
static inline void forward_block(const Forward<T>& job, int64_t at, int64_t c, vf limit) {
  uint32_t bits = 0;
  for (int v = 0; v < V; ++v) {
    const int64_t p = at + v * W, k = c + v * W;
    vf y = (load(job.x + p) - load(job.mean + k)) * load(job.scale + k) + load(job.shift + k);
    if (RESIDUAL) y += load(job.residual + p);
    if (RELU) {
      uint32_t lanes = lanes_above(y, limit);
      y = keep(y, lanes);
      bits |= lanes << (v * W);
    }
    put<STREAM>(job.y + p, y);
  }
  if (RESIDUAL && RELU && job.mask) std::memcpy(job.mask + at / 8, &bits, sizeof(bits));
}

template <bool RESIDUAL, bool RELU, bool STREAM, typename T>
static void forward_rows_as(const Shape& shape, const Forward<T>& given, int64_t first, int64_t last) {
  const Forward<T> job = given;  // a copy that no store can change: its pointers stay in registers
  const int64_t width = shape.width;
  const vf limit = splat(limit_of<T>);
  for (int64_t r = first; r < last; ++r) {
    const int64_t length = std::min(width, shape.total - r * width);
    int64_t c = 0;
    for (; c + BLOCK <= length; c += BLOCK) forward_block<RESIDUAL, RELU, STREAM>(job, r * width + c, c, limit);
    if (c == length) continue;
    const int64_t at = r * width + c, left = length - c;
    T x[BLOCK] = {}, residual[BLOCK] = {}, y[BLOCK];
    uint8_t mask[BLOCK / 8];
    std::memcpy(x, job.x + at, left * sizeof(T));
    if (RESIDUAL) std::memcpy(residual, job.residual + at, left * sizeof(T));
    Forward<T> end{x, residual, job.mean, job.scale, job.shift, y, job.mask ? mask : nullptr, job.relu, false};
    forward_block<RESIDUAL, RELU, false>(end, 0, c, limit);
    std::memcpy(job.y + at, y, left * sizeof(T));
    if (job.mask) std::memcpy(job.mask + at / 8, mask, (left + 7) / 8);
  }
}

// f<true> or f<false>: no branch is left in the loops, where it costs as much as the memory does.
template <typename F>
static inline void either(bool flag, F f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

template <typename T>
static void forward_rows(const Shape& shape, const Forward<T>& job, int64_t first, int64_t last) {
  either(job.residual != nullptr, [&](auto residual) {
    either(job.relu, [&](auto relu) {
      either(job.stream, [&](auto stream) {
        forward_rows_as<decltype(residual)::value, decltype(relu)::value, decltype(stream)::value>(shape, job, first,
                                                                                                   last);
      });
    });
  });
}

// The gradient behind the ReLU; `d` = x - mean. The comparison is the forward's, to the bit.
template <Gate GATE>
static inline vf gated(vf g, vf d, const float* scale, const float* shift, vf limit, uint32_t bits) {
  if (GATE == Gate::none) return g;
  if (GATE == Gate::stored) return keep(g, bits);
  vf y = d * load(scale) + load(shift);
  return keep(g, lanes_above(y, limit));
}

template <Gate GATE>
static inline uint32_t bits_at(const uint8_t* mask, int64_t at) {
  uint32_t bits = 0;
  if (GATE == Gate::stored) std::memcpy(&bits, mask + at / 8, sizeof(bits));
  return bits;
}

// Adds a block to the sums of g and of g * (x - mean).
template <Gate GATE, typename T>
static inline void add_sums(const Backward<T>& job, int64_t at, int64_t c, vf limit, float* sum_g, float* sum_gd) {
  const uint32_t bits = bits_at<GATE>(job.mask, at);
  for (int v = 0; v < V; ++v) {
    const int64_t p = at + v * W, k = c + v * W;
    vf d = load(job.x + p) - load(job.mean + k);
    vf g = gated<GATE>(load(job.grad + p), d, job.scale + k, job.shift + k, limit, bits >> (v * W));
    store(sum_g + k, load(sum_g + k) + g);
    store(sum_gd + k, load(sum_gd + k) + g * d);
  }
}

template <Gate GATE, typename T>
static void segment_sums_as(const Shape& shape, const Backward<T>& given, int64_t first, int64_t last, float* work,
                            double* total_g, double* total_gd) {
  const Backward<T> job = given;
  const int64_t width = shape.width;
  const vf limit = splat(limit_of<T>);
  float *sum_g = work, *sum_gd = work + width;
  for (int64_t k = 0; k < width; ++k) total_g[k] = total_gd[k] = 0;
  for (int64_t start = first; start < last; start += CHUNK) {
    const int64_t stop = std::min(start + CHUNK, last);
    std::memset(work, 0, 2 * width * sizeof(float));
    for (int64_t r = start; r < stop; ++r) {
      const int64_t length = std::min(width, shape.total - r * width);
      int64_t c = 0;
      for (; c + BLOCK <= length; c += BLOCK) add_sums<GATE>(job, r * width + c, c, limit, sum_g, sum_gd);
      if (c == length) continue;
      const int64_t at = r * width + c, left = length - c;
      T grad[BLOCK] = {}, x[BLOCK] = {};  // a gradient of 0 adds nothing
      uint8_t mask[BLOCK / 8] = {};
      std::memcpy(grad, job.grad + at, left * sizeof(T));
      std::memcpy(x, job.x + at, left * sizeof(T));
      if (GATE == Gate::stored) std::memcpy(mask, job.mask + at / 8, (left + 7) / 8);
      Backward<T> end = job;
      end.grad = grad, end.x = x, end.mask = mask;
      add_sums<GATE>(end, 0, c, limit, sum_g, sum_gd);
    }
    for (int64_t k = 0; k < width; ++k) {
      total_g[k] += sum_g[k];
      total_gd[k] += sum_gd[k];
    }
  }
}

template <typename T>
static void segment_sums(const Shape& shape, const Backward<T>& job, int64_t first, int64_t last, float* work,
                         double* total_g, double* total_gd) {
  switch (job.gate) {
    case Gate::none: return segment_sums_as<Gate::none>(shape, job, first, last, work, total_g, total_gd);
    case Gate::stored: return segment_sums_as<Gate::stored>(shape, job, first, last, work, total_g, total_gd);
    case Gate::recomputed: return segment_sums_as<Gate::recomputed>(shape, job, first, last, work, total_g, total_gd);
  }
}

// Totals over segments, in their order, and what they are the gradients of. The rest of the mean comes in here.
static void join_sums(const Shape& shape, const double* total_g, const double* total_gd, const double* mean,
                      const double* var, double eps, double* sums, float* grad_weight, float* grad_bias) {
  const int64_t C = shape.channels, parts = shape.segments * shape.fold;
  double *__restrict g = sums, *__restrict gd = sums + C;
  for (int64_t c = 0; c < 2 * C; ++c) sums[c] = 0;
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t c = 0; c < C; ++c) {
      g[c] += total_g[i * C + c];
      gd[c] += total_gd[i * C + c];
    }
  for (int64_t c = 0; c < C; ++c) {
    gd[c] -= (mean[c] - static_cast<float>(mean[c])) * g[c];
    grad_weight[c] = static_cast<float>(gd[c] / __builtin_sqrt(var[c] + eps));
    grad_bias[c] = static_cast<float>(g[c]);
  }
}

template <Gate GATE, bool BATCH, bool RESIDUAL, bool STREAM, typename T>
static inline void backward_block(const Backward<T>& job, int64_t at, int64_t c, vf limit) {
  const uint32_t bits = bits_at<GATE>(job.mask, at);
  for (int v = 0; v < V; ++v) {
    const int64_t p = at + v * W, k = c + v * W;
    vf d{};
    if (BATCH || GATE == Gate::recomputed) d = load(job.x + p) - load(job.mean + k);
    vf g = gated<GATE>(load(job.grad + p), d, job.scale + k, job.shift + k, limit, bits >> (v * W));
    if (RESIDUAL) put<STREAM>(job.dresidual + p, g);
    vf dx = load(job.scale + k) * g;
    if (BATCH) dx += d * load(job.slope + k) + load(job.offset + k);
    put<STREAM>(job.dx + p, dx);
  }
}

template <Gate GATE, bool BATCH, bool RESIDUAL, bool STREAM, typename T>
static void backward_rows_as(const Shape& shape, const Backward<T>& given, int64_t first, int64_t last) {
  const Backward<T> job = given;
  const int64_t width = shape.width;
  const vf limit = splat(limit_of<T>);
  for (int64_t r = first; r < last; ++r) {
    const int64_t length = std::min(width, shape.total - r * width);
    int64_t c = 0;
    for (; c + BLOCK <= length; c += BLOCK)
      backward_block<GATE, BATCH, RESIDUAL, STREAM>(job, r * width + c, c, limit);
    if (c == length) continue;
    const int64_t at = r * width + c, left = length - c;
    T grad[BLOCK] = {}, x[BLOCK] = {}, dx[BLOCK], dresidual[BLOCK];
    uint8_t mask[BLOCK / 8] = {};
    std::memcpy(grad, job.grad + at, left * sizeof(T));
    std::memcpy(x, job.x + at, left * sizeof(T));
    if (GATE == Gate::stored) std::memcpy(mask, job.mask + at / 8, (left + 7) / 8);
    Backward<T> end = job;
    end.grad = grad, end.x = x, end.mask = mask;
    end.dx = dx, end.dresidual = dresidual;
    backward_block<GATE, BATCH, RESIDUAL, false>(end, 0, c, limit);
    std::memcpy(job.dx + at, dx, left * sizeof(T));
    if (RESIDUAL) std::memcpy(job.dresidual + at, dresidual, left * sizeof(T));
  }
}

template <Gate GATE, bool RESIDUAL, typename T>
static void backward_rows_gated(const Shape& shape, const Backward<T>& job, int64_t first, int64_t last) {
  either(job.batch, [&](auto batch) {
    either(job.stream, [&](auto stream) {
      backward_rows_as<GATE, decltype(batch)::value, RESIDUAL, decltype(stream)::value>(shape, job, first, last);
    });
  });
}

template <typename T>
static void backward_rows(const Shape& shape, const Backward<T>& job, int64_t first, int64_t last) {
  if (job.gate == Gate::none) return backward_rows_gated<Gate::none, false>(shape, job, first, last);
  if (job.gate == Gate::recomputed) return backward_rows_gated<Gate::recomputed, false>(shape, job, first, last);
  if (job.dresidual) return backward_rows_gated<Gate::stored, true>(shape, job, first, last);
  backward_rows_gated<Gate::stored, false>(shape, job, first, last);
}
