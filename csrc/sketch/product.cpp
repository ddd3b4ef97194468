#include "sketch/product.h"

#include <algorithm>

#include "common/versions.h"

namespace activedpo {

namespace {

// A small block, of kRows rows and kPanel bytes of columns, is multiplied in blocks of registers.
constexpr int kRows = 8;
constexpr int kPanel = 128;
constexpr std::int64_t kFewTokens = 16;

// Packs panels of `panel` columns, each with its tokens one after another; zeros pad the last one.
template <typename T, typename S>
ACTIVEDPO_INLINE void pack(S* packed, const T* x, std::int64_t stride, std::int64_t columns,
                           std::int64_t tokens, std::int64_t panel) {
  // Token by token, in memory order.
  for (std::int64_t t = 0; t < tokens; ++t) {
    const T* source = x + t * stride;
    for (std::int64_t first = 0; first < columns; first += panel) {
      S* target = packed + first * tokens + t * panel;
      const std::int64_t count = std::min(panel, columns - first);
      for (std::int64_t j = 0; j < count; ++j) target[j] = widened(source[first + j]);
      for (std::int64_t j = count; j < panel; ++j) target[j] = S(0);
    }
  }
}

// sums[r * sums_stride + c] += sum over t of narrow[t][r] wide[t * stride + c], a small block.
template <class Set, typename S>
ACTIVEDPO_INLINE void multiply(S* sums, std::int64_t sums_stride, const S* narrow, const S* wide,
                               std::int64_t stride, std::int64_t tokens) {
  // Aligned only like a single number: `wide` may be one of the caller's rows.
  typedef S Vector __attribute__((vector_size(Set::bytes), may_alias, aligned(sizeof(S))));
  constexpr int width = Set::bytes / sizeof(S);
  constexpr int rows = Set::count / 4;
  static_assert(kRows % rows == 0 && kPanel % (2 * Set::bytes) == 0, "whole blocks of registers");
  for (int block = 0; block < kRows / rows * (kPanel / (2 * Set::bytes)); ++block) {
    const S* left = narrow + block % (kRows / rows) * rows;
    const S* right = wide + block / (kRows / rows) * (2 * width);
    S* target = sums + (left - narrow) * sums_stride + (right - wide);
    Vector a[rows][2];
    for (int r = 0; r < rows; ++r) {
      a[r][0] = *reinterpret_cast<const Vector*>(target + r * sums_stride);
      a[r][1] = *reinterpret_cast<const Vector*>(target + r * sums_stride + width);
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Vector w0 = *reinterpret_cast<const Vector*>(right + t * stride);
      const Vector w1 = *reinterpret_cast<const Vector*>(right + t * stride + width);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const S value = left[t * kRows + r];
        a[r][0] += value * w0;
        a[r][1] += value * w1;
      }
    }
    for (int r = 0; r < rows; ++r) {
      *reinterpret_cast<Vector*>(target + r * sums_stride) = a[r][0];
      *reinterpret_cast<Vector*>(target + r * sums_stride + width) = a[r][1];
    }
  }
}

// The start of the panels of wide columns, and the steps between panels and between tokens.
template <typename S>
struct Panels {
  const S* first;
  std::int64_t panel_step, token_step;
};

template <typename S>
ACTIVEDPO_INLINE Panels<S> in_place(const S* wide, std::int64_t stride, std::int64_t panel) {
  return {wide, panel, stride};
}
ACTIVEDPO_INLINE Panels<float> in_place(const BFloat16*, std::int64_t, std::int64_t) {
  return {nullptr, 0, 0};  // never used: bfloat16 is widened when it is packed
}

// block[r * row_step + c * column_step] += sum over t of narrow[t, r] wide[t, c].
template <class Set, typename T, typename S>
ACTIVEDPO_INLINE void add_packed(S* block, std::int64_t row_step, std::int64_t column_step,
                                 const T* narrow, std::int64_t narrow_stride, std::int64_t rows,
                                 const T* wide, std::int64_t wide_stride, std::int64_t columns,
                                 std::int64_t tokens, S* scratch) {
  constexpr std::int64_t kColumns = kPanel / sizeof(S);
  S* packed_wide = scratch;
  S* packed_narrow = packed_wide + kProductTokens * kProductWide;
  const std::int64_t padded_rows = (rows + kRows - 1) / kRows * kRows;
  const std::int64_t padded_columns = (columns + kColumns - 1) / kColumns * kColumns;
  // Small blocks are added directly to the block if they fit.
  const bool fits = column_step == 1 && row_step == columns && rows == padded_rows &&
                    columns == padded_columns;
  S* sums = fits ? block : packed_narrow + kProductTokens * kProductNarrow;
  if (!fits) std::fill(sums, sums + padded_rows * padded_columns, S(0));
  // Numbers used by only one small block are read in place, a few tokens at a time, so that
  // memory is read in order.
  const bool direct = sizeof(T) == sizeof(S) && rows <= kRows && columns == padded_columns;
  const std::int64_t step = direct ? kFewTokens : kProductTokens;
  for (std::int64_t t = 0; t < tokens; t += step) {
    const std::int64_t count = std::min(step, tokens - t);
    pack(packed_narrow, narrow + t * narrow_stride, narrow_stride, rows, count, kRows);
    Panels<S> panels{packed_wide, kColumns * count, kColumns};
    if (direct) {
      panels = in_place(wide + t * wide_stride, wide_stride, kColumns);
    } else {
      pack(packed_wide, wide + t * wide_stride, wide_stride, columns, count, kColumns);
    }
    for (std::int64_t c = 0; c < columns; c += kColumns) {
      for (std::int64_t r = 0; r < rows; r += kRows) {
        multiply<Set>(sums + r * padded_columns + c, padded_columns, packed_narrow + r * count,
                 panels.first + c / kColumns * panels.panel_step, panels.token_step, count);
      }
    }
  }
  for (std::int64_t r = 0; r < rows && !fits; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      block[r * row_step + c * column_step] += sums[r * padded_columns + c];
    }
  }
}

}  // namespace

// The vectors of a small block run along the longer side.
#define ACTIVEDPO_ADD_PRODUCT(T)                                                                  \
  ACTIVEDPO_VERSIONS(                                                                             \
      void add_product_of(Sum<T>::Type* block, const T* left, std::int64_t left_stride,           \
                          std::int64_t height, const T* right, std::int64_t right_stride,         \
                          std::int64_t width, std::int64_t tokens, Sum<T>::Type* scratch),        \
      if (width >= height) {                                                                      \
        add_packed<Set>(block, width, std::int64_t{1}, left, left_stride, height, right,          \
                        right_stride, width, tokens, scratch);                                    \
      } else {                                                                                    \
        add_packed<Set>(block, std::int64_t{1}, width, right, right_stride, width, left,          \
                        left_stride, height, tokens, scratch);                                    \
      })                                                                                          \
  template <>                                                                                     \
  void add_product<T>(Sum<T>::Type * block, const T* left, std::int64_t left_stride,              \
                      std::int64_t height, const T* right, std::int64_t right_stride,             \
                      std::int64_t width, std::int64_t tokens, Sum<T>::Type* scratch) {           \
    add_product_of(block, left, left_stride, height, right, right_stride, width, tokens,          \
                   scratch);                                                                      \
  }
ACTIVEDPO_ADD_PRODUCT(float)
ACTIVEDPO_ADD_PRODUCT(double)
ACTIVEDPO_ADD_PRODUCT(BFloat16)
#undef ACTIVEDPO_ADD_PRODUCT

}  // namespace activedpo
