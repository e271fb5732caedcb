// Vectors of fp32: one of three files with the same functions, by the instruction set that a kernel is compiled for.
// Arithmetic is that of the compiler's vector types: + - * / work on a V.
#pragma once
#include <cstdint>
#include <cstring>

namespace fusion {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

}  // namespace fusion

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "vector_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vector_avx2.h"
#else
#include "vector_plain.h"
#endif
