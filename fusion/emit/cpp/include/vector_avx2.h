// Eight fp32 numbers in a register of AVX2, with FMA and F16C.
#pragma once
#include <immintrin.h>

namespace fusion {

using V = __m256;
struct Mask {
  __m256i bits;  // all ones where an entry takes part
};
constexpr int W = 8;

inline V splat(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const float* p, Mask m) { return _mm256_maskload_ps(p, m.bits); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, V x, Mask m) { _mm256_maskstore_ps(p, m.bits, x); }

// The first n entries; all of them where n is W or more, none where it is 0 or less.
inline Mask first(int64_t n) {
  const int count = n > W ? W : n < 0 ? 0 : int(n);
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
}
inline Mask between(int64_t a, int64_t b) {  // entries from a to before b
  return {_mm256_andnot_si256(first(a).bits, first(b).bits)};
}
inline V select(Mask m, V x, V y) { return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(m.bits)); }
inline Mask less(V x, V y) { return {_mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_LT_OQ))}; }
inline Mask not_less(V x, V y) { return {_mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_NLT_UQ))}; }
inline Mask equal(V x, V y) { return {_mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_EQ_OQ))}; }

inline V fma(V x, V y, V z) { return _mm256_fmadd_ps(x, y, z); }
inline V max(V x, V y) { return _mm256_max_ps(x, y); }  // y where one is NaN
inline V min(V x, V y) { return _mm256_min_ps(x, y); }
inline V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline V power(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
inline V scale(V x, V n, Mask m) {  // x 2^n for a whole n, in two steps that are each within range; or 0
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_and_ps(x * power(half) * power(_mm256_sub_epi32(whole, half)), _mm256_castsi256_ps(m.bits));
}

inline float max(V x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline float sum(V x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

inline bool has(Mask m, int entry) { return _mm256_movemask_ps(_mm256_castsi256_ps(m.bits)) >> entry & 1; }

inline V widen(__m128i x, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline V widen(__m128i x, fp16) { return _mm256_cvtph_ps(x); }

inline __m128i narrow(V x, bf16) {  // to the nearest, ties to even; NaN stays one
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  up = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}
inline __m128i narrow(V x, fp16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <class T>
inline V load(const T* p, Mask m) {
  alignas(16) T entries[W] = {};
  for (int i = 0; i < W; ++i)
    if (has(m, i)) entries[i] = p[i];
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)), T());
}
template <class T>
inline void store(T* p, V x, Mask m) {
  alignas(16) T entries[W];
  _mm_store_si128(reinterpret_cast<__m128i*>(entries), narrow(x, T()));
  for (int i = 0; i < W; ++i)
    if (has(m, i)) p[i] = entries[i];
}
template <class T>
inline V rounded(V x) {
  return widen(narrow(x, T()), T());
}
inline Mask load(const bool* p, Mask m) {
  alignas(32) int entries[W] = {};
  for (int i = 0; i < W; ++i)
    if (has(m, i)) entries[i] = p[i] ? -1 : 0;
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(entries))};
}

// Rows become columns.
__attribute__((always_inline)) inline void transpose(V x[W]) {
  V y[W];
#pragma GCC unroll 8
  for (int i = 0; i < W; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < W; i += 4)
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
      x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    y[j] = _mm256_permute2f128_ps(x[j], x[j + 4], 0x20);
    y[j + 4] = _mm256_permute2f128_ps(x[j], x[j + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int j = 0; j < W; ++j) x[j] = y[j];
}

}  // namespace fusion
