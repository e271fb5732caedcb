// The state of an online softmax: for every row its maximum so far, and the sum of exponents against it.
#pragma once
#include <cmath>

#include "arithmetic.h"
#include "memory.h"

namespace fusion {

inline void start(float* peak, float* total, int64_t rows) {
  std::fill(peak, peak + rows, -INF);
  std::fill(total, total + rows, 0.0f);
}

// What to subtract: a row without entries has exp(-inf) = 0 everywhere.
inline float finite(float peak) { return peak == -INF ? 0.0f : peak; }

// What sums against an old maximum are to be multiplied by.
inline float correction(float old_peak, float peak) {
  if (old_peak == peak) return 1.0f;
  float entries[W];
  store(entries, exp(splat(old_peak - finite(peak))));
  return entries[0];
}

inline void multiply_rows(float* p, int64_t ld, int64_t rows, int64_t cols, const float* factor) {
  for (int64_t r = 0; r < rows; ++r)
    if (factor[r] != 1.0f)
      for (int64_t c = 0; c < cols; c += W) store(p + r * ld + c, load(p + r * ld + c) * splat(factor[r]));
}

inline float inverse(float total) { return total == 0.0f ? 1.0f : 1.0f / total; }

inline void divide_rows(float* p, int64_t ld, int64_t rows, int64_t cols, const float* total) {
  for (int64_t r = 0; r < rows; ++r) {
    const V factor = splat(inverse(total[r]));
    for (int64_t c = 0; c < cols; c += W) store(p + r * ld + c, load(p + r * ld + c) * factor);
  }
}

inline void store_lse(const float* peak, const float* total, int64_t rows, float* p, int64_t row) {
  for (int64_t r = 0; r < rows; ++r) p[r * row] = peak[r] + std::log(total[r]);
}

}  // namespace fusion
