#include "scores/row_dot_products.h"

#include <algorithm>
#include <type_traits>

namespace activedpo {

namespace {

constexpr int kTileRows = 4;
constexpr int kLine = 64;  // bytes; a product has a sum for each of its lanes
constexpr std::int64_t kPanel = 48;  // directions that a group of rows is multiplied with at a time
constexpr std::int64_t kFew = 32;  // up to this many directions, rows are read in small tiles

// The sum of a product's lanes, halves first.
template <int Lanes, typename S>
ACTIVEDPO_INLINE double lane_sum(const S* lane) {
  if constexpr (Lanes == 1) {
    return static_cast<double>(lane[0]);
  } else {
    S sum[Lanes / 2];
#pragma GCC unroll 8
    for (int l = 0; l < Lanes / 2; ++l) sum[l] = lane[l] + lane[l + Lanes / 2];
    return lane_sum<Lanes / 2>(sum);
  }
}

// sums[r * n_w + s] += row[r] . w[s] over `count` numbers, a multiple of kDotAlign.
template <class Set, int Columns, typename S>
ACTIVEDPO_INLINE void add_tile(double* sums, std::int64_t n_w, std::int64_t n_rows,
                               const S* const* row, const S* w, std::int64_t w_stride,
                               std::int64_t count) {
  typedef S Vector __attribute__((vector_size(Set::bytes), may_alias, aligned(sizeof(S))));
  constexpr int width = Set::bytes / sizeof(S);
  S lane[kTileRows][Columns][kLine / sizeof(S)];
  // Lane by lane, as many as a register has: the sums are the same for every set.
  for (int first = 0; first < kLine / static_cast<int>(sizeof(S)); first += width) {
    Vector a[kTileRows][Columns] = {};
    for (std::int64_t c = first; c < count; c += kLine / sizeof(S)) {
      Vector y[Columns];
#pragma GCC unroll 4
      for (int s = 0; s < Columns; ++s) {
        y[s] = *reinterpret_cast<const Vector*>(w + s * w_stride + c);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        const Vector x = *reinterpret_cast<const Vector*>(row[r] + c);
#pragma GCC unroll 4
        for (int s = 0; s < Columns; ++s) a[r][s] += x * y[s];
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int s = 0; s < Columns; ++s) {
        *reinterpret_cast<Vector*>(&lane[r][s][first]) = a[r][s];
      }
    }
  }
  for (std::int64_t r = 0; r < std::min<std::int64_t>(kTileRows, n_rows); ++r) {
    for (int s = 0; s < Columns; ++s) sums[r * n_w + s] += lane_sum<kLine / sizeof(S)>(lane[r][s]);
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

template <class Set, typename T, typename S>
ACTIVEDPO_INLINE void add_dots(double* out, const T* const* rows, std::int64_t n_rows,
                               std::int64_t k, const S* w, std::int64_t w_stride, std::int64_t n_w,
                               S* room) {
  std::fill(out, out + n_rows * n_w, 0.0);
  constexpr int columns = Set::count >= 32 ? 4 : 3;
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
      // A tile's rows stay in the first cache, and a panel of directions in the second.
      for (std::int64_t begin = 0; begin < n_w; begin += kPanel) {
        const std::int64_t end = std::min(begin + kPanel, n_w);
        for (std::int64_t r = 0; r < here; r += kTileRows) {
          std::int64_t s = begin;
          const auto add = [&](auto columns) {
            for (; s + columns <= end; s += columns) {
              add_tile<Set, columns>(out + (first + r) * n_w + s, n_w, here - r, part + r,
                                     w + s * w_stride + c, w_stride, padded);
            }
          };
          add(std::integral_constant<int, columns>());
          add(std::integral_constant<int, 2>());
          add(std::integral_constant<int, 1>());
        }
      }
    }
  }
}

}  // namespace

#define ACTIVEDPO_ROW_DOT_PRODUCTS(T)                                                             \
  ACTIVEDPO_VERSIONS(                                                                             \
      void dots_of(double* out, const T* const* rows, std::int64_t n_rows, std::int64_t k,        \
                   const Sum<T>::Type* w, std::int64_t w_stride, std::int64_t n_w,                \
                   Sum<T>::Type* scratch),                                                        \
      add_dots<Set>(out, rows, n_rows, k, w, w_stride, n_w, scratch);)                            \
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
