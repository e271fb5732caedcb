// c = x y or c += x y for one tile, in blocks of registers.
//
//   x   rows x depth, read entry by entry: any strides
//   y   depth x cols, read vector by vector: panels of up to NV vectors
//   c   rows x cols of fp32 with room for whole blocks, so nothing is masked when it is written
#pragma once
#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace fusion {

// The right operand. Vectors of columns stand in panels; entries of one panel are `step` apart along the depth.
template <class T>
struct Packed {  // panel after panel, each `depth` steps long; the last vector is filled up with zeros
  static constexpr bool MASKED = false;
  const T* base;
  int64_t depth;
  const T* panel(int64_t vector, int, int64_t, int64_t) const { return base + vector * W * depth; }
  int64_t step(int width) const { return width * W; }
};
template <class T>
Packed(T*, int64_t) -> Packed<std::remove_const_t<T>>;
struct Direct {  // a matrix as it is, whose columns are adjacent
  static constexpr bool MASKED = true;
  const float* base;
  int64_t stride;
  const float* panel(int64_t vector, int, int64_t, int64_t) const { return base + vector * W; }
  int64_t step(int) const { return stride; }
};

struct Scratch {  // the same with room for whole vectors
  static constexpr bool MASKED = false;
  const float* base;
  int64_t stride;
  const float* panel(int64_t vector, int, int64_t, int64_t) const { return base + vector * W; }
  int64_t step(int) const { return stride; }
};

// The vectors of a tile stand in as few panels as `most` allows, of widths that differ by at most one.
struct Panel {
  int64_t begin;
  int width;
  static int64_t count(int64_t vectors, int64_t most) { return (vectors + most - 1) / most; }
  Panel(int64_t vectors, int64_t most, int64_t p) {
    const int64_t panels = count(vectors, most);
    begin = p * vectors / panels;
    width = int((p + 1) * vectors / panels - begin);
  }
};

