// Sixteen fp32 numbers in a register of AVX-512.
#pragma once
#include <immintrin.h>

namespace fusion {

using V = __m512;
using Mask = __mmask16;
constexpr int W = 16;

inline V splat(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, V x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }

// The first n entries; all of them where n is W or more, none where it is 0 or less.
inline Mask first(int64_t n) { return n >= W ? Mask(0xffff) : n <= 0 ? Mask(0) : Mask((1u << n) - 1); }
inline Mask between(int64_t a, int64_t b) { return Mask(first(b) & ~first(a)); }  // entries from a to before b
inline V select(Mask m, V x, V y) { return _mm512_mask_blend_ps(m, y, x); }
inline Mask less(V x, V y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
inline Mask not_less(V x, V y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ); }
inline Mask equal(V x, V y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }

inline V fma(V x, V y, V z) { return _mm512_fmadd_ps(x, y, z); }
inline V max(V x, V y) { return _mm512_max_ps(x, y); }  // y where one is NaN
inline V min(V x, V y) { return _mm512_min_ps(x, y); }
inline V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V scale(V x, V n, Mask m) { return _mm512_maskz_scalef_ps(m, x, n); }  // x 2^n for a whole n, or 0
inline float max(V x) { return _mm512_reduce_max_ps(x); }
inline float sum(V x) { return _mm512_reduce_add_ps(x); }

inline V widen(__m256i x, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline V widen(__m256i x, fp16) { return _mm512_cvtph_ps(x); }

inline __m256i narrow(V x, bf16) {  // to the nearest, ties to even; NaN stays one
#if defined(__AVX512BF16__)
  return __m256i(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}
inline __m256i narrow(V x, fp16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <class T>
inline V load(const T* p, Mask m) {
  return widen(_mm256_maskz_loadu_epi16(m, p), T());
}
template <class T>
inline void store(T* p, V x, Mask m) {
  _mm256_mask_storeu_epi16(p, m, narrow(x, T()));
}
template <class T>
inline V rounded(V x) {
  return widen(narrow(x, T()), T());
}
inline Mask load(const bool* p, Mask m) {
  return _mm512_mask_cmpneq_epi32_mask(m, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p)), _mm512_setzero_si512());
}

// Rows become columns.
__attribute__((always_inline)) inline void transpose(V x[W]) {
  V y[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 4)
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
      x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 8)
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0xdd);
    }
#pragma GCC unroll 16
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0xdd);
  }
}

}  // namespace fusion
