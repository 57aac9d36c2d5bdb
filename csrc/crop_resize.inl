// One crop of crop_resize, for one instruction set; crop_resize.cpp has the formula.
//
// Sums of bytes times 24-bit coefficients, exact in int32 whatever their order. Four neighbouring bytes (pixels of a
// row for the horizontal pass, rows for the vertical one) share a 32-bit lane and are multiplied at once:
//   VNNI       u8 x s8, a coefficient as three signed digits of 8 bits:   c = d2 * 2^16 + d1 * 2^8 + d0
//   otherwise  s16 x s16 (pmaddwd), even and odd bytes apart, two digits:  c = d1 * 2^15 + d0,  0 <= d0 < 2^15
// Horizontal: W rows at a time, lane = row, so that an output column needs no gather. The results go to a ring of row
// quads, [column][4 rows] bytes each, from which the vertical pass (lane = column) makes an output row as soon as its
// last source row is there. A pixel is read once; a block of rows (24 or 48 KiB for 500 columns) and the ring stay in
// the caches.
//
// Groups of four begin at multiples of four, taps anywhere: coefficients before the first and after the last tap are
// zero, and so is their part of the sum, whatever byte stands there.

typedef double vd __attribute__((vector_size(4 * W)));
typedef int64_t vl __attribute__((vector_size(4 * W)));
constexpr int D = W / 2;
typedef int32_t vs __attribute__((vector_size(4 * D)));
typedef int32_t quad __attribute__((vector_size(16)));

#if defined(FASTREX_VNNI)
constexpr int DIGITS = 3, BITS = 8, PARTS = 1;
#else
constexpr int DIGITS = 2, BITS = 15, PARTS = 2;
#endif
constexpr int FACTORS = 4;  // 32-bit words of coefficients for four taps, the last unused with VNNI

// A group of four bytes in each lane, as multiplication takes it.
struct Bytes {
  vi part[PARTS];
};
struct Sum {
  vi digit[DIGITS];
};

static inline vi load_lanes(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store_lanes(int32_t* p, vi v) { std::memcpy(p, &v, sizeof(v)); }
static inline vi all(int32_t x) { return x - vi{}; }

static inline Bytes bytes_of(vi v) {
#if defined(FASTREX_VNNI)
  return {{v}};
#else
  return {{v & 0x00ff00ff, (v >> 8) & 0x00ff00ff}};
#endif
}

#if !defined(FASTREX_VNNI)
// Two products of 16-bit halves, added.
static inline vi pairs(vi a, vi b) {
#if defined(FASTREX_AVX512)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(FASTREX_AVX2)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
#endif

// sum += four bytes times four coefficients, `factor` as pack_factors leaves them.
static inline void multiply(Sum& sum, const Bytes& x, const vi* factor) {
#if defined(FASTREX_VNNI)
  for (int d = 0; d < 3; ++d)
    sum.digit[d] = (vi)_mm512_dpbusd_epi32((__m512i)sum.digit[d], (__m512i)x.part[0], (__m512i)factor[d]);
#else
  for (int d = 0; d < 2; ++d) sum.digit[d] += pairs(x.part[0], factor[2 * d]) + pairs(x.part[1], factor[2 * d + 1]);
#endif
}

// The rounded result before it is clipped to a byte.
static inline vi rounded(const Sum& sum) {
  vi total = sum.digit[DIGITS - 1];
  for (int d = DIGITS - 2; d >= 0; --d) total = (total << BITS) + sum.digit[d];
  return total >> PRECISION;
}

// One 16-byte piece for each 128-bit part of the lanes: part p of a, then of b, c and d, clipped to bytes.
static inline vi clipped(vi a, vi b, vi c, vi d) {
#if defined(FASTREX_AVX512)
  const __m512i ab = _mm512_packs_epi32((__m512i)a, (__m512i)b), cd = _mm512_packs_epi32((__m512i)c, (__m512i)d);
  return (vi)_mm512_packus_epi16(ab, cd);
#elif defined(FASTREX_AVX2)
  const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b), cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
  return (vi)_mm256_packus_epi16(ab, cd);
#elif defined(__x86_64__)
  return (vi)_mm_packus_epi16(_mm_packs_epi32((__m128i)a, (__m128i)b), _mm_packs_epi32((__m128i)c, (__m128i)d));
#else
  const vi every[4] = {a, b, c, d};
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) {
    const int32_t x = every[i / 4][i % 4];
    bytes[i] = static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
  }
  vi v;
  std::memcpy(&v, bytes, 16);
  return v;
#endif
}

