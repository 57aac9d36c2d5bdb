// The loops of conv_weight_grad, in AVX512-BF16: packing pairs of images, and tiles of 8 x 32 products.
//
// A lane is 32 bits: one channel of one pixel, of two images side by side, as vdpbf16ps multiplies them. It flushes
// denormals and rounds each of its two sums; a NaN or an infinity goes through.

using Lane = uint32_t;
constexpr int64_t PANEL = 16;  // lanes of a vector: channels are packed in panels [channels / 16][pixels][16]
constexpr int ROWS = 8;        // output channels of a tile

// Where a tap's pixels lie, in units of pixels: `length` gradients from `grad` on meet as many inputs from `input` on.
struct Run {
  int64_t grad, input, length;
};

// For permutex2var: words 16 * half ... of two images in turns.
static inline __m512i order(int half) {
  __m512i word = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  word = _mm512_add_epi32(word, _mm512_set1_epi32(16 * half));
  const __m512i other = _mm512_set1_epi32(32 << 16);  // the second image's words count from 32 on
  return _mm512_add_epi32(_mm512_or_si512(word, _mm512_slli_epi32(word, 16)), other);
}

static inline __mmask32 words(int64_t left) {
  return left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (uint32_t{1} << left) - 1;
}
static inline __mmask16 lanes(int64_t left) {
  return static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
}

