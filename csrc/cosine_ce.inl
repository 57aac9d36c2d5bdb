// Loops of cosine_ce.cpp. With z_nc = cos(x_n, w_c) / tau, e = exp(z - m), s = sum_c e and the shares a of the target:
//   loss_n = A lse_n - sum_c a_nc z_nc,  dL/dz_nc = A e_nc / s - a_nc,
//   g_n = (1 / tau) sum_c dL/dz_nc w_hat_c,  dx_n = (g_n - (g_n . x_hat_n) x_hat_n) / |x_n|, and the same for w.
//
// sweep: one tile of R rows over a range of classes, in blocks of K classes that stay in L2: z [class][row] by a
// product, then e, sums and ranks in one pass over it, then g += e w_hat by a second product. Since |z| <= 1 / tau no
// maximum is needed (m = 1 / tau); only for a tau so small that e would underflow the running one is kept ("online").
// finish: a tile's rows, when all classes have been seen: sums over splits, lse, the target's term, dx.
// class_gradient: a few classes over all tiles of the pass: dw_hat += e^T (x_hat factor) from the kept e, then dw.
// The shares of the target never enter the products of the forward: e of the target is set to 0 there, and its exact
// coefficient A p - a is added by ``finish``.
//
// LOW: products of bfloat16 with float sums (brgemm, which uses AMX or avx512_bf16), else of floats by ``gemm``.
// x, w: read once per tile and pass, w from L2 or L3. NaN passes through every step; rows that count as zero have
// inv_x = 0. Results do not depend on the number of threads: every sum has an order fixed by the shapes.

#include "gemm.inl"

// Pairs of rows side by side, as bfloat16 products take their right operand: out [rows / 2][columns][2].
static void interleave(const c10::BFloat16* in, int64_t ld, int64_t rows, int64_t columns, c10::BFloat16* out) {
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* a = (const uint16_t*)(in + r * ld);
    const uint16_t* b = a + ld;
    uint32_t* to = (uint32_t*)(out + r * columns);
    for (int64_t d = 0; d < columns; ++d) to[d] = a[d] | (uint32_t)b[d] << 16;
  }
}

// out [Dp] = sum over classes of smooth * class_factor * w_hat
static void weighted_classes(const Job& job, int64_t c0, int64_t c1, float* out, float* row) {
  const int64_t Dp = round_up(job.D, W);
  fill(out, Dp, 0.0f);
  for (int64_t c = c0; c < c1; ++c) {
    const float share = job.smooth * job.inv_w[c] * (job.class_factor ? job.class_factor[c] : 1.0f);
    copy_row(job.w.kind, job.w.row(c), job.D, share, row, Dp);
    for (int64_t d = 0; d < Dp; d += W) store(out + d, load(out + d) + load(row + d));
  }
}

// Slices of a thread's scratch memory, in floats.
template <bool LOW>
struct Scratch {
  float *xt, *rows, *z, *acc, *shares, *vectors, *weights;
  c10::BFloat16 *low_rows, *pairs, *low_e;
  int64_t total;
  Scratch(const Job& job, float* base) {
    const int64_t Dp = round_up(job.D, 32), R = job.R, K = round_up(job.K, 32);
    float* at = base;
    const auto take = [&](int64_t n) {
      float* p = at;
      at += round_up(n, 16);
      return p;
    };
    xt = take(R * Dp);
    acc = take(R * (Dp > K ? Dp : K));
    rows = take(R * (Dp > K ? Dp : K));
    z = take(R * K);
    weights = take(K * round_up(Dp, P2));
    shares = take(job.q.data ? R * K : 0);
    vectors = take(8 * R);
    low_rows = (c10::BFloat16*)take(LOW ? K * Dp / 2 : 0);
    pairs = (c10::BFloat16*)take(LOW ? K * Dp / 2 : 0);
    low_e = (c10::BFloat16*)take(LOW ? R * K / 2 : 0);
    total = at - base;
  }
};

static int64_t scratch_floats(const Job& job, bool low) {
  return low ? Scratch<true>(job, nullptr).total : Scratch<false>(job, nullptr).total;
}

enum class Pass { forward, stats, given };

