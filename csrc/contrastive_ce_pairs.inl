// Cosines of all pairs, a tile of queries by a block of keys at a time, for contrastive_ce.inl and nearest_keys.inl.

#include "gemm.inl"

static inline vi load(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store(int32_t* p, vi v) { std::memcpy(p, &v, sizeof(v)); }
static inline vf select(vi mask, vf v) { return (vf)((vi)v & mask); }  // 0 elsewhere, also of a NaN

// One bit per lane of a mask.
static inline uint32_t bits(vi mask) {
#if defined(FASTREX_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(FASTREX_AVX2)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
  uint32_t found = 0;
  for (int i = 0; i < W; ++i) found |= (uint32_t)(mask[i] != 0) << i;
  return found;
#endif
}
// Whether a lane of a equals x or one of b equals y.
static inline bool any_equal(vi a, int32_t x, vi b, int32_t y) {
#if defined(FASTREX_AVX512)
  return (_mm512_cmpeq_epi32_mask((__m512i)a, _mm512_set1_epi32(x)) |
          _mm512_cmpeq_epi32_mask((__m512i)b, _mm512_set1_epi32(y))) != 0;
#else
  return bits((vi)(a == x) | (vi)(b == y)) != 0;
#endif
}

static void norms(const Side& side, int64_t D, int64_t begin, int64_t end) {
  inverse_norms(side.rows, begin, end, D, const_cast<float*>(side.inverse), side.index);
}

// x_hat of a tile with queries along the vectors and, for the keys' gradient, with features along them.
// ``scratch``: W rows.
static void pack_queries(const Pairs& p, int64_t tile, float* scratch) {
  const int64_t n0 = p.row(tile), rows = p.rows(tile), Dw = round_up(p.D, W);
  float* out = p.queries + tile * p.R * p.Dp;
  for (int64_t r = 0; r < round_up(rows, W); r += W) {
    for (int64_t i = 0; i < W; ++i) {
      const bool there = r + i < rows;
      copy_row(p.query.rows.kind, there ? p.query.rows.row(p.query.index[n0 + r + i]) : nullptr, p.D,
               there ? p.query.inverse[n0 + r + i] : 0.0f, scratch + i * Dw, Dw);
    }
    transpose_rows(scratch, Dw, W, Dw, P1, out + r / P1 * Dw * P1 + r % P1);
  }
  if (p.query_panels)
    pack_panels(p.query.rows, n0, rows, p.R, p.D, p.query.inverse + n0, p.query_panels + tile * p.R * p.Dp,
                p.query.index);
}

static void pack_keys(const Pairs& p, int64_t block) {
  const int64_t c0 = block * p.K;
  pack_panels(p.key.rows, c0, p.keys_of(block), p.K, p.D, p.key.inverse + c0, p.keys + block * p.K * p.Dp,
              p.key.index);
}

// z [key][R] = k_hat . x_hat; returns how many columns are there, a multiple of W.
static int64_t cosines(const Pairs& p, int64_t tile, int64_t block, float* z) {
  const int64_t Rp = round_up(p.rows(tile), W), Dw = round_up(p.D, W);
  gemm<M1, V1>(p.keys_of(block), Rp, Dw, Left{p.keys + block * p.K * p.Dp, P2, 1, P2, p.K * P2},
               p.queries + tile * p.R * p.Dp, Dw * P1, z, p.R, false);
  return Rp;
}