// What clipped() gives, in the order of a[0..W), b[0..W), ...
static inline vi in_order(vi v) {
#if defined(FASTREX_AVX512)
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (vi)_mm512_permutexvar_epi32(order, (__m512i)v);
#elif defined(FASTREX_AVX2)
  return (vi)_mm256_permutevar8x32_epi32((__m256i)v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#else
  return v;
#endif
}

// Four coefficients as `multiply` takes them.
static inline quad pack_factors(quad c) {
#if defined(FASTREX_VNNI)
  // Adding half of each lower digit carries into the digit above it; what is added there is taken back.
  const quad digits = (c + 0x8080) ^ 0x8080;
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (quad)_mm_shuffle_epi8((__m128i)digits, transpose);
#else
  const quad low = c & 0x7fff, high = (c >> 15) & 0xffff;
  const quad first = __builtin_shuffle(low, high, quad{0, 1, 4, 5});
  const quad second = __builtin_shuffle(low, high, quad{2, 3, 6, 7});
  return first | (second << 16);
#endif
}

// The coefficients of one axis in double arithmetic, step by step as Pillow computes them: no product may be fused with
// a sum. A lane is an output; its taps are added up one after another.
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
static void weigh(const Axis& axis, double* weight) {
  const double stretch = static_cast<double>(axis.length) / axis.size, scale = stretch < 1 ? 1 : stretch;
  const vd inverse = 1.0 / scale - vd{};
  for (int64_t x = 0; x < axis.padded; x += D) {
    vd centre, start, count, sum{};
    std::memcpy(&centre, axis.centre + x, sizeof(vd));
    for (int i = 0; i < D; ++i) {
      start[i] = axis.start[x + i];
      count[i] = axis.count[x + i];
    }
    for (int64_t t = 0; t < axis.taps; ++t) {
      const vd place = static_cast<double>(t) - vd{};
      vd u = (start + place - centre + 0.5) * inverse;
      u = (vd)((vl)u & INT64_MAX);
      const vd near = (1.5 * u - 2.5) * u * u + 1.0, far = (((u - 5.0) * u + 8.0) * u - 4.0) * -0.5;
      const vd inside = u < 1.0 ? near : far, value = (u < 2.0) & (place < count) ? inside : vd{};
      sum += value;
      std::memcpy(weight + t * D, &value, sizeof(vd));
    }
    sum = sum == 0.0 ? 1.0 - vd{} : sum;
    for (int64_t t = 0; t < axis.taps; ++t) {
      vd value;
      std::memcpy(&value, weight + t * D, sizeof(vd));
      value = value / sum * static_cast<double>(1 << PRECISION);
      const vs whole = __builtin_convertvector(value + (value < 0.0 ? -0.5 - vd{} : 0.5 - vd{}), vs);
      int32_t each[D];
      std::memcpy(each, &whole, sizeof(each));
      for (int i = 0; i < D; ++i) axis.fixed[(x + i) * axis.stride + (axis.start[x + i] & 3) + t] = each[i];
    }
  }
}
#pragma GCC pop_options

static void coefficients(const Axis& axis, double* weight) {
  std::memset(axis.fixed, 0, axis.padded * axis.stride * sizeof(int32_t));
  weigh(axis, weight);
  for (int64_t x = 0; x < axis.padded; ++x)
    for (int64_t g = 0; g < axis.groups; ++g) {
      quad c;
      std::memcpy(&c, axis.fixed + x * axis.stride + 4 * g, sizeof(c));
      c = pack_factors(c);
      std::memcpy(axis.factor + (x * axis.groups + g) * FACTORS, &c, sizeof(c));
    }
}

// Four pixels from each row of the block, one channel in `rgb[0..3)` each: lane = row, byte = pixel. Reads 16 bytes.
static inline void spread(const uint8_t* const* row, int64_t offset, vi* rgb) {
#if defined(FASTREX_AVX2) || defined(FASTREX_AVX512)
  const __m128i order = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
  auto piece = [&](int i) { return _mm_loadu_si128((const __m128i*)(row[i] + offset)); };
#if defined(FASTREX_AVX512)
  __m512i v[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(i)), piece(4 + i), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(8 + i)), piece(12 + i), 1);
    v[i] = _mm512_shuffle_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), _mm512_broadcast_i32x4(order));
  }
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
  const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  rgb[0] = (vi)_mm512_unpacklo_epi64(a, b);
  rgb[1] = (vi)_mm512_unpackhi_epi64(a, b);
  rgb[2] = (vi)_mm512_unpacklo_epi64(c, d);
#else
  __m256i v[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(i)), piece(4 + i), 1);
    v[i] = _mm256_shuffle_epi8(both, _mm256_broadcastsi128_si256(order));
  }
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  rgb[0] = (vi)_mm256_unpacklo_epi64(a, b);
  rgb[1] = (vi)_mm256_unpackhi_epi64(a, b);
  rgb[2] = (vi)_mm256_unpacklo_epi64(c, d);
#endif
#else
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < W; ++i) {
      const uint8_t* p = row[i] + offset + c;
      rgb[c][i] = static_cast<int32_t>(p[0] | p[3] << 8 | p[6] << 16 | static_cast<uint32_t>(p[9]) << 24);
    }
#endif
}