// `pixels` pixels of two images (without `ODD` the other one is zero), `step` elements apart, to panels `panel` lanes
// apart, where they are `apart` lanes apart.
template <bool ODD>
static void pack_pixels(const uint16_t* even, int64_t image, int64_t pixels, int64_t step, int64_t channels, Lane* to,
                        int64_t panel, int64_t apart) {
  const int64_t whole = channels & ~int64_t{31};
  const __mmask32 some = words(channels - whole);
  const __m512i low = order(0), high = order(1), none = _mm512_setzero_si512();
  for (int64_t pixel = 0; pixel < pixels; ++pixel, even += step, to += apart) {
    Lane* at = to;
    const uint16_t* odd = even + image;
    int64_t c = 0;
    for (; c < whole; c += 32, at += 2 * panel) {
      const __m512i a = _mm512_loadu_si512(even + c), b = ODD ? _mm512_loadu_si512(odd + c) : none;
      _mm512_store_si512(at, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(at + panel, _mm512_permutex2var_epi16(a, high, b));
    }
    if (c < channels) {
      const __m512i a = _mm512_maskz_loadu_epi16(some, even + c);
      const __m512i b = ODD ? _mm512_maskz_loadu_epi16(some, odd + c) : none;
      _mm512_store_si512(at, _mm512_permutex2var_epi16(a, low, b));
      if (channels - c > PANEL) _mm512_store_si512(at + panel, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// The same for an image whose neighbour may not be there.
static void pack(bool odd, const uint16_t* even, int64_t image, int64_t pixels, int64_t step, int64_t channels, Lane* to,
                 int64_t panel, int64_t apart) {
  if (odd)
    pack_pixels<true>(even, image, pixels, step, channels, to, panel, apart);
  else
    pack_pixels<false>(even, image, pixels, step, channels, to, panel, apart);
}

// `count` elements of an image and its neighbour, likewise, as lanes one after the other; writes whole vectors of 32.
static void pack_row(bool odd, const uint16_t* even, int64_t image, int64_t count, Lane* to) {
  const __m512i low = order(0), high = order(1);
  for (int64_t c = 0; c < count; c += 32) {
    const __m512i a = _mm512_maskz_loadu_epi16(words(count - c), even + c);
    const __m512i b = _mm512_maskz_loadu_epi16(odd ? words(count - c) : 0, even + (odd ? image : 0) + c);
    _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + c + PANEL, _mm512_permutex2var_epi16(a, high, b));
  }
}

static inline void copy_lanes(const Lane* from, int64_t count, Lane* to) {
  for (int64_t i = 0; i < count; i += PANEL) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
}

// Where the next block lies in memory: `units` pieces of `bytes`, `step` bytes apart.
struct Piece {
  const char* at;
  int64_t bytes, units, step;
};

// Fetches the next block into the L2 cache, a few lines now and then, while this block is multiplied.
struct Ahead {
  const Piece *piece, *end;
  const char *line, *stop;
  int64_t unit, rate;  // lines at a time

  void start() {
    unit = 0;
    if (piece < end) open();
  }
  void open() {
    const char* from = piece->at + unit * piece->step;
    line = from - reinterpret_cast<uintptr_t>(from) % 64;
    stop = from + piece->bytes;
  }
  void advance() {
    for (int64_t i = 0; i < rate && piece < end; ++i) {
      _mm_prefetch(line, _MM_HINT_T0);
      line += 64;
      if (line >= stop) {
        if (++unit >= piece->units) ++piece, unit = 0;
        if (piece < end) open();
      }
    }
  }
};

constexpr int64_t BETWEEN = 16;  // pixels between two advances

// rows x (16 * V) products over all runs, stored to `out` or added to what is there.
template <int V>
static inline void tile(const Lane* grad, const Lane* input, int64_t input_step, int64_t input_panel, const Run* runs,
                        int64_t count, float* out, int64_t out_step, int64_t rows, __mmask16 last, bool first,
                        Ahead& ahead) {
  for (int r = 0; r < ROWS && r < rows; ++r) {  // dW is large: it is fetched while the products are summed
    __builtin_prefetch(out + r * out_step, 1);
    __builtin_prefetch(out + r * out_step + (V - 1) * PANEL, 1);
  }
  __m512 sum[ROWS][V];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  for (const Run* run = runs; run < runs + count; ++run) {
    const Lane* g = grad + run->grad * PANEL;
    const Lane* x = input + run->input * input_step;
    const Lane* end = g + run->length * PANEL;
    while (g < end) {
      const Lane* pause = end - g > BETWEEN * PANEL ? g + BETWEEN * PANEL : end;
      ahead.advance();
      for (; g < pause; g += PANEL, x += input_step) {
        __m512bh b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(x + v * input_panel);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(g[r]));
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* at = out + r * out_step + v * PANEL;
      const __mmask16 some = v == V - 1 ? last : static_cast<__mmask16>(0xffff);
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(some, at);
      _mm512_mask_storeu_ps(at, some, _mm512_add_ps(sum[r][v], before));
    }
  }
}

constexpr int64_t PART = 2 * PANEL;  // in such units dW is shared out

struct Range {
  int64_t first, last;
};

// A block: rows [first, last) of the gradient and the input rows [top, bottom) that they reach, of `pairs` pairs of
// images from `pair` on.
struct Block {
  int64_t first, last, top, bottom, pair, pairs;
};

// Panels lie an odd number of vectors apart, so that those of a pixel do not share cache sets.
static inline int64_t panel_lanes(int64_t pixels) { return (pixels | 1) * PANEL; }

// Lanes of a patch; the copy of its last row writes up to a vector more.
static inline int64_t patch_lanes(const Plan& p) { return ceil(p.columns + PANEL, PANEL) * PANEL; }

struct Sizes {
  int64_t grad, input, row, runs;  // lanes of the packed gradient, the packed input and an input row; runs
};

static inline Sizes sizes_of(const Plan& p) {
  const int64_t pixels = p.rows * p.out_width * p.chunk, reached = p.input_rows * p.phases * p.places * p.chunk;
  const int64_t row = ceil((p.width + 2 * p.padding) * p.channels + 2 * PART, PANEL) * PANEL;
  return {ceil(p.outputs, PANEL) * panel_lanes(pixels),
          p.patches ? pixels * patch_lanes(p) : ceil(p.channels, PANEL) * panel_lanes(reached),
          p.patches ? row : 0, p.patches ? 1 : p.kernel * p.kernel * p.rows};
}

static int64_t scratch_bytes(const Plan& p) {
  const Sizes s = sizes_of(p);
  const int64_t counts = p.kernel * p.kernel * static_cast<int64_t>(sizeof(int64_t));
  const int64_t pieces = 2 * p.chunk * (p.input_rows + 1) * static_cast<int64_t>(sizeof(Piece));
  const int64_t packed = 4 * (s.grad + s.input + s.row * p.input_rows);
  const int64_t bytes = packed + s.runs * static_cast<int64_t>(sizeof(Run)) + counts + pieces;
  return ceil(bytes, 64) * 64;
}

static void pack_gradient(const Plan& p, const Block& b, const uint16_t* grad, Range rows, Lane* to) {
  const int64_t image = p.out_height * p.out_width * p.outputs, pixels = (b.last - b.first) * p.out_width;
  for (int64_t m = 0; m < b.pairs; ++m) {
    const int64_t n = 2 * (b.pair + m);
    const uint16_t* even = grad + n * image + b.first * p.out_width * p.outputs + rows.first;
    pack(n + 1 < p.images, even, image, pixels, p.outputs, rows.last - rows.first, to + m * PANEL,
         panel_lanes(pixels * b.pairs), b.pairs * PANEL);
  }
}

static void pack_input(const Plan& p, const Block& b, const uint16_t* input, Range channels, Lane* to) {
  const int64_t image = p.height * p.width * p.channels, line = p.phases * p.places * b.pairs;
  const int64_t panel = panel_lanes((b.bottom - b.top) * line);
  for (int64_t m = 0; m < b.pairs; ++m) {
    const int64_t n = 2 * (b.pair + m);
    for (int64_t r = b.top; r < b.bottom; ++r) {
      if ((r + p.padding) % p.stride >= p.kernel) continue;  // no tap reaches this row
      for (int64_t phase = 0; phase < p.phases; ++phase) {
        // Column w = place * stride + phase - padding.
        const int64_t place = phase < p.padding ? ceil(p.padding - phase, p.stride) : 0;
        const int64_t w = place * p.stride + phase - p.padding;
        if (w >= p.width) continue;
        const uint16_t* even = input + n * image + (r * p.width + w) * p.channels + channels.first;
        const int64_t at = (r - b.top) * line + (phase * p.places + place - p.first_place) * b.pairs + m;
        pack(n + 1 < p.images, even, image, ceil(p.width - w, p.stride), p.stride * p.channels,
             channels.last - channels.first, to + at * PANEL, panel, b.pairs * PANEL);
      }
    }
  }
}

// For each pixel of the gradient the k x k x C patch of the input that it meets, zeros outside of the map.
static void pack_patches(const Plan& p, const Block& b, const uint16_t* input, Lane* rows, Lane* to) {
  const int64_t image = p.height * p.width * p.channels, line = sizes_of(p).row, step = patch_lanes(p);
  const int64_t top = b.first * p.stride - p.padding, count = (b.last - b.first - 1) * p.stride + p.kernel;
  const int64_t edge = p.padding * p.channels, width = p.width * p.channels;
  for (int64_t m = 0; m < b.pairs; ++m) {
    const int64_t n = 2 * (b.pair + m);
    for (int64_t r = 0; r < count; ++r) {
      Lane* row = rows + r * line;
      if (top + r < 0 || top + r >= p.height) {
        __builtin_memset(row, 0, 4 * line);
        continue;
      }
      const uint16_t* even = input + n * image + (top + r) * width;
      __builtin_memset(row, 0, 4 * edge);
      pack_row(n + 1 < p.images, even, image, width, row + edge);
      __builtin_memset(row + edge + width, 0, 4 * edge);
    }
    for (int64_t h = 0; h < b.last - b.first; ++h)
      for (int64_t w = 0; w < p.out_width; ++w) {
        Lane* patch = to + ((h * p.out_width + w) * b.pairs + m) * step;
        for (int64_t t = 0; t < p.kernel; ++t)
          copy_lanes(rows + (h * p.stride + t) * line + w * p.stride * p.channels, p.kernel * p.channels,
                     patch + t * p.kernel * p.channels);
      }
  }
}

// The runs of tap (th, tw): one per row, and rows whose runs meet are one.
static int64_t runs_of(const Plan& p, const Block& b, int64_t th, int64_t tw, Run* runs) {
  const Span tall = reached(th, p.height, p.out_height, p.stride, p.padding);
  const Span wide = reached(tw, p.width, p.out_width, p.stride, p.padding);
  const int64_t line = p.phases * p.places * b.pairs, length = (wide.last - wide.first) * b.pairs;
  if (length <= 0) return 0;
  const int64_t place = (tw % p.stride) * p.places + tw / p.stride - p.first_place + wide.first;
  int64_t count = 0;
  for (int64_t h = std::max(b.first, tall.first); h < std::min(b.last, tall.last); ++h) {
    const Run run{((h - b.first) * p.out_width + wide.first) * b.pairs,
                  (h * p.stride + th - p.padding - b.top) * line + place * b.pairs, length};
    Run* before = runs + count - 1;
    if (count && before->grad + before->length == run.grad && before->input + before->length == run.input)
      before->length += length;
    else
      runs[count++] = run;
  }
  return count;
}

// All tiles of rows x columns, `columns` columns of dW from `out` on.
static void tiles(const Lane* grad, int64_t grad_panel, const Lane* input, int64_t step, int64_t panel, const Run* runs,
                  int64_t count, float* out, int64_t out_step, int64_t rows, int64_t columns, bool first,
                  Ahead& ahead) {
  for (int64_t r = 0; r < rows; r += ROWS) {
    const Lane* g = grad + r / PANEL * grad_panel + r % PANEL;
    if (columns > PANEL)
      tile<2>(g, input, step, panel, runs, count, out + r * out_step, out_step, rows - r, lanes(columns - PANEL), first,
              ahead);
    else
      tile<1>(g, input, step, panel, runs, count, out + r * out_step, out_step, rows - r, lanes(columns), first,
              ahead);
  }
}

// The pieces of a block in memory.
static int64_t pieces_of(const Plan& p, const Block& b, const uint16_t* grad, const uint16_t* input, Range rows,
                         Range channels, Piece* pieces) {
  Piece* piece = pieces;
  for (int64_t n = 2 * b.pair; n < std::min(p.images, 2 * (b.pair + b.pairs)); ++n) {
    const int64_t pixels = (b.last - b.first) * p.out_width, own = rows.last - rows.first;
    const uint16_t* from = grad + (n * p.out_height + b.first) * p.out_width * p.outputs + rows.first;
    const bool all = own == p.outputs;
    *piece++ = {reinterpret_cast<const char*>(from), 2 * own * (all ? pixels : 1), all ? 1 : pixels, 2 * p.outputs};
    const int64_t wanted = channels.last - channels.first;
    const bool dense = wanted == p.channels && p.stride <= p.kernel;
    if (b.bottom <= b.top) continue;
    from = input + (n * p.height + b.top) * p.width * p.channels + channels.first;
    if (dense) {
      *piece++ = {reinterpret_cast<const char*>(from), 2 * p.channels * p.width * (b.bottom - b.top), 1, 0};
      continue;
    }
    const int64_t step = p.stride <= p.kernel ? 1 : p.stride;
    for (int64_t r = b.top; r < b.bottom; r += step)
      *piece++ = {reinterpret_cast<const char*>(from + (r - b.top) * p.width * p.channels), 2 * wanted,
                  ceil(p.width, step), 2 * step * p.channels};
  }
  return piece - pieces;
}

// The block at row `at` of all chunks' rows, of a slice that ends at `end`.
static Block block_at(const Plan& p, int64_t at, int64_t end) {
  const int64_t chunk = at / p.out_height, h = at % p.out_height;
  const int64_t last = std::min({h + p.rows, p.out_height, h + end - at});
  return {h, last, std::max<int64_t>(0, h * p.stride - p.padding),
          std::min(p.height, (last - 1) * p.stride - p.padding + p.kernel), chunk * p.chunk,
          std::min(p.chunk, p.pairs - chunk * p.chunk)};
}

// The sums of one slice of the blocks, for a range of dW's rows and of the input's channels.
static void slice_sums(const Plan& p, const uint16_t* grad, const uint16_t* input, int64_t slice, Range rows,
                       Range channels, float* out, char* scratch) {
  const Sizes sizes = sizes_of(p);
  Lane* packed_grad = reinterpret_cast<Lane*>(scratch);
  Lane* packed_input = packed_grad + sizes.grad;
  Lane* patch_rows = packed_input + sizes.input;
  Run* runs = reinterpret_cast<Run*>(patch_rows + sizes.row * p.input_rows);
  int64_t* counts = reinterpret_cast<int64_t*>(runs + sizes.runs);
  Piece* pieces = reinterpret_cast<Piece*>(counts + p.kernel * p.kernel);
  const int64_t taps = p.kernel * p.kernel, all = p.chunks * p.out_height, outputs = rows.last - rows.first;
  const int64_t end = all * (slice + 1) / p.slices;
  out += rows.first * p.columns;
  bool first = true;
  for (int64_t at = all * slice / p.slices; at < end; first = false) {
    const Block b = block_at(p, at, end);
    at += b.last - b.first;
    const int64_t pixels = (b.last - b.first) * p.out_width * b.pairs, grad_panel = panel_lanes(pixels);
    pack_gradient(p, b, grad, rows, packed_grad);
    Ahead ahead{};
    ahead.piece = ahead.end = pieces;
    if (at < end) {
      ahead.end += pieces_of(p, block_at(p, at, end), grad, input, rows, channels, pieces);
      int64_t lines = 0;
      for (const Piece* piece = pieces; piece < ahead.end; ++piece) lines += piece->units * (piece->bytes / 64 + 1);
      const int64_t width = p.patches ? p.columns : (channels.last - channels.first) * taps;
      const int64_t pauses = ceil(outputs, ROWS) * ceil(width, PART) * ceil(pixels, BETWEEN);
      ahead.rate = ceil(lines * 5 / 4, pauses);  // done before this block is
      ahead.start();
    }
    if (p.patches) {
      pack_patches(p, b, input, patch_rows, packed_input);
      const Run whole{0, 0, pixels};
      for (int64_t c = 0; c < p.columns; c += PART)
        tiles(packed_grad, grad_panel, packed_input + c, patch_lanes(p), PANEL, &whole, 1, out + c, p.columns, outputs,
              p.columns - c, first, ahead);
      continue;
    }
    pack_input(p, b, input, channels, packed_input);
    const int64_t panel = panel_lanes((b.bottom - b.top) * p.phases * p.places * b.pairs);
    for (int64_t t = 0; t < taps; ++t) counts[t] = runs_of(p, b, t / p.kernel, t % p.kernel, runs + t * p.rows);
    for (int64_t c = channels.first; c < channels.last; c += PART)
      for (int64_t t = 0; t < taps; ++t)
        tiles(packed_grad, grad_panel, packed_input + (c - channels.first) / PANEL * panel, PANEL, panel,
              runs + t * p.rows, counts[t], out + t * p.channels + c, p.columns, outputs, channels.last - c, first,
              ahead);
  }
}

static void add_slices(float* out, const float* sums, int64_t slices, int64_t step, int64_t begin, int64_t end) {
  for (int64_t s = 0; s < slices; ++s)
    for (int64_t i = begin; i < end; ++i) out[i] += sums[s * step + i];
}
