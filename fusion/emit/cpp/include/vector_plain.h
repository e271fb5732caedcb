// Eight fp32 numbers in a vector of the compiler's own (GCC, Clang), for any instruction set.
#pragma once
#include <cmath>

namespace fusion {

typedef float V __attribute__((vector_size(32), aligned(4)));
typedef int Mask __attribute__((vector_size(32), aligned(4)));  // all ones where an entry takes part
constexpr int W = 8;

inline V splat(float x) { return V{x, x, x, x, x, x, x, x}; }
inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V x) { *reinterpret_cast<V*>(p) = x; }

// The first n entries; all of them where n is W or more, none where it is 0 or less.
inline Mask first(int64_t n) {
  const int count = n > W ? W : n < 0 ? 0 : int(n);
  return Mask{0, 1, 2, 3, 4, 5, 6, 7} < count;
}
inline Mask between(int64_t a, int64_t b) { return first(b) & ~first(a); }  // entries from a to before b
inline V select(Mask m, V x, V y) { return m ? x : y; }
inline Mask less(V x, V y) { return x < y; }
inline Mask not_less(V x, V y) { return ~(x < y); }
inline Mask equal(V x, V y) { return x == y; }

inline V fma(V x, V y, V z) { return x * y + z; }
inline V max(V x, V y) { return x > y ? x : y; }  // y where one is NaN
inline V min(V x, V y) { return x < y ? x : y; }
inline V round(V x) {
  for (int i = 0; i < W; ++i) x[i] = std::nearbyint(x[i]);
  return x;
}
inline V scale(V x, V n, Mask m) {  // x 2^n for a whole n, or 0
  for (int i = 0; i < W; ++i) x[i] = m[i] ? std::ldexp(x[i], int(n[i])) : 0.0f;
  return x;
}
inline float max(V x) {
  float y = x[0];
  for (int i = 1; i < W; ++i) y = x[i] > y ? x[i] : y;
  return y;
}
inline float sum(V x) {
  float y = 0;
  for (int i = 0; i < W; ++i) y += x[i];
  return y;
}

inline float widen(uint16_t x, bf16) { return from_bits(uint32_t(x) << 16); }
inline float widen(uint16_t x, fp16) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  const float value = exponent ? from_bits((exponent + 112) << 23 | fraction << 13) : fraction * 0x1p-24f;
  return from_bits(sign | to_bits(value));
}
inline uint16_t narrow(float x, bf16) {  // to the nearest, ties to even; NaN stays one
  const uint32_t bits = to_bits(x);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t narrow(float x, fp16) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000, bits = to_bits(x) & 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(from_bits(bits) * 0x1p24f)));
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

template <class T>
inline V load(const T* p, Mask m) {
  V x = splat(0.0f);
  for (int i = 0; i < W; ++i)
    if (m[i]) x[i] = widen(p[i].bits, T());
  return x;
}
template <>
inline V load(const float* p, Mask m) {
  V x = splat(0.0f);
  for (int i = 0; i < W; ++i)
    if (m[i]) x[i] = p[i];
  return x;
}
template <class T>
inline void store(T* p, V x, Mask m) {
  for (int i = 0; i < W; ++i)
    if (m[i]) p[i].bits = narrow(x[i], T());
}
template <>
inline void store(float* p, V x, Mask m) {
  for (int i = 0; i < W; ++i)
    if (m[i]) p[i] = x[i];
}
template <class T>
inline V rounded(V x) {
  for (int i = 0; i < W; ++i) x[i] = widen(narrow(x[i], T()), T());
  return x;
}
inline Mask load(const bool* p, Mask m) {
  Mask taken = m ^ m;
  for (int i = 0; i < W; ++i)
    if (m[i]) taken[i] = p[i] ? -1 : 0;
  return taken;
}

// Rows become columns.
inline void transpose(V x[W]) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float y = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = y;
    }
}

}  // namespace fusion