// z [K][R] -> e times inv_w (or A p - a), and sums per row. ``v`` holds per row: 0 scale of z, 1 threshold, 2 m, 3 s,
// 4 larger logits, 5 A or soft logit, 7 sum of e z.
template <Pass PASS, bool SOFT>
static void exponentials(const Job& job, int64_t c0, int64_t K, int64_t Rp, int64_t ld, float* z, const float* shares,
                         float* v) {
  const int64_t R = job.R;
  for (int64_t j = 0; j < Rp; j += W) {
    const vf scale = load(v + j), threshold = load(v + R + j), m = load(v + 2 * R + j), extra = load(v + 5 * R + j);
    vf s{}, along{}, soft = extra;  // a sum per block first: it rounds less than one long chain
    vi larger = (vi)load(v + 4 * R + j);
    for (int64_t c = 0; c < K; ++c) {
      const float inverse = job.inv_w[c0 + c];
      const vf logit = load(z + c * ld + j) * scale * splat(inverse * job.inv_tau);
      const vf e = exp2((logit - m) * LOG2E);
      if constexpr (PASS == Pass::given) {
        vf slope = extra * e;
        if constexpr (SOFT) slope -= load(shares + c * R + j);
        along += slope * logit;
        store(z + c * ld + j, slope * inverse);
      } else {
        larger -= logit > threshold;
        s += e;
        along += e * logit;
        if constexpr (PASS == Pass::forward) store(z + c * ld + j, e * inverse);
        if constexpr (SOFT) soft += load(shares + c * R + j) * logit;
      }
    }
    store(v + 7 * R + j, load(v + 7 * R + j) + along);
    if constexpr (PASS != Pass::given) {
      store(v + 3 * R + j, load(v + 3 * R + j) + s);
      store(v + 4 * R + j, (vf)larger);
      if constexpr (SOFT) store(v + 5 * R + j, soft);
    }
  }
}

// Raises the running maximum to that of this block; what has been summed before shrinks accordingly.
static void raise_maximum(const Job& job, int64_t c0, int64_t K, int64_t rows, int64_t Rp, int64_t ld, const float* z,
                          float* v, float* acc, int64_t Dp, bool summed) {
  const int64_t R = job.R;
  for (int64_t j = 0; j < Rp; j += W) {
    const vf scale = load(v + j), old = load(v + 2 * R + j);
    vf m = old;
    for (int64_t c = 0; c < K; ++c) {
      const vf logit = load(z + c * ld + j) * scale * splat(job.inv_w[c0 + c] * job.inv_tau);
      m = logit > m ? logit : m;
    }
    const vf shrink = exp2((old - m) * LOG2E);
    store(v + 2 * R + j, m);
    store(v + 3 * R + j, load(v + 3 * R + j) * shrink);
    store(v + 7 * R + j, load(v + 7 * R + j) * shrink);
    store(v + 6 * R + j, shrink);
  }
  if (summed)
    for (int64_t r = 0; r < rows; ++r)
      if (const float shrink = v[6 * R + r]; shrink != 1.0f)
        for (int64_t d = 0; d < Dp; d += W) store(acc + r * Dp + d, load(acc + r * Dp + d) * shrink);
}

// Shares of soft targets [class][row], of the classes c0 .. c0 + K and the rows n0 ..
static void soft_shares(const Job& job, int64_t n0, int64_t rows, int64_t Rp, int64_t c0, int64_t K, float* natural,
                        float* out) {
  const int64_t Kp = round_up(K, W);
  for (int64_t r = 0; r < Rp; ++r) {
    const char* row = r < rows ? job.q.row((n0 + r) % job.q_rows) + c0 * job.q.size() : nullptr;
    copy_row(job.q.kind, row, K, 1.0f, natural + r * Kp, Kp);
  }
  float* part = natural;
  for (int64_t r = 0; r < Rp; r += W)
    for (int64_t k = 0; k < Kp; k += W) {
      vf v[W];
      for (int i = 0; i < W; ++i) v[i] = load(part + (r + i) * Kp + k);
      transpose(v);
      for (int i = 0; i < W; ++i) {
        const float factor = job.class_factor && k + i < K ? job.class_factor[c0 + k + i] : 1.0f;
        if (k + i < K) store(out + (k + i) * job.R + r, (v[i] * job.q_scale + job.q_add) * factor);
      }
    }
}

// Largest power of two in the inverse norm: scaling by it is exact, and keeps products of bfloat16 within range.
static inline float power_of_two(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xff800000u;
  if ((bits & 0x7f800000u) == 0x7f800000u || bits == 0) return x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// e of class c and row r of a tile among those kept.
template <bool LOW>
static inline auto* kept(const Job& job, int64_t tile, int64_t c) {
  using T = std::conditional_t<LOW, c10::BFloat16, float>;
  return (T*)job.keep + (tile * (job.class1 - job.class0) + c - job.class0) * job.R;
}

#include "cosine_ce_tasks.inl"
