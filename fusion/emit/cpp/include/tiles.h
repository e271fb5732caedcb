// Products of bf16 in a core's matrix unit (AMX), which multiplies tiles: 16 rows x 32 entries times 32 x 16.
//
//   x   rows x depth, rows `row` apart: whole tiles may be read, so there is room for them, and zeros along the depth
//   y   packed: vector after vector of columns, of each the pairs of entries along the depth, as the unit takes them
//   c   rows x cols of fp32 with room for whole tiles
//
// Without the unit, operands are fp32 and products those of product.h.
#pragma once
#include "memory.h"

namespace fusion {

template <class T>
struct Rows {  // of a left operand
  const T* base;
  int64_t ld;
};

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

using Half = bf16;  // an entry of an operand in scratch
constexpr int64_t ROWS = 16, DEEP = 32;

inline int64_t deep(int64_t depth) { return (depth + DEEP - 1) / DEEP * DEEP; }

// A thread's shapes of tiles, all of them whole, for as long as it lives.
struct Unit {
  struct alignas(64) Shapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Unit() {
    Shapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = ROWS;
    asm volatile("" : : "r"(&shapes) : "memory");  // all of it is read, whatever the intrinsic says
    _tile_loadconfig(&shapes);
  }
  ~Unit() { _tile_release(); }
};

inline __mmask32 first_halves(int64_t n) { return n >= DEEP ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// A left operand's rows, filled up with zeros.
inline void widen_tile(const bf16* p, int64_t row, int64_t next, int64_t rows, int64_t depth, bf16* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; k += DEEP) {
      const bf16* const from = p + r * row + k * next;
      bf16 entries[DEEP] = {};
      if (next != 1)
        for (int64_t i = 0; i < std::min(DEEP, depth - k); ++i) entries[i] = from[i * next];
      const __m512i found = next == 1 ? _mm512_maskz_loadu_epi16(first_halves(depth - k), from)
                                      : _mm512_loadu_si512(entries);
      _mm512_storeu_si512(to + r * ld + k, found);
    }
}

// The same where it lies, if it is whole tiles.
inline Rows<bf16> left_rows(const bf16* p, int64_t row, int64_t next, int64_t rows, int64_t depth, bf16* to, int64_t ld) {
  if (next == 1 && rows % ROWS == 0 && depth % DEEP == 0) return {p, row};
  widen_tile(p, row, next, rows, depth, to, ld);
  return {to, ld};
}

template <class T>
void round_tile(const float* p, int64_t from_ld, int64_t rows, int64_t cols, bf16* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, p += from_ld, to += ld)
    for (int64_t c = 0; c < cols; c += DEEP) {
      const V low = load(p + c, first(cols - c)), high = load(p + c + W, first(cols - c - W));
      _mm512_storeu_si512(to + c, __m512i(_mm512_cvtne2ps_pbh(high, low)));
    }
}

template <class T>
void keep(bf16* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, bf16()));
}

inline void clear_before(bf16* p, int64_t end) {
  for (int64_t c = 0; c + W <= end; c += W) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + c), _mm256_setzero_si256());
}

// Zeros from the vector after `begin` on, to the end of the last tile.
inline void clear(bf16* p, int64_t begin, int64_t cols) {
  for (int64_t c = (begin + W - 1) / W * W; c < deep(cols); c += W)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + c), _mm256_setzero_si256());
}

// Pairs of two rows' entries.
inline void interleave(const bf16* even, const bf16* odd, Mask in_even, Mask in_odd, bf16* to) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in_even, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in_odd, odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// One panel of a right operand, whose entries are `step` apart along the depth and `col` along the columns.
inline void pack(const bf16* p, int64_t step, int64_t col, int64_t depth, int64_t cols, int width, bf16* to) {
  const int64_t whole = deep(depth);
  if (col == 1) {
    for (int64_t k = 0; k < whole; k += 2)
      for (int v = 0; v < width; ++v) {
        const Mask inside = first(cols - v * W);
        const bf16* const from = p + k * step + v * W;
        interleave(from, from + step, k < depth ? inside : Mask(0), k + 1 < depth ? inside : Mask(0), to + (v * whole + k) * W);
      }
    return;
  }
  for (int v = 0; v < width; ++v, p += W * col, cols -= W, to += W * whole) {
    if (step == 1)
      for (int64_t k = 0; k < whole; k += DEEP) {
        V block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          block[i] = _mm512_castsi512_ps(
              _mm512_maskz_loadu_epi16(i < cols ? first_halves(depth - k) : 0u, p + i * col + k));
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) _mm512_storeu_ps(to + (k + 2 * i) * W, block[i]);
      }
    else
      for (int64_t k = 0; k < whole; ++k)
        for (int64_t i = 0; i < W; ++i)
          to[k / 2 * 2 * W + 2 * i + k % 2] = k < depth && i < cols ? p[k * step + i * col] : bf16{0};
  }
}

