// Products, packing, norms and exponentials of the losses on cosines: cosine_ce, contrastive_ce, nearest_keys.
//
// One register tile of M x V vectors does all three products: A is read by broadcasts with any two strides, so that
// e [class][row] serves as it is for both gradients; B comes in panels of V vectors, so that its rows are adjacent.
// Every element is one chain of fused multiply-adds over k in order: its bits do not depend on where in a tile it lies.

#if defined(FASTREX_AVX512)
constexpr int M1 = 8, V1 = 3, M2 = 6, V2 = 4;  // 24 accumulators of 32 registers
#elif defined(FASTREX_AVX2)
constexpr int M1 = 6, V1 = 2, M2 = 6, V2 = 2;  // 12 of 16
#else
constexpr int M1 = 4, V1 = 2, M2 = 4, V2 = 2;  // no fused multiply-add: the products need registers too
#endif
constexpr int P1 = V1 * W, P2 = V2 * W;  // widths of panels of rows and of features

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A(i, k) = a[i * am + (k / segment) * jump + (k % segment) * ak]
struct Left {
  const float* a;
  int64_t am, ak, segment, jump;
};

template <int M, int V>
static inline void micro(int64_t K, Left left, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  vf acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) acc[i][j] = vf{};
  for (int64_t done = 0; done < K; done += left.segment, left.a += left.jump) {
    const float* a = left.a;
    const int64_t n = smaller(left.segment, K - done);
    for (int64_t k = 0; k < n; ++k, a += left.ak, b += ldb) {
      vf right[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const vf scalar = splat(a[i * left.am]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) acc[i][j] += scalar * right[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* p = c + i * ldc + j * W;
      // Added at the end: sums of sums round less than one chain over a million classes.
      store(p, add ? load(p) + acc[i][j] : acc[i][j]);
    }
}

template <int M, int V>
static void strip(int64_t m, int64_t K, Left left, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + M <= m; i += M, left.a += M * left.am) micro<M, V>(K, left, b, ldb, c + i * ldc, ldc, add);
  for (; i + M / 2 <= m; i += M / 2, left.a += M / 2 * left.am)
    micro<M / 2, V>(K, left, b, ldb, c + i * ldc, ldc, add);
  for (; i < m; ++i, left.a += left.am) micro<1, V>(K, left, b, ldb, c + i * ldc, ldc, add);
}

// c [m, n] (+)= A [m, K] B [K, n]; n is a multiple of W, B has panels of V * W columns that lie ``next`` floats apart.
template <int M, int V>
static void gemm(int64_t m, int64_t n, int64_t K, Left left, const float* b, int64_t next, float* c, int64_t ldc,
                 bool add) {
  for (int64_t j = 0; j < n; j += V * W, b += next) {
    const int64_t vectors = smaller(V, (n - j) / W);
    if (vectors == V) strip<M, V>(m, K, left, b, V * W, c + j, ldc, add);
    if constexpr (V > 3)
      if (vectors == 3) strip<M, 3>(m, K, left, b, V * W, c + j, ldc, add);
    if constexpr (V > 2)
      if (vectors == 2) strip<M, 2>(m, K, left, b, V * W, c + j, ldc, add);
    if (vectors == 1) strip<M, 1>(m, K, left, b, V * W, c + j, ldc, add);
  }
}

constexpr float LOG2E = 1.44269504f;

// 2^x within 1 ulp or so (degree 6, relative error 2e-9 before rounding); 2^-126 for anything smaller, NaN for NaN.
static inline vf exp2(vf x) {
  x = x < -126.0f ? splat(-126.0f) : x;
  const vf magic = splat(12582912.0f);  // adding it rounds to an integer, which stands in the low bits
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);
  vf p = splat(1.5345800784e-4f);
  p = p * f + 1.3399944874e-3f;
  p = p * f + 9.6184890717e-3f;
  p = p * f + 5.5503286421e-2f;
  p = p * f + 2.4022646248e-1f;
  p = p * f + 6.9314718246e-1f;
  p = p * f + 1.0f;
  return (vf)((vi)p + (((vi)shifted - (vi)magic) << 23));
}

