// Vectors of FASTREX_WIDTH floats for the instruction set that isa.h is compiling; no include guard on purpose.
// Needs <c10/util/BFloat16.h>, <c10/util/Half.h>, <cstdint>, <cstring> included before, and <immintrin.h> on x86.

constexpr int W = FASTREX_WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

// bfloat16 is the upper half of a float; rounding to nearest even, and a NaN stays one.
// By intrinsics, because g++ 12 splits the generic conversions into halves.
static inline vf load(const c10::BFloat16* p) {
#if defined(FASTREX_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(FASTREX_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return (vf)(__builtin_convertvector(h, vi) << 16);
#endif
}
#if defined(FASTREX_AVX512)
// Rounded to sixteen bits, to nearest even; a NaN stays one.
static inline __m256i narrow(const c10::BFloat16*, vf v) {
  __m512i bits = (__m512i)v, one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
  __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), one);
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, half), odd);
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, rounded, 16));
}
static inline __m256i narrow(const c10::Half*, vf v) {
  return _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#endif
static inline void store(c10::BFloat16* p, vf v) {
#if defined(FASTREX_AVX512)
  _mm256_storeu_si256((__m256i*)p, narrow(p, v));
#else
  vi bits = (vi)v;
  vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vi nan = v != v;
  rounded = (rounded & ~nan) | (0x7fc0 & nan);
#if defined(FASTREX_AVX2)
  const __m256i low = _mm256_and_si256((__m256i)rounded, _mm256_set1_epi32(0xffff));
  const __m256i pairs = _mm256_packus_epi32(low, low);  // each half twice, within its 128-bit lane
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  vh h = __builtin_convertvector(rounded, vh);
  std::memcpy(p, &h, sizeof(h));
#endif
#endif
}

static inline vf load(const c10::Half* p) {
#if defined(FASTREX_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FASTREX_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}
static inline void store(c10::Half* p, vf v) {
#if defined(FASTREX_AVX512)
  _mm256_storeu_si256((__m256i*)p, narrow(p, v));
#elif defined(FASTREX_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

static inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}

// The larger and the smaller one of each lane: b's where one of them is a NaN.
static inline vf larger(vf a, vf b) {
#if defined(FASTREX_AVX512)
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(FASTREX_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline vf smaller(vf a, vf b) {
#if defined(FASTREX_AVX512)
  return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(FASTREX_AVX2)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
static inline vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }

// store(), or past the cache: then p lies on a multiple of the vector's size. Ends with finish_stores() of common.h.
template <bool STREAM>
static inline void put(float* p, vf v) {
  if (!STREAM) return store(p, v);
#if defined(FASTREX_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(FASTREX_AVX2)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
template <bool STREAM, typename T>
static inline void put(T* p, vf v) {
#if defined(FASTREX_AVX512)
  __m256i h = narrow(p, v);
  if (STREAM)
    _mm256_stream_si256((__m256i*)p, h);
  else
    _mm256_storeu_si256((__m256i*)p, h);
#else
  store(p, v);
#endif
}
