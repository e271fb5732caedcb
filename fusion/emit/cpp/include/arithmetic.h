// Functions of a vector, to about an ulp of fp32; NaN stays NaN.
#pragma once
#include "vector.h"

namespace fusion {

const float INF = __builtin_inff();

template <int N>
inline V polynomial(V x, const float (&coefficients)[N]) {
  V y = splat(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = fma(y, x, splat(coefficients[i]));
  return y;
}

// Powers below the smallest normal number are 0: a CPU takes forty times as long for those that are not, or nearly so.
constexpr float LOWEST = -87.3f, LOWEST_2 = -126.0f;

// e^x = 2^n e^r with |r| <= ln 2 / 2; the polynomial is the best of its degree in relative error, 2e-9.
inline V exp(V x) {
  static constexpr float P[] = {1.0f, 1.0f, 0.4999999208f, 0.1666642017f, 0.04166822558f, 0.008374815804f, 0.001383684552f};
  const Mask kept = not_less(x, splat(LOWEST));
  x = min(splat(128.0f), max(splat(LOWEST), x));
  const V n = round(x * splat(1.44269504f));
  const V r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  return scale(polynomial(r, P), n, kept);
}

template <int N>
inline V exp2_by(V x, const float (&coefficients)[N]) {
  const Mask kept = not_less(x, splat(LOWEST_2));
  x = max(splat(LOWEST_2), x);
  const V n = round(x);
  return scale(polynomial(x - n, coefficients), n, kept);
}

// 2^x for an x that is not much above 0, as those of a softmax are; likewise 2e-9.
inline V exp2_below(V x) {
  static constexpr float P[] = {1.0f,           0.6931472057f,  0.2402264689f,  0.05550328777f,
                            0.009618488958f, 0.001339993122f, 0.0001534581181f};
  return exp2_by(x, P);
}

// The same for what is rounded to half a float's digits: 4e-6.
inline V exp2_below_roughly(V x) {
  static constexpr float P[] = {1.0f, 0.6931242f, 0.24024099f, 0.055906426f, 0.009582853f};
  return exp2_by(x, P);
}

inline V sigmoid(V x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// The standard normal distribution at -z for z >= 0: e^(-z^2/2) times a polynomial in 1 / (1 + 0.3 z), 4e-8 off.
inline V tail(V z, V density) {
  static constexpr float P[] = {1.59527635e-05f, 1.19301596e-01f, 1.23597607e-01f, 8.62391287e-02f, 1.68738093e-01f,
                            -1.28567149e-01f, 2.95039871e-01f, -2.21670466e-01f, 6.18145642e-02f, -4.50918020e-03f};
  return density * polynomial(splat(1.0f) / fma(z, splat(0.3f), splat(1.0f)), P);
}

inline V magnitude(V x) { return max(-x, x); }

// e^(-x^2/2), and 0 where it is nearly that: never the numbers that a CPU takes a hundred times as long for.
inline V density(V x) {
  const V square = x * x;
  return select(less(splat(144.0f), square), splat(0.0f), exp(max(splat(-72.0f), square * splat(-0.5f))));
}

inline V cumulative(V x, V density) {  // of the standard normal distribution
  const V below = tail(magnitude(x), density);
  return select(less(x, splat(0.0f)), below, splat(1.0f) - below);
}

inline V relu(V x) { return max(splat(0.0f), x); }
inline V silu(V x) { return x / (splat(1.0f) + exp(-x)); }
inline V gelu(V x) { return x * cumulative(x, density(x)); }

// 0.5 x (1 + tanh(u)) is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline V tanh_argument(V x) { return splat(1.59576912f) * fma(x * x * x, splat(0.044715f), x); }
inline V gelu_tanh(V x) { return x / (splat(1.0f) + exp(-tanh_argument(x))); }

// Their derivatives at y, times x.
inline V relu_grad(V x, V y) { return select(less(splat(0.0f), y), x, splat(0.0f)); }
inline V silu_grad(V x, V y) {
  const V s = sigmoid(y);
  return x * s * fma(y, splat(1.0f) - s, splat(1.0f));
}
inline V gelu_grad(V x, V y) {
  const V d = density(y);
  return x * fma(y * d, splat(0.398942280f), cumulative(y, d));
}
inline V gelu_tanh_grad(V x, V y) {
  const V s = sigmoid(tanh_argument(y));
  const V slope = splat(1.59576912f) * fma(y * y, splat(0.134145f), splat(1.0f));
  return x * s * fma(y * (splat(1.0f) - s), slope, splat(1.0f));
}

inline V exp_minus(V x, V y) { return select(equal(y, splat(-INF)), splat(0.0f), exp(x - y)); }

}  // namespace fusion
