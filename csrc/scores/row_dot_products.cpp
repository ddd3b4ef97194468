#include "scores/row_dot_products.h"

#include <algorithm>
#include <cstring>

namespace activedpo {

namespace {

constexpr int kTileRows = 4;
constexpr int kTileColumns = 4;
constexpr std::int64_t kFew = 32;  // up to this many directions, rows are read in small tiles

// The sum of a vector's numbers, halves first.
template <typename S, typename Vector>
ACTIVEDPO_INLINE double lane_sum(const Vector& vector) {
  typedef S Low __attribute__((vector_size(32)));
  typedef S Quarter __attribute__((vector_size(16)));
  Low h[2];
  std::memcpy(h, &vector, sizeof h);
  const Low half = h[0] + h[1];
  Quarter q[2];
  std::memcpy(q, &half, sizeof q);
  const Quarter quarter = q[0] + q[1];
  if constexpr (sizeof(S) == 4) {
    return static_cast<double>((quarter[0] + quarter[2]) + (quarter[1] + quarter[3]));
  } else {
    return quarter[0] + quarter[1];
  }
}

// sums[r * n_w + s] += row[r] . w[s] over `count` numbers, a multiple of kDotAlign.
template <int Columns, typename S>
ACTIVEDPO_INLINE void add_tile(double* sums, std::int64_t n_w, std::int64_t n_rows,
                               const S* const* row, const S* w, std::int64_t w_stride,
                               std::int64_t count) {
  typedef S Vector __attribute__((vector_size(64), may_alias, aligned(sizeof(S))));
  constexpr int width = 64 / sizeof(S);
  Vector a[kTileRows][Columns] = {};
  const S* const r0 = row[0];
  const S* const r1 = row[1];
  const S* const r2 = row[2];
  const S* const r3 = row[3];
  for (std::int64_t c = 0; c < count; c += width) {
    const Vector x0 = *reinterpret_cast<const Vector*>(r0 + c);
    const Vector x1 = *reinterpret_cast<const Vector*>(r1 + c);
    const Vector x2 = *reinterpret_cast<const Vector*>(r2 + c);
    const Vector x3 = *reinterpret_cast<const Vector*>(r3 + c);
#pragma GCC unroll 4
    for (int s = 0; s < Columns; ++s) {
      const Vector y = *reinterpret_cast<const Vector*>(w + s * w_stride + c);
      a[0][s] += x0 * y;
      a[1][s] += x1 * y;
      a[2][s] += x2 * y;
      a[3][s] += x3 * y;
    }
  }
  for (std::int64_t r = 0; r < std::min<std::int64_t>(kTileRows, n_rows); ++r) {
    for (int s = 0; s < Columns; ++s) sums[r * n_w + s] += lane_sum<S>(a[r][s]);
  }
}

// Returns part of a row in the precision used for sums, zero-padded to whole vectors.
template <typename T, typename S>
ACTIVEDPO_INLINE const S* stretch(S* room, const T* source, std::int64_t count) {
  const std::int64_t padded = (count + kDotAlign - 1) / kDotAlign * kDotAlign;
  if constexpr (sizeof(T) == sizeof(S)) {
    if (padded == count) return reinterpret_cast<const S*>(source);
  }
  for (std::int64_t i = 0; i < count; ++i) room[i] = widened(source[i]);
  for (std::int64_t i = count; i < padded; ++i) room[i] = S(0);
  return room;
}

template <typename T, typename S>
ACTIVEDPO_INLINE void add_dots(double* out, const T* const* rows, std::int64_t n_rows,
                               std::int64_t k, const S* w, std::int64_t w_stride, std::int64_t n_w,
                               S* room) {
  std::fill(out, out + n_rows * n_w, 0.0);
  // With few directions, reading the rows dominates: each tile of rows is read to its end.
  const std::int64_t step = n_w <= kFew ? kTileRows : kDotRows;
  for (std::int64_t first = 0; first < n_rows; first += step) {
    const std::int64_t here = std::min(step, n_rows - first);
    for (std::int64_t c = 0; c < k; c += kDotBlock) {
      const std::int64_t count = std::min<std::int64_t>(kDotBlock, k - c);
      const std::int64_t padded = (count + kDotAlign - 1) / kDotAlign * kDotAlign;
      const S* part[kDotRows];
      for (std::int64_t r = 0; r < kDotRows; ++r) {
        // The last tile is padded with the last row.
        part[r] = r < here ? stretch(room + r * kDotBlock, rows[first + r] + c, count)
                           : part[here - 1];
      }
      double* sums = out + first * n_w;
      std::int64_t s = 0;
      for (; s + kTileColumns <= n_w; s += kTileColumns) {
        for (std::int64_t r = 0; r < here; r += kTileRows) {
          add_tile<kTileColumns>(sums + r * n_w + s, n_w, here - r, part + r,
                                 w + s * w_stride + c, w_stride, padded);
        }
      }
      for (; s < n_w; ++s) {
        for (std::int64_t r = 0; r < here; r += kTileRows) {
          add_tile<1>(sums + r * n_w + s, n_w, here - r, part + r, w + s * w_stride + c, w_stride,
                      padded);
        }
      }
    }
  }
}

}  // namespace

#define ACTIVEDPO_ROW_DOT_PRODUCTS(T)                                                             \
  ACTIVEDPO_CLONES                                                                                \
  void dots_of(double* out, const T* const* rows, std::int64_t n_rows, std::int64_t k,            \
               const Sum<T>::Type* w, std::int64_t w_stride, std::int64_t n_w,                    \
               Sum<T>::Type* scratch) {                                                           \
    add_dots(out, rows, n_rows, k, w, w_stride, n_w, scratch);                                    \
  }                                                                                               \
  template <>                                                                                     \
  void row_dot_products<T>(double* out, const T* const* rows, std::int64_t n_rows,                \
                           std::int64_t k, const Sum<T>::Type* w, std::int64_t w_stride,          \
                           std::int64_t n_w, Sum<T>::Type* scratch) {                             \
    dots_of(out, rows, n_rows, k, w, w_stride, n_w, scratch);                                     \
  }
ACTIVEDPO_ROW_DOT_PRODUCTS(float)
ACTIVEDPO_ROW_DOT_PRODUCTS(double)
ACTIVEDPO_ROW_DOT_PRODUCTS(BFloat16)
ACTIVEDPO_ROW_DOT_PRODUCTS(Half)
#undef ACTIVEDPO_ROW_DOT_PRODUCTS

}  // namespace activedpo
