// Products of gathered pixels with packed weights by vdpbf16ps; included once, compiled for AVX512-BF16.
//
//   target[row][column] = sum over taps, k of source[pixel(row, tap)][k] * weight[tap][k][column]
//
// Both the convolution (k = input channel, column = output channel) and its input gradient (k = output channel, column
// = input channel) are this; they differ in which pixel a tap means and in how weights are packed. One instruction
// multiplies a pair (k, k + 1): in the source that is one 32-bit word of a pixel, which is broadcast; weights are
// packed as [tap][pair][column] words. A tile of 6 rows and 64 columns keeps its sums in 24 registers over all taps and
// is rounded once. One thread owns a tile; the order of its additions depends on the shapes alone.
//
// Read and written: a panel of 64 columns of weights is read once per tile, from L2 (10.7 bytes per cycle, which it
// gives); a pixel once per tap and panel, from L1 or L2; every target element is written once.
// Assumes at most 64 taps, and target pixels of `columns` consecutive elements.

static constexpr int ROWS = 6;
static constexpr int LANES = 16;

// What a tile multiplies for one tap: six pixels, and the packed weights of the tap.
struct Meeting {
  const char* pixel[ROWS];
  const char* weight;
  int64_t tap;
  int64_t ahead;  // bytes from a pixel to the one that the same row of the next tile meets, to be prefetched
};

template <int VECTORS>
static inline __attribute__((always_inline)) void multiply(__m512 (&sum)[ROWS][VECTORS], const Meeting& meeting,
                                                           int64_t pair) {
  __m512bh weight[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v)
    weight[v] = (__m512bh)_mm512_loadu_si512(meeting.weight + (pair * VECTORS + v) * 64);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    int32_t word;
    __builtin_memcpy(&word, meeting.pixel[r] + pair * 4, 4);
    const __m512bh pixel = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pixel, weight[v]);
  }
}

// One tile: `taps` meetings of `run` values of k each. Rows past `rows` are computed and not stored; `last` are the
// columns that exist of the last two vectors (or of the last one).
template <int VECTORS>
static void tile(const Meeting* meetings, int64_t taps, int64_t run, uint16_t* const* target, int64_t rows,
                 __mmask32 last) {
  __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_prefetch(target[r], 1);
    __builtin_prefetch(target[r] + 32, 1);
  }
  const int64_t pairs = run / 2;
  for (int64_t t = 0; t < taps; ++t) {
    const Meeting meeting = meetings[t];
    int64_t pair = 0;
    for (; pair + LANES <= pairs; pair += LANES) {
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(meeting.pixel[r] + pair * 4 + meeting.ahead);
#pragma GCC unroll 1
      for (int64_t p = pair; p < pair + LANES; p += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) multiply(sum, meeting, p + u);
      }
    }
    for (; pair < pairs; ++pair) multiply(sum, meeting, pair);
    if (run & 1) {
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        uint16_t value;
        __builtin_memcpy(&value, meeting.pixel[r] + pairs * 4, 2);
        const __m512bh pixel = (__m512bh)_mm512_set1_epi32(value);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pixel,
                                       (__m512bh)_mm512_loadu_si512(meeting.weight + (pairs * VECTORS + v) * 64));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v += 2) {
      const __m512i rounded =
          (__m512i)_mm512_cvtne2ps_pbh(v + 1 < VECTORS ? sum[r][v + 1] : _mm512_setzero_ps(), sum[r][v]);
      if (v + 2 < VECTORS || last == 0xffffffffu)
        _mm512_storeu_si512(target[r] + v * LANES, rounded);
      else
        _mm512_mask_storeu_epi16(target[r] + v * LANES, last, rounded);
    }
  }
}

