// The tasks of cosine_ce.inl, which explains them.

static void multiply_low(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                         const c10::BFloat16* a, const c10::BFloat16* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, true);
}

template <bool LOW>
static void finish(const Job& job, int64_t tile, const float* dx, int64_t split_stride, float* row);

template <bool LOW>
static void sweep(const Job& job, int64_t tile, int64_t split, float* base) {
  const Scratch<LOW> own(job, base);
  const int64_t R = job.R, D = job.D, n0 = job.row0 + tile * R, rows = smaller(R, job.row1 - n0);
  const int64_t Dp = round_up(D, W), D2 = round_up(D, 2), low_ld = round_up(D, 32), Rp = round_up(rows, W);
  const int64_t blocks = (job.class1 - job.class0 + job.K - 1) / job.K;
  const int64_t block0 = blocks * split / job.S, block1 = blocks * (split + 1) / job.S;
  const Pass pass = job.given ? Pass::given : job.want_dx || job.keep ? Pass::forward : Pass::stats;
  const int64_t place = split * job.span + n0 - job.base;
  float *v = own.vectors, *dx = job.partial_dx ? job.partial_dx + place * Dp : own.acc;

  if (LOW && Dp != D && !(job.add && job.partial_dx))  // brgemm leaves the last vector's rest as it is
    for (int64_t r = 0; job.want_dx && r < rows; ++r) fill(dx + r * Dp + D, Dp - D, 0.0f);

  // x_hat of the tile with features along k: [panel][k][P1], or for LOW [k / 2][row][2].
  fill(v, 8 * R, 0.0f);
  if constexpr (LOW) {
    auto* natural = (c10::BFloat16*)own.rows;
    for (int64_t r = 0; r < Rp; ++r) {
      const float inverse = r < rows ? job.inv_x[n0 + r] : 0.0f, exact = power_of_two(inverse);
      copy_row(job.x.kind, r < rows ? job.x.row(n0 + r) : nullptr, D, exact, natural + r * low_ld, low_ld);
      v[r] = inverse == 0.0f ? 0.0f : inverse / exact;
    }
    transpose_rows(own.rows, low_ld / 2, Rp, low_ld / 2, Rp, own.xt);
  } else {
    for (int64_t r = 0; r < Rp; ++r) {
      const float inverse = r < rows ? job.inv_x[n0 + r] : 0.0f;
      copy_row(job.x.kind, r < rows ? job.x.row(n0 + r) : nullptr, D, inverse, own.rows + r * Dp, Dp);
      v[r] = 1.0f;
    }
    for (int64_t r = 0; r < Rp; r += P1)
      transpose_rows(own.rows + r * Dp, Dp, smaller(P1, Rp - r), Dp, P1, own.xt + r * Dp);
  }

  // The target's logit, by the same chain of sums as the products below, so that an equal logit compares as equal.
  if (pass != Pass::given) {
    for (int64_t r = 0; r < Rp; ++r) {
      const int64_t y = r < rows ? job.label[n0 + r] : -1;
      if constexpr (LOW)
        copy_row(job.w.kind, y < 0 ? nullptr : job.w.row(y), D, 1.0f, (c10::BFloat16*)own.rows + r * low_ld, low_ld);
      else
        copy_row(job.w.kind, y < 0 ? nullptr : job.w.row(y), D, 1.0f, own.rows + r * Dp, Dp);
    }
    float* dots = v + 6 * R;
    if constexpr (LOW) {
      float square[256];
      for (int64_t r = 0; r < Rp; r += W) {
        multiply_low(W, W, D2, low_ld, Rp, W, false, (c10::BFloat16*)own.rows + r * low_ld,
                     (c10::BFloat16*)own.xt + r * 2, square);
        for (int i = 0; i < W; ++i) dots[r + i] = square[i * W + i];
      }
    } else {
      for (int64_t r = 0; r < Rp; r += P1)
        transpose_rows(own.rows + r * Dp, Dp, smaller(P1, Rp - r), Dp, P1, own.acc + r * Dp);
      for (int64_t r = 0; r < Rp; r += W) {
        const float *a = own.acc + r / P1 * P1 * Dp + r % P1, *b = own.xt + r / P1 * P1 * Dp + r % P1;
        vf dot{};
        for (int64_t k = 0; k < Dp; ++k) dot += load(a + k * P1) * load(b + k * P1);
        store(dots + r, dot);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = job.label[n0 + r];
      const float z = y < 0 ? 0.0f : dots[r] * v[r] * (job.inv_w[y] * job.inv_tau);
      if (split == 0) job.target_z[n0 + r] = z;
      v[R + r] = job.threshold ? job.threshold[n0 + r] : y < 0 ? NAN : z;
    }
  }
  float target[MAX_R];  // with ``given``, taken from the block that holds it
  for (int64_t r = 0; r < rows; ++r) {
    v[2 * R + r] = job.given ? job.given[n0 + r] : job.online ? -INFINITY : job.inv_tau;
    if (job.given) v[5 * R + r] = job.total[n0 + r];
  }

  for (int64_t block = block0; block < block1; ++block) {
    const int64_t c0 = job.class0 + block * job.K, K = smaller(job.K, job.class1 - c0), Kp = round_up(K, W);
    const bool add = block > block0 || (job.add && job.partial_dx);
    float* z = own.z;
    if constexpr (LOW) {
      const c10::BFloat16* a = (const c10::BFloat16*)job.w.row(c0);
      int64_t lda = job.w.stride;
      if (job.w.kind != Kind::bf16 || D % 2) {
        for (int64_t c = 0; c < K; ++c)
          copy_row(job.w.kind, job.w.row(c0 + c), D, 1.0f, own.low_rows + c * low_ld, low_ld);
        a = own.low_rows, lda = low_ld;
      }
      multiply_low(K, Rp, D2, lda, Rp, R, false, a, (c10::BFloat16*)own.xt, z);
      if (job.want_dx) {
        interleave(a, lda, K / 2 * 2, D, own.pairs);
        if (K % 2) {
          const uint16_t* lone = (const uint16_t*)(a + (K - 1) * lda);
          uint32_t* to = (uint32_t*)(own.pairs + (K - 1) * D);
          for (int64_t d = 0; d < D; ++d) to[d] = lone[d];
        }
      }
    } else {
      if (job.keep) z = kept<LOW>(job, tile, c0);
      pack_panels(job.w, c0, K, K, D, nullptr, own.weights);
      gemm<M1, V1>(K, Rp, Dp, Left{own.weights, P2, 1, P2, K * P2}, own.xt, Dp * P1, z, R, false);
    }
    if (job.online) {
      raise_maximum(job, c0, K, rows, Rp, R, z, v, dx, Dp, add && job.want_dx);
      if (job.block_m) std::memcpy(job.block_m + block * job.span + n0 - job.base, v + 2 * R, rows * sizeof(float));
    }
    if (job.q.data) soft_shares(job, n0, rows, Rp, c0, K, own.rows, own.shares);
    for (int64_t r = 0; r < rows; ++r)
      if (const int64_t y = job.label[n0 + r]; y >= c0 && y < c0 + K) {
        target[r] = z[(y - c0) * R + r] * v[r] * (job.inv_w[y] * job.inv_tau);
        // The target does not count, whatever rounding made of it.
        if (pass != Pass::given && target[r] > v[R + r]) ((int32_t*)v)[4 * R + r] -= 1;
      }
    const bool soft = job.q.data != nullptr;
    if (pass == Pass::forward) exponentials<Pass::forward, false>(job, c0, K, Rp, R, z, nullptr, v);
    if (pass == Pass::stats && !soft) exponentials<Pass::stats, false>(job, c0, K, Rp, R, z, nullptr, v);
    if (pass == Pass::stats && soft) exponentials<Pass::stats, true>(job, c0, K, Rp, R, z, own.shares, v);
    if (pass == Pass::given && !soft) exponentials<Pass::given, false>(job, c0, K, Rp, R, z, nullptr, v);
    if (pass == Pass::given && soft) exponentials<Pass::given, true>(job, c0, K, Rp, R, z, own.shares, v);
    if (pass == Pass::stats) continue;
    if (!soft)
      for (int64_t r = 0; r < rows; ++r)
        if (const int64_t y = job.label[n0 + r]; y >= c0 && y < c0 + K) {
          float& e = z[(y - c0) * R + r];
          e = pass == Pass::forward ? 0.0f : e - job.own[n0 + r] * job.inv_w[y];
          if (pass == Pass::given) v[7 * R + r] -= job.own[n0 + r] * target[r];
        }
    if constexpr (LOW) {
      if (job.keep) {
        c10::BFloat16* to = kept<LOW>(job, tile, c0);
        for (int64_t i = 0; i < K; ++i)
          for (int64_t j = 0; j < Rp; j += W) store(to + i * R + j, load(z + i * R + j));
      }
      if (job.want_dx) {
        for (int64_t c = K; c < Kp; ++c) fill(z + c * R, Rp, 0.0f);
        for (int64_t c = 0; c < Kp; c += W)
          for (int64_t r = 0; r < Rp; r += W) {
            vf e[W];
            for (int i = 0; i < W; ++i) e[i] = load(z + (c + i) * R + r);
            transpose(e);
            for (int i = 0; i < W; ++i) store(own.low_e + (r + i) * Kp + c, e[i]);
          }
        multiply_low(rows, D, round_up(K, 2), Kp, D, Dp, add, own.low_e, own.pairs, dx);
      }
    } else if (job.want_dx) {
      gemm<M2, V2>(rows, Dp, K, Left{z, 1, R, K, 0}, own.weights, K * P2, dx, Dp, add);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool add = job.add && job.partial_dx;
    job.part_along[place + r] = v[7 * R + r] + (add ? job.part_along[place + r] : 0.0f);
  }
  if (!job.given)
    for (int64_t r = 0; r < rows; ++r) {
      job.part_m[place + r] = v[2 * R + r];
      job.part_s[place + r] = v[3 * R + r];
      job.part_count[place + r] = ((int32_t*)v)[4 * R + r];
      if (job.part_soft) job.part_soft[place + r] = v[5 * R + r];
    }
  if (!job.partial_dx && (job.want_dx || !job.given)) finish<LOW>(job, tile, dx, 0, own.rows);
}

static inline float maximum(const Job& job, int64_t n) {  // over the splits
  float m = job.part_m[n - job.base];
  for (int64_t i = 1; i < job.S; ++i)
    if (const float other = job.part_m[i * job.span + n - job.base]; other > m) m = other;
  return m;
}

// Online: brings a tile's e, each relative to the maximum known then, to the final one.
template <bool LOW>
static void rescale_kept(const Job& job, int64_t tile, int64_t rows) {
  float shrink[MAX_R];
  const int64_t n0 = job.row0 + tile * job.R, Rp = round_up(rows, W);
  for (int64_t c0 = job.class0, block = 0; c0 < job.class1; c0 += job.K, ++block) {
    bool all_one = true;
    fill(shrink, Rp, 1.0f);
    for (int64_t r = 0; r < rows; ++r) {
      shrink[r] = std::exp(job.block_m[block * job.span + n0 + r - job.base] - maximum(job, n0 + r));
      all_one &= shrink[r] == 1.0f;
    }
    if (all_one) continue;
    for (int64_t c = c0; c < smaller(c0 + job.K, job.class1); ++c) {
      auto* e = kept<LOW>(job, tile, c);
      for (int64_t j = 0; j < Rp; j += W) store(e + j, load(e + j) * load(shrink + j));
    }
  }
}

// ``row``: scratch of 3 rows of features.
template <bool LOW>
static void finish(const Job& job, int64_t tile, const float* dx, int64_t split_stride, float* row) {
  const int64_t R = job.R, D = job.D, Dp = round_up(D, W), n0 = job.row0 + tile * R, rows = smaller(R, job.row1 - n0);
  float *x = row, *g = row + Dp, *target = row + 2 * Dp;
  if (job.keep && job.online && !job.given) rescale_kept<LOW>(job, tile, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = n0 + r, y = job.label[n];
    const bool hard = y >= 0 && job.q.data == nullptr;
    const float total = job.total[n], grad = job.grad ? job.grad[n] : 1.0f;
    float ratio = 1.0f, slope = 0.0f, soft = 0.0f, m = 0.0f;  // of the sums in dx, of the target
    double along = 0;
    if (!job.given) {
      double s = 0;
      int64_t larger = 0;
      m = maximum(job, n);
      for (int64_t i = 0; i < job.S; ++i) {
        const int64_t at = i * job.span + n - job.base;
        s += job.part_s[at] * std::exp((double)job.part_m[at] - m);
        along += job.part_along[at] * std::exp((double)job.part_m[at] - m);
        larger += job.part_count[at];
        if (job.part_soft) soft += job.part_soft[at];
      }
      job.lse[n] = (float)(m + std::log(s));
      job.rank[n] = job.row_known[n] != 0.0f ? larger : -1;
      ratio = (float)(total / s);
      float share = 0.0f;  // what is kept for the target: e - own s / total
      if (hard) {
        const double e = std::exp((double)job.target_z[n] - m);
        slope = (float)(total * (e / s) - job.own[n]);
        if (total != 0.0f) share = (float)(e - job.own[n] * (s / total));
        soft += job.own[n] * job.target_z[n];
      }
      if (job.keep && hard) kept<LOW>(job, tile, y)[r] = share * job.inv_w[y];
    }
    copy_row(job.x.kind, job.x.row(n), D, job.inv_x[n], x, Dp);
    if (job.spread) {
      vf dot{};
      for (int64_t d = 0; d < Dp; d += W) dot += load(x + d) * load(job.spread + d);
      soft += job.inv_tau * sum(dot);
    }
    if (job.given)
      for (int64_t i = 0; i < job.S; ++i) along += job.part_along[i * job.span + n - job.base];
    else
      along *= ratio;
    along -= soft;
    if (!job.given) job.target_logit[n] = job.row_known[n] != 0.0f ? soft : 0.0f;
    if (job.keep && !job.given) job.factor[n] = job.row_known[n] != 0.0f ? ratio * job.inv_tau * job.inv_x[n] : 0.0f;
    if (!job.want_dx) continue;
    if (job.row_known[n] == 0.0f) {
      fill(g, Dp, 0.0f);
      job.radial[n] = 0.0f;
      write_row(job.dx_kind, g, D, job.dx, n);
      continue;
    }
    const bool own_term = hard && !job.given;
    if (own_term) copy_row(job.w.kind, job.w.row(y), D, slope * job.inv_w[y], target, Dp);
    vf dot{};
    for (int64_t d = 0; d < Dp; d += W) {
      vf total_d{};
      for (int64_t i = 0; i < (split_stride ? job.S : 1); ++i) {
        vf part = load(dx + i * split_stride + r * Dp + d);
        if (job.online && !job.given && job.S > 1)
          part *= (float)std::exp((double)job.part_m[i * job.span + n - job.base] - m);
        total_d += part;
      }
      total_d *= ratio;
      if (own_term) total_d += load(target + d);
      if (job.spread) total_d -= load(job.spread + d);
      total_d *= job.inv_tau;
      store(g + d, total_d);
      dot += total_d * load(x + d);
    }
    const float radial = sum(dot), scale = job.inv_x[n] * grad;
    for (int64_t d = 0; d < Dp; d += W) store(g + d, (load(g + d) - load(x + d) * radial) * scale);
    job.radial[n] = (float)along;  // not ``radial``, whose e may have been rounded to bfloat16
    write_row(job.dx_kind, g, D, job.dx, n);
  }
}

template <bool LOW>
static int64_t packed_size(const Job& job) {  // bytes per tile
  return LOW ? job.R * job.D * 2 : round_up(job.D, P2) * job.R * 4;
}
static int64_t packed_bytes(const Job& job, bool low) { return low ? packed_size<true>(job) : packed_size<false>(job); }

// x_hat times factor, as the right operand of class_gradient.
template <bool LOW>
static void pack_tile(const Job& job, int64_t tile, float* base) {
  const int64_t n0 = job.row0 + tile * job.R, rows = smaller(job.R, job.row1 - n0);
  char* out = job.packed_rows + tile * packed_size<LOW>(job);
  if constexpr (LOW) {
    const Scratch<LOW> own(job, base);
    const int64_t ld = round_up(job.D, 32);
    auto* natural = (c10::BFloat16*)own.rows;
    for (int64_t r = 0; r < job.R; ++r) {
      const float factor = r < rows ? job.factor[n0 + r] : 0.0f;
      copy_row(job.x.kind, r < rows ? job.x.row(n0 + r) : nullptr, job.D, factor, natural + r * ld, ld);
    }
    interleave(natural, ld, job.R, job.D, (c10::BFloat16*)out);
  } else {
    pack_panels(job.x, n0, rows, job.R, job.D, job.factor + n0, (float*)out);
  }
}

// Sum of the known rows' x_hat * grad / tau; ``row`` is scratch.
static void sum_tile(const Job& job, int64_t tile, float* row, float* out) {
  const int64_t Dp = round_up(job.D, W), n0 = tile * job.R;
  fill(out, Dp, 0.0f);
  for (int64_t n = n0; n < smaller(n0 + job.R, job.N); ++n) {
    if (job.row_known[n] == 0.0f) continue;
    copy_row(job.x.kind, job.x.row(n), job.D, job.inv_x[n] * job.inv_tau * (job.grad ? job.grad[n] : 1.0f), row, Dp);
    for (int64_t d = 0; d < Dp; d += W) store(out + d, load(out + d) + load(row + d));
  }
}

constexpr int64_t CHUNK = 48;  // classes of a task: a multiple of M2 whose sums stay in L2

template <bool LOW>
static void class_gradient(const Job& job, int64_t chunk, float* base) {
  const int64_t R = job.R, D = job.D, Dp = round_up(D, W), c0 = job.class0 + chunk * CHUNK;
  const int64_t classes = smaller(CHUNK, job.class1 - c0), tiles = (job.row1 - job.row0 + R - 1) / R;
  float *acc = base, *row = base + CHUNK * Dp;
  if (!job.first)
    for (int64_t i = 0; i < classes; ++i)
      std::memcpy(acc + i * Dp, job.accumulated + (c0 - job.class0 + i) * D, D * sizeof(float));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t rows = smaller(R, job.row1 - job.row0 - tile * R);
    const bool add = tile > 0 || !job.first;
    const auto* e = kept<LOW>(job, tile, c0);
    const char* right = job.packed_rows + tile * packed_size<LOW>(job);
    if (tile + 1 < tiles) {  // the next tile's e have left the inner caches
      const char* next = (const char*)kept<LOW>(job, tile + 1, c0);
      for (int64_t i = 0; i < classes * R * (LOW ? 2 : 4); i += 64) __builtin_prefetch(next + i, 0, 2);
    }
    if constexpr (LOW)
      multiply_low(classes, D, round_up(rows, 2), R, D, Dp, add, e, (const c10::BFloat16*)right, acc);
    else
      gemm<M2, V2>(classes, Dp, rows, Left{e, R, 1, rows, 0}, (const float*)right, R * P2, acc, Dp, add);
  }
  for (int64_t i = 0; i < classes; ++i) {
    float* g = acc + i * Dp;
    const int64_t c = c0 + i;
    if (!job.last) {
      std::memcpy(job.accumulated + (c - job.class0) * D, g, D * sizeof(float));
      continue;
    }
    const float inverse = job.inv_w[c];
    if (job.sum) {
      const float share = job.smooth * inverse * (job.class_factor ? job.class_factor[c] : 1.0f);
      for (int64_t d = 0; d < Dp; d += W) store(g + d, load(g + d) - load(job.sum + d) * share);
    }
    copy_row(job.w.kind, job.w.row(c), D, inverse, row, Dp);
    vf dot{};
    for (int64_t d = 0; d < D; d += W) dot += load_part(g + d, D - d) * load(row + d);
    const float along = sum(dot);
    for (int64_t d = 0; d < D; d += W) store(g + d, load(g + d) - load(row + d) * along);
    write_row(job.dw_kind, g, D, job.dw, c);
  }
}
