// One optimiser step over a stretch of flat memory, for one instruction set.

// The first n <= W values of p; the rest is zero.
template <typename T>
static inline vf load_some(const T* p, int64_t n) {
  T padded[W] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <typename T>
static inline void store_some(T* p, vf v, int64_t n) {
  T padded[W];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// All arithmetic is here, for whole vectors and for what is left of a tensor alike.
template <bool EMA>
static inline void advance(const Step& step, float decay, vf grad, vf& param, vf& buffer, vf& ema) {
  vf delta = grad * splat(step.inv_scale);
  if (decay != 0.0f) delta += param * splat(decay);  // not 0 times a parameter that is infinite
  buffer = buffer * splat(step.momentum) + delta;
  param -= buffer * splat(step.lr);
  // As torch's lerp: from the nearer end, so that a rate of 1 gives the parameter itself.
  if (EMA) ema = step.near ? ema + (param - ema) * splat(step.rate) : param - (param - ema) * splat(1 - step.rate);
}

template <bool EMA, typename G>
static void stretch(const Step& step, float decay, int64_t size, const G* grad, float* param, float* buffer,
                    float* ema) {
  vf e{};
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    vf p = load(param + i), b = load(buffer + i);
    if (EMA) e = load(ema + i);
    advance<EMA>(step, decay, load(grad + i), p, b, e);
    store(param + i, p);
    store(buffer + i, b);
    if (EMA) store(ema + i, e);
  }
  const int64_t left = size - i;
  if (!left) return;
  vf p = load_some(param + i, left), b = load_some(buffer + i, left);
  if (EMA) e = load_some(ema + i, left);
  advance<EMA>(step, decay, load_some(grad + i, left), p, b, e);
  store_some(param + i, p, left);
  store_some(buffer + i, b, left);
  if (EMA) store_some(ema + i, e, left);
}

// `copy` = `from` rounded; what was just written is still in the first-level cache. The copies go past it where they may:
// the forward reads them when 300 MB of other weights have passed, and a line that is written whole need not be read.
template <typename T>
static void round_to(int64_t size, const float* from, T* copy) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(copy) % (W * sizeof(T)) == 0)
    for (; i + W <= size; i += W) put<true>(copy + i, load(from + i));
  else
    for (; i + W <= size; i += W) put<false>(copy + i, load(from + i));
  if (i < size) store_some(copy + i, load_some(from + i, size - i), size - i);
}