// One step along the depth: entries of x, `row` apart, times vectors of y.
template <int MR, int NV, bool MASKED>
__attribute__((always_inline)) inline void step_of(V (&sums)[MR][NV], const float* x, int64_t row, const float* y, Mask last) {
  V columns[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) columns[v] = MASKED && v == NV - 1 ? load(y + v * W, last) : load(y + v * W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const V entry = splat(x[r * row]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[r][v] = fma(entry, columns[v], sums[r][v]);
  }
}

// Constant distances spare a core sums of addresses, which take turns with its multiplications: 3 % of the widest block,
// whose code is the longest; shorter ones lose by it.
constexpr int WIDEST = 4, TOGETHER = 4;

// What is there already is added to the sums at the end: sums of tiles' sums round less than one long sum.
template <int MR, int NV, bool MASKED>
__attribute__((noinline)) void block(const float* x, int64_t row, int64_t next, const float* y, int64_t step, Mask last,
                                     float* c, int64_t ldc, int64_t depth, bool add) {
  V sums[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[r][v] = splat(0.0f);
  int64_t k = 0;
  if constexpr (NV == WIDEST && !MASKED)
    if (next == 1 && step == NV * W)
      for (; k + TOGETHER <= depth; k += TOGETHER, x += TOGETHER, y += TOGETHER * NV * W)
#pragma GCC unroll 4
        for (int u = 0; u < TOGETHER; ++u) step_of<MR, NV, MASKED>(sums, x + u, row, y + u * NV * W, last);
#pragma GCC unroll 4
  for (; k < depth; ++k, x += next, y += step) step_of<MR, NV, MASKED>(sums, x, row, y, last);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v)
      store(c + r * ldc + v * W, add ? load(c + r * ldc + v * W) + sums[r][v] : sums[r][v]);
}

// Which part of a product a causal mask leaves. Row r takes part in what is before r + offset, or in what is from there on.
struct Full {
  static int64_t first_row(int64_t) { return 0; }
  static int64_t end_row(int64_t, int64_t rows) { return rows; }
  static int64_t begin(int64_t, int64_t) { return 0; }
  static int64_t end(int64_t, int64_t depth) { return depth; }
};
struct ColumnsBefore : Full {  // of a value that is masked: rows before the one that reaches a column need it not
  int64_t offset;
  explicit ColumnsBefore(int64_t offset) : offset(offset) {}
  int64_t first_row(int64_t column) const { return column >= offset ? column - offset + 1 : 0; }
};
struct ColumnsFrom : Full {  // nor do those after the last that does
  int64_t offset;
  explicit ColumnsFrom(int64_t offset) : offset(offset) {}
  int64_t end_row(int64_t end_column, int64_t rows) const { return std::clamp<int64_t>(end_column - offset, 0, rows); }
};
struct DepthBefore : Full {  // of a sum over such a value: what no row of some takes part in is zero
  int64_t offset;
  explicit DepthBefore(int64_t offset) : offset(offset) {}
  int64_t end(int64_t end_row, int64_t depth) const { return std::clamp<int64_t>(end_row - 1 + offset, 0, depth); }
};
struct DepthFrom : Full {
  int64_t offset;
  explicit DepthFrom(int64_t offset) : offset(offset) {}
  int64_t begin(int64_t row, int64_t depth) const { return std::clamp<int64_t>(row + offset, 0, depth); }
};

// Rows of one panel: blocks of MR rows, the rest in smaller ones.
template <int MR, int NV, bool MASKED, class L>
inline void rows(L limit, int64_t r, const float* x, int64_t row, int64_t next, const float* y, int64_t step, Mask last,
                 float* c, int64_t ldc, int64_t count, int64_t depth, bool add) {
  for (; r + MR <= count; r += MR) {
    const int64_t begin = limit.begin(r, depth), steps = limit.end(r + MR, depth) - begin;
    block<MR, NV, MASKED>(x + r * row + begin * next, row, next, y + begin * step, step, last, c + r * ldc, ldc, steps, add);
  }
  if constexpr (MR > 1)
    rows<(MR > 4 ? 4 : MR / 2), NV, MASKED>(limit, r, x, row, next, y, step, last, c, ldc, count, depth, add);
}

template <int MR, int NV, bool MASKED, class L>
inline void panel(int width, L limit, int64_t r, const float* x, int64_t row, int64_t next, const float* y, int64_t step,
                  Mask last, float* c, int64_t ldc, int64_t count, int64_t depth, bool add) {
  if (width == NV) return rows<MR, NV, MASKED>(limit, r, x, row, next, y, step, last, c, ldc, count, depth, add);
  if constexpr (NV > 1)
    panel<MR, NV - 1, MASKED>(width, limit, r, x, row, next, y, step, last, c, ldc, count, depth, add);
}

template <int MR, int NV, class Y, class L>
void product(L limit, const float* x, int64_t row, int64_t next, Y y, int64_t k, float* c, int64_t ldc, int64_t count,
             int64_t cols, int64_t depth, bool add) {
  const int64_t vectors = (cols + W - 1) / W;
  for (int64_t p = 0; p < Panel::count(vectors, NV); ++p) {
    const Panel at(vectors, NV, p);
    const int64_t step = y.step(at.width), left = cols - (vectors - 1) * W;
    const int64_t end = limit.end_row((at.begin + at.width) * W, count);
    const int64_t r = std::min(end, limit.first_row(at.begin * W));
    if (r == end) continue;
    const float* const from = y.panel(at.begin, at.width, cols, depth) + k * step;
    float* const to = c + at.begin * W;
    if (Y::MASKED && left < W && at.begin + at.width == vectors)
      panel<MR, NV, Y::MASKED>(at.width, limit, r, x, row, next, from, step, first(left), to, ldc, end, depth, add);
    else
      panel<MR, NV, false>(at.width, limit, r, x, row, next, from, step, first(W), to, ldc, end, depth, add);
  }
}

}  // namespace fusion