// Tiles [begin, end) of `part` for the columns of panels [first, past), whose packed weights begin at `weights`.
static void sweep(const Product& product, const Part& part, int64_t first, int64_t past, const char* weights,
                  int64_t begin, int64_t end) {
  const int64_t tap_words = (product.run + 1) / 2;
  const int64_t positions = part.height * part.width;
  const int64_t rows = product.images * positions;
  // Rows go by group of images, then position, then image within the group.
  int64_t row = begin * ROWS;
  int64_t group = row / (product.group * positions);
  int64_t members = product.images - group * product.group < product.group ? product.images - group * product.group
                                                                           : product.group;
  int64_t rest = row - group * product.group * positions;
  int64_t member = rest % members;
  rest /= members;
  int64_t y = rest / part.width, x = rest % part.width;

  Meeting meetings[64];
  for (int64_t t = begin; t < end; ++t) {
    int64_t source[ROWS];
    uint64_t inside[ROWS], some = 0, every = ~uint64_t{0};
    uint16_t* target[ROWS];  // of the first panel
    int64_t live = 0;
    for (int r = 0; r < ROWS; ++r, ++row) {
      source[r] = 0;
      inside[r] = 0;
      target[r] = nullptr;
      if (row < rows) {
        const int64_t image = group * product.group + member;
        const Line &down = part.down[y], &across = part.across[x];
        source[r] = image * product.source_image + down.source + across.source;
        target[r] = product.target + image * product.target_image + down.target + across.target + first * PANEL;
        inside[r] = down.taps & across.taps;
        ++live;
        if (++member == members) {
          member = 0;
          if (++x == part.width) {
            x = 0;
            if (++y == part.height) {
              y = 0;
              ++group;
              const int64_t left = product.images - group * product.group;
              members = left < product.group ? left : product.group;
            }
          }
        }
      }
      some |= inside[r];
      every &= inside[r];
    }
    int64_t taps = 0;
    for (int64_t tap = 0; tap < part.taps; ++tap) {
      if (!(some >> tap & 1)) continue;  // zeros for every row
      Meeting& meeting = meetings[taps++];
      const int64_t shift = part.shift[tap];
      if (every >> tap & 1) {
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
          meeting.pixel[r] = reinterpret_cast<const char*>(product.source + source[r] + shift);
      } else {
        for (int r = 0; r < ROWS; ++r)
          meeting.pixel[r] = reinterpret_cast<const char*>(
              inside[r] >> tap & 1 ? product.source + source[r] + shift : product.zeros);
      }
      meeting.tap = part.tap[tap];
      meeting.ahead = tap + 1 == part.taps ? product.ahead : 0;
    }
    for (int64_t panel = first; panel < past; ++panel) {
      const int64_t columns = product.columns - panel * PANEL < PANEL ? product.columns - panel * PANEL : PANEL;
      const int vectors = static_cast<int>((columns + LANES - 1) / LANES);
      const __mmask32 last = 0xffffffffu >> ((columns + 31) / 32 * 32 - columns);
      const char* packed = weights + (panel - first) * product.taps * tap_words * PANEL * 4;
      for (int64_t i = 0; i < taps; ++i) meetings[i].weight = packed + meetings[i].tap * tap_words * vectors * 64;
      switch (vectors) {
        case 1: tile<1>(meetings, taps, product.run, target, live, last); break;
        case 2: tile<2>(meetings, taps, product.run, target, live, last); break;
        case 3: tile<3>(meetings, taps, product.run, target, live, last); break;
        default: tile<4>(meetings, taps, product.run, target, live, last);
      }
      for (int r = 0; r < ROWS; ++r) target[r] += PANEL;
    }
  }
}

// 16 rows of 16 words: rows become columns.
static inline __attribute__((always_inline)) void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // v[4i + j] holds column j + 4q of rows 4i..4i+3 in its quarter q
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    v[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    v[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// Tap `tap` of a panel for the convolution: weight[column][tap][k] becomes packed[tap][pair][column].
static void pack_forward(const Product& product, const uint16_t* weight, int64_t panel, int64_t tap, char* packed) {
  const int64_t columns = product.columns - panel * PANEL < PANEL ? product.columns - panel * PANEL : PANEL;
  const int64_t vectors = (columns + LANES - 1) / LANES, run = product.run;
  packed += tap * ((run + 1) / 2) * vectors * 64;
  for (int64_t v = 0; v < vectors; ++v) {
    const uint16_t* first = weight + ((panel * PANEL + v * LANES) * product.taps + tap) * run;
    for (int64_t k = 0; k < run; k += 32) {
      const int64_t left = run - k < 32 ? run - k : 32;
      const __mmask32 mask = static_cast<__mmask32>(0xffffffffu >> (32 - left));
      __m512i word[16];
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c)
        word[c] = v * LANES + c < columns ? _mm512_maskz_loadu_epi16(mask, first + c * product.taps * run + k)
                                          : _mm512_setzero_si512();
      transpose(word);
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p)
        if (p * 2 < left) _mm512_storeu_si512(packed + ((k / 2 + p) * vectors + v) * 64, word[p]);
    }
  }
}

// Tap `tap` of a panel for the input gradient: weight[k][tap][column] becomes packed[tap][pair][column].
static void pack_gradient(const Product& product, const uint16_t* weight, int64_t panel, int64_t tap, char* packed) {
  const int64_t columns = product.columns - panel * PANEL < PANEL ? product.columns - panel * PANEL : PANEL;
  const int64_t vectors = (columns + LANES - 1) / LANES, run = product.run;
  const int64_t stride = product.taps * product.columns;  // from k to k + 1
  packed += tap * ((run + 1) / 2) * vectors * 64;
  alignas(64) int16_t order[2][32];
  for (int i = 0; i < 16; ++i)
    for (int half = 0; half < 2; ++half) {
      order[half][2 * i] = static_cast<int16_t>(16 * half + i);
      order[half][2 * i + 1] = static_cast<int16_t>(16 * half + i + 32);
    }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t k = 0; k < run; k += 2) {
    const uint16_t* first = weight + k * stride + tap * product.columns + panel * PANEL;
    for (int64_t v = 0; v < vectors; v += 2) {
      const int64_t left = columns - v * LANES < 32 ? columns - v * LANES : 32;
      const __mmask32 mask = static_cast<__mmask32>(0xffffffffu >> (32 - left));
      const __m512i even = _mm512_maskz_loadu_epi16(mask, first + v * LANES);
      const __m512i odd = k + 1 < run ? _mm512_maskz_loadu_epi16(mask, first + stride + v * LANES)
                                      : _mm512_setzero_si512();
      char* to = packed + (k / 2 * vectors + v) * 64;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      if (v + 1 < vectors) _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}