static inline vf load_part(const float* p, int64_t n) {
  if (n >= W) return load(p);
  float part[W] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
static inline vf load_part(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T part[W];
  std::memset(part, 0, sizeof(part));
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
static inline void store_part(T* p, vf v, int64_t n) {
  if (n >= W) return store(p, v);
  T part[W];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// f(pointer to the row's elements)
template <class F>
static inline void typed(Kind kind, const char* row, F f) {
  if (kind == Kind::f32) return f((const float*)row);
  if (kind == Kind::bf16) return f((const c10::BFloat16*)row);
  f((const c10::Half*)row);
}

// out [n padded to W] = scale * row; a scale of 0 gives zeros, also of a NaN (an ignored row, an empty class).
template <class T>
static void copy_row(Kind kind, const char* row, int64_t n, float scale, T* out, int64_t padded) {
  if (row == nullptr || scale == 0.0f) {
    std::memset((void*)out, 0, sizeof(T) * padded);
    return;
  }
  typed(kind, row, [&](auto* p) {
    for (int64_t d = 0; d < padded; d += W) store_part(out + d, load_part(p + d, n - d) * scale, padded - d);
  });
}

static inline void fill(float* out, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// out[r] = 1 / norm of m's row r, or index[r]; 0 for a row that counts as zero.
static void inverse_norms(const Matrix& m, int64_t row0, int64_t row1, int64_t D, float* out,
                          const int64_t* index = nullptr) {
  for (int64_t r = row0; r < row1; ++r)
    typed(m.kind, m.row(index ? index[r] : r), [&](auto* p) {
      vf total{};
      for (int64_t d = 0; d < D; d += W) {
        const vf v = load_part(p + d, D - d);
        total += v * v;
      }
      double squares = sum(total);
      if (!(squares > 1e-30 && squares < 1e37)) {  // the squares may have left the range of float
        squares = 0;
        for (int64_t d = 0; d < D; ++d) squares += (double)(float)p[d] * (double)(float)p[d];
      }
      const double norm = std::sqrt(squares);
      // An infinite norm means infinite elements, whose quotient by it is NaN.
      out[r] = norm <= 1e-12 ? 0.0f : std::isinf(norm) ? NAN : (float)(1.0 / norm);
    });
}

template <class T>
static void write_row(const float* row, int64_t n, T* out) {
  for (int64_t d = 0; d < n; d += W) store_part(out + d, load(row + d), n - d);
}
static inline void write_row(Kind kind, const float* row, int64_t n, char* out, int64_t index) {
  if (kind == Kind::f32) return write_row(row, n, (float*)out + index * n);
  if (kind == Kind::bf16) return write_row(row, n, (c10::BFloat16*)out + index * n);
  write_row(row, n, (c10::Half*)out + index * n);
}

// Rows of ``m`` in panels of P2 features, [panel][rows][P2]; rows without data and the last panel's rest are zero.
// With ``index`` row r is m's row index[row0 + r].
static void pack_panels(const Matrix& m, int64_t row0, int64_t rows, int64_t padded, int64_t D, const float* scale,
                        float* out, const int64_t* index = nullptr) {
  for (int64_t r = 0; r < padded; ++r) {
    const bool there = r < rows && (scale == nullptr || scale[r] != 0.0f);
    const float factor = there && scale != nullptr ? scale[r] : 1.0f;
    float* to = out + r * P2;
    typed(m.kind, there ? m.row(index ? index[row0 + r] : row0 + r) : m.data, [&](auto* p) {
      for (int64_t d = 0; d < D; d += P2, to += padded * P2)
        for (int64_t j = 0; j < P2; j += W)
          store(to + j, there && d + j < D ? load_part(p + d + j, D - d - j) * factor : vf{});
    });
  }
}

template <int S>
static inline void exchange(vf* v) {
  vi low{}, high{};
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) {
    low[j] = (j & S) ? W + (j ^ S) : j;
    high[j] = (j & S) ? W + j : (j ^ S);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      const vf a = v[i], b = v[i + S];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + S] = __builtin_shuffle(a, b, high);
    }
}
static inline void transpose(vf* v) {
  exchange<1>(v);
  exchange<2>(v);
  if constexpr (W > 4) exchange<(W > 4 ? 4 : 1)>(v);
  if constexpr (W > 8) exchange<(W > 8 ? 8 : 1)>(v);
}

// out [panel][column][width] = in [row][column]: ``rows`` and ``columns`` are multiples of W, ``width`` of a panel too.
static void transpose_rows(const float* in, int64_t ld, int64_t rows, int64_t columns, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; r += W) {
    float* to = out + r / width * columns * width + r % width;
    for (int64_t k = 0; k < columns; k += W) {
      vf v[W];
      for (int i = 0; i < W; ++i) v[i] = load(in + (r + i) * ld + k);
      transpose(v);
      for (int i = 0; i < W; ++i) store(to + (k + i) * width, v[i]);
    }
  }
}