// A block of W rows -> W / 4 row quads of the ring, [column][4 rows] each.
static void horizontal(const Axis& axis, const uint8_t* const* row, int64_t groups, int32_t* block,
                       uint8_t* const* out) {
  constexpr int64_t PIXEL = 3 * PARTS * W;
  for (int64_t g = 0; g < groups; ++g) {
    vi rgb[3] = {};
    spread(row, 12 * g, rgb);
    for (int c = 0; c < 3; ++c) {
      const Bytes x = bytes_of(rgb[c]);
      for (int p = 0; p < PARTS; ++p) store_lanes(block + g * PIXEL + (c * PARTS + p) * W, x.part[p]);
    }
  }
  for (int64_t x = 0; x < axis.padded; x += 4) {
    vi result[12];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int32_t* source = block + (axis.start[x + i] >> 2) * PIXEL;
      const int32_t* factor = axis.factor + (x + i) * axis.groups * FACTORS;
      Sum sum[3] = {};
      for (int c = 0; c < 3; ++c) sum[c].digit[0] = all(1 << (PRECISION - 1));
      for (int64_t g = 0; g < axis.groups; ++g, source += PIXEL, factor += FACTORS) {
        vi factors[FACTORS];
        for (int f = 0; f < FACTORS; ++f) factors[f] = all(factor[f]);
        for (int c = 0; c < 3; ++c) {
          Bytes bytes;
          for (int p = 0; p < PARTS; ++p) bytes.part[p] = load_lanes(source + (c * PARTS + p) * W);
          multiply(sum[c], bytes, factors);
        }
      }
      for (int c = 0; c < 3; ++c) result[3 * i + c] = rounded(sum[c]);
    }
#pragma GCC unroll 3
    for (int q = 0; q < 3; ++q) {
      const vi v = clipped(result[4 * q], result[4 * q + 1], result[4 * q + 2], result[4 * q + 3]);
      for (int part = 0; part < W / 4; ++part) {
        quad piece;
        std::memcpy(&piece, reinterpret_cast<const char*>(&v) + 16 * part, 16);
        std::memcpy(out[part] + 12 * x + 16 * q, &piece, 16);
      }
    }
  }
}

// N x W columns of one output row, at most `size` bytes of it.
template <int N>
static inline void columns(const int32_t* const* quads, int64_t column, const int32_t* factor, int64_t groups,
                           uint8_t* out, int64_t size) {
  Sum sum[4] = {};
  for (int n = 0; n < N; ++n) sum[n].digit[0] = all(1 << (PRECISION - 1));
  for (int64_t g = 0; g < groups; ++g, factor += FACTORS) {
    vi factors[FACTORS];
    for (int f = 0; f < FACTORS; ++f) factors[f] = all(factor[f]);
    for (int n = 0; n < N; ++n) multiply(sum[n], bytes_of(load_lanes(quads[g] + column + n * W)), factors);
  }
  const vi v = in_order(clipped(rounded(sum[0]), rounded(sum[1]), rounded(sum[2]), rounded(sum[3])));
  std::memcpy(out + column, &v, size);
}

static void vertical(const int32_t* const* quads, const int32_t* factor, int64_t groups, uint8_t* out, int64_t size) {
  int64_t column = 0;
  for (; column + 4 * W <= size; column += 4 * W) columns<4>(quads, column, factor, groups, out, 4 * W);
  if (size - column > 2 * W)
    columns<4>(quads, column, factor, groups, out, size - column);
  else if (size > column)
    columns<2>(quads, column, factor, groups, out, size - column);
}

static void crop(const Job& job) {
  const Axis &x = job.x, &y = job.y;
  coefficients(x, job.weight);
  coefficients(y, job.weight);
  const int64_t groups = (x.length + 3) / 4, width = 3 * x.length, reach = 12 * groups + 4;
  const int64_t slots = y.groups + W / 4, last = y.length - 1;
  int64_t done = 0;
  for (int64_t top = 0; top < y.length; top += W) {
    const uint8_t* row[W];
    for (int i = 0; i < W; ++i) {
      row[i] = job.source + (top + i < last ? top + i : last) * job.stride;
      // Whole groups are read; at the end of the image that would be beyond its memory.
      if (job.end - row[i] < reach) {
        uint8_t* copy = job.rows + i * (reach + 12);
        std::memcpy(copy, row[i], width);
        row[i] = copy;
      }
    }
    uint8_t* out[W / 4];
    for (int i = 0; i < W / 4; ++i) out[i] = job.ring + (top / 4 + i) % slots * job.pitch;
    horizontal(x, row, groups, job.block, out);
    for (; done < y.size && y.start[done] + y.count[done] <= top + W; ++done) {
      for (int64_t g = 0; g < y.groups; ++g)
        job.quads[g] = reinterpret_cast<const int32_t*>(job.ring + ((y.start[done] >> 2) + g) % slots * job.pitch);
      vertical(job.quads, y.factor + done * y.groups * FACTORS, y.groups, job.out + done * 3 * x.size, 3 * x.size);
    }
  }
}
