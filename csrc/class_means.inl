// Sums of bank rows and their normalisation, for one instruction set.

#if defined(FASTREX_AVX512)
constexpr int REGISTERS = 16;  // accumulators of the widest block: half of the register file
#else
constexpr int REGISTERS = 8;
#endif
constexpr int64_t AHEAD = 8;  // rows prefetched ahead: class order jumps through the bank, which no hardware foresees

// out[0, N * W) = the rows of `slots`, added one after another in that order; `left` rows follow slots[0] in memory.
template <int N, typename T>
static inline void sum_block(const T* features, int64_t stride, const int32_t* slots, int64_t rows, int64_t left,
                             float* out) {
  vf total[N];
  // Unrolled by force: g++ would otherwise keep the array in memory.
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) total[v] = vf{};
  for (int64_t i = 0; i < rows; ++i) {
    if (N > 1) {
      const char* next = (const char*)(features + slots[i + AHEAD < left ? i + AHEAD : left - 1] * stride);
      for (int byte = 0; byte < int(N * W * sizeof(T)); byte += 64) __builtin_prefetch(next + byte, 0, 2);
    }
    const T* row = features + slots[i] * stride;
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) total[v] += load(row + v * W);
  }
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) store(out + v * W, total[v]);
}

// Columns [begin, end) of the sum of one class. A column's sum never depends on how columns are cut into blocks.
template <typename T>
static void sum_columns(const T* features, int64_t stride, const int32_t* slots, int64_t rows, int64_t left,
                        int64_t begin, int64_t end, float* out) {
  int64_t d = begin;
  for (; d + REGISTERS * W <= end; d += REGISTERS * W)
    sum_block<REGISTERS>(features + d, stride, slots, rows, left, out + d);
  for (; d + 4 * W <= end; d += 4 * W) sum_block<4>(features + d, stride, slots, rows, left, out + d);
  for (; d + W <= end; d += W) sum_block<1>(features + d, stride, slots, rows, left, out + d);
  if (d == end) return;
  float total[W] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = features + slots[i] * stride + d;
    for (int64_t j = 0; j < end - d; ++j) total[j] += static_cast<float>(row[j]);
  }
  for (int64_t j = 0; j < end - d; ++j) out[d + j] = total[j];
}

// Lane i ^ 8, i ^ 4, i ^ 2, i ^ 1: what lane i is added to when the lanes of a vector are summed in a few steps.
constexpr int32_t PARTNERS[4][16] = {{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
                                     {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
                                     {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
                                     {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}};

// row / |row|, or zeros where |row| <= 1e-12; the comparison keeps a NaN.
static void normalise(float* row, int64_t dim) {
  vf squares[4] = {};
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vf x = load(row + d + v * W);
      squares[v] += x * x;
    }
  vf lanes = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  for (const int32_t(&partner)[16] : PARTNERS) {
    if (partner[0] >= W) continue;
    vi other;
    std::memcpy(&other, partner, sizeof(other));
    lanes += __builtin_shuffle(lanes, other);
  }
  float total = lanes[0];
  for (int64_t j = d; j < dim; ++j) total += row[j] * row[j];
  const float norm = __builtin_sqrtf(total);
  const float scale = norm <= 1e-12f ? 0.0f : 1.0f / norm;
  for (d = 0; d + W <= dim; d += W) store(row + d, load(row + d) * splat(scale));
  for (; d < dim; ++d) row[d] *= scale;
}

// Prototypes of the classes [begin, end): class k owns the slots order[offset[k], offset[k + 1]), in slot order, and the
// row ids[k] (or k) of `prototypes`. A few are summed before they are normalised: one norm is a long chain of dependent
// operations, which then overlaps with the next class's.
template <typename T>
static void class_range(const T* features, int64_t stride, const int32_t* order, const int64_t* offset,
                        const int64_t* ids, int64_t begin, int64_t end, int64_t rows, int64_t dim, float* prototypes) {
  for (int64_t first = begin; first < end; first += 8) {
    const int64_t last = first + 8 < end ? first + 8 : end;
    for (int64_t k = first; k < last; ++k)
      sum_columns(features, stride, order + offset[k], offset[k + 1] - offset[k], rows - offset[k], 0, dim,
                  prototypes + (ids ? ids[k] : k) * dim);
    for (int64_t k = first; k < last; ++k)
      if (offset[k + 1] > offset[k]) normalise(prototypes + (ids ? ids[k] : k) * dim, dim);
  }
}

// The sums alone, of the columns [begin, end) of all classes.
template <typename T>
static void column_range(const T* features, int64_t stride, const int32_t* order, const int64_t* offset,
                         const int64_t* ids, int64_t classes, int64_t begin, int64_t end, int64_t dim,
                         float* prototypes) {
  for (int64_t k = 0; k < classes; ++k)
    sum_columns(features, stride, order + offset[k], offset[k + 1] - offset[k], offset[classes] - offset[k], begin, end,
                prototypes + (ids ? ids[k] : k) * dim);
}
