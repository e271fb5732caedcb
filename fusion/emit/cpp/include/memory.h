// Tiles between memory and scratch: packing, conversion, and loops over the vectors of a row.
#pragma once
#include <algorithm>

#include "product.h"

namespace fusion {

struct All {};  // a mask that takes every entry
inline V load(const float* p, All) { return load(p); }
inline void store(float* p, V x, All) { store(p, x); }
template <class T>
inline V load(const T* p, All) {
  return load(p, first(W));
}
template <class T>
inline void store(T* p, V x, All) {
  store(p, x, first(W));
}
inline Mask load(const bool* p, All) { return load(p, first(W)); }
inline V select(All, V x, V) { return x; }

// Call `each(column, mask)` for the vectors of a row's entries from `begin` to before `cols`.
template <class F>
inline void vectors(int64_t begin, int64_t cols, F each) {
  int64_t c = begin / W * W;
  if (c < begin) {
    each(c, between(begin - c, cols - c));
    c += W;
  }
  for (; c + W <= cols; c += W) each(c, All());
  if (c < cols) each(c, first(cols - c));
}
template <class F>
inline void vectors(int64_t cols, F each) {
  vectors(0, cols, each);
}

// Zeros up to the vector that holds `end`, which has them already.
inline void clear_before(float* p, int64_t end) {
  for (int64_t c = 0; c + W <= end; c += W) store(p + c, splat(0.0f));
}

// Zeros from the vector after `begin` on; the one that holds `begin` has them already.
inline void clear(float* p, int64_t begin, int64_t cols) {
  for (int64_t c = (begin + W - 1) / W * W; c < cols; c += W) store(p + c, splat(0.0f));
}

// Entries that are `stride` apart.
template <class T>
inline V gather(const T* p, int64_t stride, int64_t count) {
  T entries[W] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, W); ++i) entries[i] = p[i * stride];
  return load(entries, All());
}
inline Mask gather(const bool* p, int64_t stride, int64_t count) {
  bool entries[W] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, W); ++i) entries[i] = p[i * stride];
  return load(entries, All());
}
inline Mask all_of(bool x) { return first(x ? W : 0); }
inline float scalar(float x) { return x; }
template <class T>
inline float scalar(T x) {
  float entries[W];
  store(entries, load(&x, first(1)));
  return entries[0];
}
template <class T>
inline T narrowed(float x) {
  T entry;
  store(&entry, splat(x), first(1));
  return entry;
}
template <>
inline float narrowed(float x) {
  return x;
}

// One panel of a right operand, whose entries are `step` apart along the depth and `col` along the columns.
template <class T>
void pack(const T* p, int64_t step, int64_t col, int64_t depth, int64_t cols, int width, float* to) {
  for (int v = 0; v < width; ++v, p += W * col, cols -= W, to += W) {
    const Mask inside = first(cols);
    if (col == 1)
      for (int64_t k = 0; k < depth; ++k) store(to + k * width * W, load(p + k * step, inside));
    else if (step == 1)
      for (int64_t k = 0; k < depth; k += W) {
        V block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = i < cols ? load(p + i * col + k, first(depth - k)) : splat(0.0f);
        transpose(block);
        if (k + W <= depth)
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(to + (k + i) * width * W, block[i]);
        else
          for (int i = 0; i < depth - k; ++i) store(to + (k + i) * width * W, block[i]);
      }
    else
      for (int64_t k = 0; k < depth; ++k) store(to + k * width * W, gather(p + k * step, col, cols));
  }
}

// A right operand as it lies, of which each panel is packed when its turn comes.
template <class T, class R>
struct Unpacked {
  static constexpr bool MASKED = false;
  const T* base;
  int64_t along, across;  // distances of entries along the depth and along the columns
  R* room;
  int64_t step(int width) const { return width * W; }
  const R* panel(int64_t vector, int width, int64_t cols, int64_t depth) const {
    pack(base + vector * W * across, along, across, depth, cols - vector * W, width, room);
    return room;
  }
};
template <class T, class R>
Unpacked(const T*, int64_t, int64_t, R*) -> Unpacked<T, R>;

// A left operand as fp32, rows of `ld` entries.
template <class T>
void widen_tile(const T* p, int64_t row, int64_t next, int64_t rows, int64_t depth, float* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; k += W)
      store(to + r * ld + k, next == 1 ? load(p + r * row + k, first(depth - k))
                                       : gather(p + r * row + k * next, next, depth - k));
}

template <class T>
void round_tile(const float* p, int64_t from_ld, int64_t rows, int64_t cols, float* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += W) store(to + r * ld + c, rounded<T>(load(p + r * from_ld + c)));
}

// A vector of an operand, rounded as memory would have it.
template <class T>
void keep(float* p, V x) {
  store(p, rounded<T>(x));
}

inline void zero(float* p, int64_t rows, int64_t cols, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += W) store(p + r * ld + c, splat(0.0f));
}

// A tile from scratch to memory, where columns are `col` apart.
template <class T>
void store_tile(const float* from, int64_t ld, int64_t rows, int64_t cols, T* p, int64_t row, int64_t col) {
  for (int64_t r = 0; r < rows; ++r) {
    if (col == 1)
      vectors(cols, [&](int64_t c, auto inside) { store(p + r * row + c, load(from + r * ld + c), inside); });
    else
      for (int64_t c = 0; c < cols; ++c) p[r * row + c * col] = narrowed<T>(from[r * ld + c]);
  }
}

}  // namespace fusion
