// Loops of contrastive_ce.cpp. With c = x_hat . k_hat, s = c / temperature and s' = f(c) / temperature, per query:
//   forward:  log sum_P e^s', sum_P s', log sum_N e^((1+a) s), log sum_N e^(a s), max_P s, max_N s, |P|, |N|,
//   backward: dL/ds of a positive (A e^(s' - lse_P) + B) f'(c), of a negative C e^((1+a)s - lse_N) - H e^(a s - lse_a),
//             g_n = (1 / temperature) sum_m dL/ds_nm k_hat_m, dx_n = (g_n - (g_n . x_hat_n) x_hat_n) / |x_n|; so for k.
//
// statistics: a tile of queries by a block of keys that stays in L2: cosines [key][query] by a product, then one pass.
// Queries lie along the vectors, so that every sum stays in its lane. A vector of queries meets a key of its own id or
// image rarely: two compares find out, and the other keys need neither masks nor margins.
// query_gradient: the cosines once more, turned into G = dL/ds in place, then dx_hat += G k_hat; the G of learnt keys
// are kept for key_gradient, dk_hat += G^T x_hat, which has a few keys and all queries.
// The order of a sum is fixed by the sizes: nothing depends on the number of threads.

#include "contrastive_ce_pairs.inl"

constexpr float LEAST_SINE_SQUARED = 1e-6f;  // as the reference's