// R x C tiles of c; tiles of y's next vector of columns are `vector` entries on.
template <int R, int C>
inline void block(const bf16* x, int64_t row, const bf16* y, int64_t vector, float* c, int64_t ldc, int64_t depth,
                  bool add) {
  const int64_t ldx = row * int64_t(sizeof(bf16)), ld = ldc * int64_t(sizeof(float));
  if (add) {
    _tile_loadd(0, c, ld);
    if constexpr (C > 1) _tile_loadd(1, c + W, ld);
    if constexpr (R > 1) _tile_loadd(2, c + ROWS * ldc, ld);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, c + ROWS * ldc + W, ld);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += DEEP, x += DEEP, y += DEEP * W) {
    _tile_loadd(4, x, ldx);
    _tile_loadd(6, y, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, y + vector, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, x + ROWS * row, ldx);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ld);
  if constexpr (C > 1) _tile_stored(1, c + W, ld);
  if constexpr (R > 1) _tile_stored(2, c + ROWS * ldc, ld);
  if constexpr (R > 1 && C > 1) _tile_stored(3, c + ROWS * ldc + W, ld);
}

// Entries from one vector of columns to the next.
inline int64_t vector_entries(Packed<bf16> y, int64_t) { return W * y.depth; }
template <class T>
int64_t vector_entries(Unpacked<T, bf16>, int64_t depth) {
  return W * deep(depth);
}

template <int, int, class Y, class L>
void product(L limit, const bf16* x, int64_t row, int64_t, Y y, int64_t k, float* c, int64_t ldc, int64_t count,
             int64_t cols, int64_t depth, bool add) {
  const int64_t vectors = (cols + W - 1) / W, vector = vector_entries(y, depth);
  asm volatile("" ::: "memory");  // the intrinsics do not say what they read and write
  for (int64_t v = 0; v < vectors; v += 2) {
    const int64_t end = limit.end_row((v + 2) * W, count), start = std::min(end, limit.first_row(v * W));
    if (start == end) continue;
    const bool wide = v + 1 < vectors;
    const bf16* const from = y.panel(v, wide ? 2 : 1, cols, depth) + k * W;
    for (int64_t r = start / ROWS * ROWS; r < end; r += 2 * ROWS) {
      const int64_t begin = limit.begin(r, depth) / DEEP * DEEP;
      const int64_t own = deep(limit.end(std::min(r + 2 * ROWS, count), depth)) - begin;
      float* const to = c + r * ldc + v * W;
      const bf16* const at = x + r * row + begin;
      const bf16* const y_at = from + begin * W;
      const bool tall = r + ROWS < end;
      if (tall && wide) block<2, 2>(at, row, y_at, vector, to, ldc, own, add);
      else if (tall) block<2, 1>(at, row, y_at, vector, to, ldc, own, add);
      else if (wide) block<1, 2>(at, row, y_at, vector, to, ldc, own, add);
      else block<1, 1>(at, row, y_at, vector, to, ldc, own, add);
    }
  }
  asm volatile("" ::: "memory");
}

#else

using Half = float;
template <class T>
inline Rows<float> left_rows(const T* p, int64_t row, int64_t next, int64_t rows, int64_t depth, float* to, int64_t ld) {
  widen_tile(p, row, next, rows, depth, to, ld);
  return {to, ld};
}
struct Unit {
  Unit() {}
};
inline int64_t deep(int64_t depth) { return depth; }

#endif

}  // namespace fusion
