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

// Rows go on to new entries, whose maxima stand in `factor`: that becomes what their sums so far are to be multiplied by.
inline void advance(float* peak, float* total, float* factor, int64_t rows) {
  vectors(rows, [&](int64_t r, auto inside) {
    const V old = load(peak + r, inside), now = max(load(factor + r, inside), old);
    const V from = select(equal(now, splat(-INF)), splat(0.0f), now);
    const V ratio = select(equal(old, now), splat(1.0f), exp(old - from));
    store(peak + r, now, inside);
    store(factor + r, ratio, inside);
    store(total + r, load(total + r, inside) * ratio, inside);
  });
}

inline void multiply_rows(float* p, int64_t ld, int64_t rows, int64_t cols, const float* factor) {
  for (int64_t r = 0; r < rows; ++r)
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