static inline vf square_root(vf v) {
#if defined(FASTREX_AVX512)
  return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(FASTREX_AVX2)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

static inline vf with_margin(const Loss& l, vf c) {
  if (l.margin_kind == 0) return c;
  if (l.margin_kind == 1) return c - l.margin;
  const vf sine = square_root(larger(1.0f - c * c, splat(LEAST_SINE_SQUARED)));
  return c < -l.cosine ? c - l.margin * l.sine : c * l.cosine - sine * l.sine;
}
static inline vf margin_slope(const Loss& l, vf c) {
  if (l.margin_kind != 2) return splat(1.0f);
  const vf square = 1.0f - c * c, sine = square_root(larger(square, splat(LEAST_SINE_SQUARED)));
  const vf turned = l.cosine + select((vi)(square > LEAST_SINE_SQUARED), c * l.sine / sine);
  return c < -l.cosine ? splat(1.0f) : turned;
}

// What the queries of a vector are to one key.
struct Kinship {
  vi positive, negative;
  Kinship(const Pairs& p, int64_t key, vi id, vi instance) {
    const vi same = (vi)(id == p.key.id[key]), counted = ~(vi)(instance == p.key.instance[key]);
    positive = same & counted;
    negative = key < p.private_keys ? vi{} : ~same & counted;
  }
};

static inline vf grown(vf sum, vf old, vf now, float scale) {  // a sum of exponentials, relative to a new maximum
  return old == now ? sum : sum * exp2((old - now) * scale);
}

// Online: raises the running maxima to those of this block; what has been summed before shrinks accordingly.
template <bool HARD>
static void raise_maxima(const Pairs& p, const Loss& l, int64_t block, const float* z, vi id, vi instance, float* part,
                         int64_t span) {
  const vf old_negative = load(part + BEST_NEGATIVE * span), old_margin = load(part + BEST_MARGIN * span);
  const vf least = splat(-INFINITY);
  vf negative = old_negative, margin = old_margin;
  for (int64_t i = 0; i < p.keys_of(block); ++i) {
    const vf c = load(z + i * p.R);
    const Kinship kin(p, block * p.K + i, id, instance);
    negative = larger(negative, kin.negative ? c : least);
    margin = larger(margin, kin.positive ? with_margin(l, c) : least);
  }
  store(part + BEST_NEGATIVE * span, negative);
  store(part + BEST_MARGIN * span, margin);
  float *positives = part + SUM_POSITIVE * span, *negatives = part + SUM_NEGATIVE * span;
  float* hard = part + SUM_HARD * span;
  store(positives, grown(load(positives), old_margin, margin, l.positive));
  store(negatives, grown(load(negatives), old_negative, negative, l.negative));
  if constexpr (HARD) store(hard, grown(load(hard), old_negative, negative, l.hard));
}

// One block of cosines into the sums of a tile.
template <bool HARD, bool ONLINE>
static void accumulate(const Pairs& p, const Loss& l, int64_t tile, int64_t block, int64_t Rp, const float* cosine,
                       float* sums, int64_t span) {
  const int64_t n0 = p.row(tile), c0 = block * p.K, keys = p.keys_of(block);
  const vf least = splat(-INFINITY);
  for (int64_t j = 0; j < Rp; j += W) {
    const float* z = cosine + j;
    float* part = sums + n0 + j;
    const auto add = [&](Field field, vf v) { store(part + field * span, load(part + field * span) + v); };
    const vi id = load(p.query.id + n0 + j), instance = load(p.query.instance + n0 + j);
    vf shift_positive = splat(l.shift_positive), shift_negative = splat(l.shift_negative);
    vf shift_hard = splat(l.shift_hard);
    if constexpr (ONLINE) {
      raise_maxima<HARD>(p, l, block, z, id, instance, part, span);
      const vf negative = load(part + BEST_NEGATIVE * span);
      shift_positive = load(part + BEST_MARGIN * span) * l.positive;
      shift_negative = negative * l.negative, shift_hard = negative * l.hard;
    }
    // A block's sums first: they round less than one long chain.
    vf sum_positive{}, logit_positive{}, sum_negative{}, sum_hard{};
    vf best_positive = load(part + BEST_POSITIVE * span), best_negative = load(part + BEST_NEGATIVE * span);
    vi positives{}, negatives{};
    int32_t plain = 0;
    for (int64_t i = 0; i < keys; ++i) {
      const vf c = load(z + i * p.R);
      if (!any_equal(id, p.key.id[c0 + i], instance, p.key.instance[c0 + i])) {
        if (c0 + i < p.private_keys) continue;
        sum_negative += exp2(c * l.negative - shift_negative);
        if constexpr (HARD) sum_hard += exp2(c * l.hard - shift_hard);
        best_negative = larger(best_negative, c);
        ++plain;
        continue;
      }
      const Kinship kin(p, c0 + i, id, instance);
      const vf own = with_margin(l, c);
      const vf e = exp2(kin.positive ? own * l.positive - shift_positive : c * l.negative - shift_negative);
      sum_positive += select(kin.positive, e);
      logit_positive += select(kin.positive, own);
      sum_negative += select(kin.negative, e);
      if constexpr (HARD) sum_hard += select(kin.negative, exp2(c * l.hard - shift_hard));
      best_positive = larger(best_positive, kin.positive ? c : least);
      best_negative = larger(best_negative, kin.negative ? c : least);
      positives -= kin.positive;
      negatives -= kin.negative;
    }
    add(SUM_POSITIVE, sum_positive);
    add(LOGIT_POSITIVE, logit_positive);
    add(SUM_NEGATIVE, sum_negative);
    if constexpr (HARD) add(SUM_HARD, sum_hard);
    store(part + BEST_POSITIVE * span, best_positive);
    store(part + BEST_NEGATIVE * span, best_negative);
    int32_t *count_p = (int32_t*)(part + POSITIVES * span), *count_n = (int32_t*)(part + NEGATIVES * span);
    store(count_p, load(count_p) + positives);
    store(count_n, load(count_n) + negatives + plain);
  }
}

// Fields of a tile over the blocks [block0, block1); ``z``: scratch [K][R].
static void statistics(const Pairs& p, const Loss& l, int64_t tile, int64_t block0, int64_t block1, float* sums,
                       int64_t span, float* z) {
  for (int64_t field = 0; field < FIELDS; ++field)
    fill(sums + field * span + p.row(tile), p.R,
         field == BEST_POSITIVE || field == BEST_NEGATIVE || field == BEST_MARGIN ? -INFINITY : 0.0f);
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t Rp = cosines(p, tile, block, z);
    if (l.hard > 0.0f && l.online) accumulate<true, true>(p, l, tile, block, Rp, z, sums, span);
    else if (l.hard > 0.0f) accumulate<true, false>(p, l, tile, block, Rp, z, sums, span);
    else if (l.online) accumulate<false, true>(p, l, tile, block, Rp, z, sums, span);
    else accumulate<false, false>(p, l, tile, block, Rp, z, sums, span);
  }
}

// Cosines -> dL/ds, in place.
template <bool HARD>
static void slopes(const Pairs& p, const Loss& l, int64_t tile, int64_t block, int64_t Rp, float* cosine,
                   const float* terms, int64_t span) {
  const int64_t n0 = p.row(tile), c0 = block * p.K, keys = p.keys_of(block);
  for (int64_t j = 0; j < Rp; j += W) {
    const auto term = [&](Term t) { return load(terms + t * span + n0 + j); };
    const vi id = load(p.query.id + n0 + j), instance = load(p.query.instance + n0 + j);
    const vf c_negative = term(C), c_hard = term(H), log_negative = term(LOG_NEGATIVE), log_hard = term(LOG_HARD);
    const auto of_negative = [&](vf c) {
      vf g = c_negative * exp2(c * l.negative - log_negative);
      if constexpr (HARD) g -= c_hard * exp2(c * l.hard - log_hard);
      return g;
    };
    for (int64_t i = 0; i < keys; ++i) {
      float* z = cosine + i * p.R + j;
      const vf c = load(z);
      if (!any_equal(id, p.key.id[c0 + i], instance, p.key.instance[c0 + i])) {
        store(z, c0 + i < p.private_keys ? vf{} : of_negative(c));
        continue;
      }
      const Kinship kin(p, c0 + i, id, instance);
      const vf own = with_margin(l, c) * l.positive - term(LOG_POSITIVE);
      const vf positive = (term(A) * exp2(own) + term(B)) * margin_slope(l, c);
      store(z, select(kin.positive, positive) + select(kin.negative, of_negative(c)));
    }
  }
}

// A tile's rows of dx [tiles * R][Dp] += G k_hat over the blocks [block0, block1). With ``keep`` G stays there,
// [key][R], else it is lost in the scratch z.
static void query_gradient(const Pairs& p, const Loss& l, int64_t tile, int64_t block0, int64_t block1,
                           const float* terms, int64_t span, float* keep, float* dx, float* z) {
  const int64_t Dw = round_up(p.D, W);
  for (int64_t block = block0; block < block1; ++block) {
    if (keep) z = keep, keep += p.K * p.R;
    const int64_t Rp = cosines(p, tile, block, z), keys = p.keys_of(block);
    if (l.hard > 0.0f) slopes<true>(p, l, tile, block, Rp, z, terms, span);
    else slopes<false>(p, l, tile, block, Rp, z, terms, span);
    if (dx)
      gemm<M2, V2>(p.rows(tile), Dw, keys, Left{z, 1, p.R, keys, 0}, p.keys + block * p.K * p.Dp, p.K * P2,
                   dx + p.row(tile) * p.Dp, p.Dp, true);
  }
}

// A gradient by the unit vector [Dw], times ``scale``, into one by the row: without its part along it, over the norm.
// ``unit``: scratch [Dw].
static void through_norm(const Side& side, int64_t row, int64_t D, float* g, float scale, float* unit, Kind kind,
                         char* out) {
  const int64_t Dw = round_up(D, W);
  const float inverse = side.inverse[row];
  if (inverse == 0.0f) {
    fill(g, Dw, 0.0f);
    return write_row(kind, g, D, out, side.index[row]);
  }
  copy_row(side.rows.kind, side.rows.row(side.index[row]), D, inverse, unit, Dw);
  vf dot{};
  for (int64_t d = 0; d < Dw; d += W) dot += load(g + d) * load(unit + d);
  const float along = sum(dot), factor = inverse * scale;
  for (int64_t d = 0; d < Dw; d += W) store(g + d, (load(g + d) - load(unit + d) * along) * factor);
  write_row(kind, g, D, out, side.index[row]);
}

// Sums of the splits, [split][tiles * R][Dp], into dx; ``scratch``: 2 rows.
static void finish_queries(const Pairs& p, int64_t tile, int64_t splits, const float* parts, int64_t span, float scale,
                           float* scratch, Kind kind, char* out) {
  const int64_t Dw = round_up(p.D, W);
  for (int64_t r = p.row(tile); r < p.row(tile) + p.rows(tile); ++r) {
    for (int64_t d = 0; d < Dw; d += W) {
      vf total{};
      for (int64_t s = 0; s < splits; ++s) total += load(parts + (s * span + r) * p.Dp + d);
      store(scratch + d, total);
    }
    through_norm(p.query, r, p.D, scratch, scale, scratch + Dw, kind, out);
  }
}

constexpr int64_t CHUNK = 48;  // keys of a task: a multiple of M2 whose sums stay in L2

// dk of at most CHUNK keys from ``first`` on, of which the range that is kept begins with ``range0`` and has ``range``
// keys: kept [tile][key of the range][R]. ``scratch``: CHUNK + 1 rows.
static void key_gradient(const Pairs& p, const float* kept, int64_t range0, int64_t range, int64_t first, int64_t last,
                         float scale, float* scratch, Kind kind, char* out) {
  const int64_t Dw = round_up(p.D, W), keys = smaller(CHUNK, last - first);
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int64_t rows = p.rows(tile);
    const float* g = kept + (tile * range + first - range0) * p.R;
    gemm<M2, V2>(keys, Dw, rows, Left{g, p.R, 1, rows, 0}, p.query_panels + tile * p.R * p.Dp, p.R * P2, scratch, Dw,
                 tile > 0);
  }
  for (int64_t i = 0; i < keys; ++i)
    through_norm(p.key, first + i, p.D, scratch + i * Dw, scale, scratch + CHUNK * Dw, kind, out);
}
