#include "product.h"

#include <algorithm>
#include <cstring>

#include "philox.h"

namespace activedpo {

namespace {

constexpr int kRows = 8;  // of the register block; its columns are two vectors of 64 bytes

ACTIVEDPO_INLINE float widen(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
ACTIVEDPO_INLINE float widen(float x) { return x; }
ACTIVEDPO_INLINE double widen(double x) { return x; }

// Panels of `panel` columns, each with its tokens one after the other; zeros fill the last one.
template <typename T, typename S>
ACTIVEDPO_INLINE void pack(S* packed, const T* x, std::int64_t stride, std::int64_t columns,
                           std::int64_t tokens, std::int64_t panel) {
  for (std::int64_t first = 0; first < columns; first += panel) {
    const std::int64_t count = std::min(panel, columns - first);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const T* source = x + t * stride + first;
      for (std::int64_t j = 0; j < count; ++j) packed[j] = widen(source[j]);
      for (std::int64_t j = count; j < panel; ++j) packed[j] = S(0);
      packed += panel;
    }
  }
}

// sums[r][c] = sum over t of narrow[t][r] wide[t * stride + c] for one register block.
template <typename S>
ACTIVEDPO_INLINE void multiply(S* sums, const S* narrow, const S* wide, std::int64_t stride,
                               std::int64_t tokens) {
  // Only as aligned as a number: `wide` may be a row of the caller's.
  typedef S Vector __attribute__((vector_size(64), may_alias, aligned(sizeof(S))));
  constexpr int width = 64 / sizeof(S);
  Vector a[kRows][2] = {};
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Vector w0 = *reinterpret_cast<const Vector*>(wide + t * stride);
    const Vector w1 = *reinterpret_cast<const Vector*>(wide + t * stride + width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const S value = narrow[t * kRows + r];
      a[r][0] += value * w0;
      a[r][1] += value * w1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    *reinterpret_cast<Vector*>(sums + r * 2 * width) = a[r][0];
    *reinterpret_cast<Vector*>(sums + r * 2 * width + width) = a[r][1];
  }
}

// Where panels of wide columns begin, and how far apart their tokens are.
template <typename S>
struct Panels {
  const S* first;
  std::int64_t panel_step, token_step;
};

// Numbers that are used for one register block only are read where they are, but for a last panel
// that is not full; others are packed.
template <typename S>
ACTIVEDPO_INLINE Panels<S> panels_of(S* packed, const S* wide, std::int64_t stride,
                                     std::int64_t columns, std::int64_t tokens,
                                     std::int64_t panel, bool once) {
  if (once && columns % panel == 0) return {wide, panel, stride};
  pack(packed, wide, stride, columns, tokens, panel);
  return {packed, panel * tokens, panel};
}
ACTIVEDPO_INLINE Panels<float> panels_of(float* packed, const BFloat16* wide, std::int64_t stride,
                                         std::int64_t columns, std::int64_t tokens,
                                         std::int64_t panel, bool) {
  pack(packed, wide, stride, columns, tokens, panel);
  return {packed, panel * tokens, panel};
}

// block[r * row_step + c * column_step] += sum over t of narrow[t, r] wide[t, c].
template <typename T, typename S>
ACTIVEDPO_INLINE void add_packed(S* block, std::int64_t row_step, std::int64_t column_step,
                                 const T* narrow, std::int64_t narrow_stride, std::int64_t rows,
                                 const T* wide, std::int64_t wide_stride, std::int64_t columns,
                                 std::int64_t tokens, S* scratch) {
  constexpr std::int64_t kColumns = 2 * 64 / sizeof(S);
  alignas(64) S sums[kRows * kColumns];
  S* packed_narrow = scratch + kProductTokens * kProductWide;
  for (std::int64_t t = 0; t < tokens; t += kProductTokens) {
    const std::int64_t count = std::min<std::int64_t>(kProductTokens, tokens - t);
    pack(packed_narrow, narrow + t * narrow_stride, narrow_stride, rows, count, kRows);
    const Panels<S> panels = panels_of(scratch, wide + t * wide_stride, wide_stride, columns,
                                       count, kColumns, rows <= kRows);
    for (std::int64_t c = 0; c < columns; c += kColumns) {
      const S* panel = panels.first + c / kColumns * panels.panel_step;
      for (std::int64_t r = 0; r < rows; r += kRows) {
        multiply(sums, packed_narrow + r * count, panel, panels.token_step, count);
        const std::int64_t row_end = std::min<std::int64_t>(kRows, rows - r);
        const std::int64_t column_end = std::min(kColumns, columns - c);
        S* corner = block + r * row_step + c * column_step;
        for (std::int64_t i = 0; i < row_end; ++i) {
          for (std::int64_t j = 0; j < column_end; ++j) {
            corner[i * row_step + j * column_step] += sums[i * kColumns + j];
          }
        }
      }
    }
  }
}

}  // namespace

// The vectors of a register block lie along the longer side.
#define ACTIVEDPO_ADD_PRODUCT(T)                                                                  \
  ACTIVEDPO_CLONES                                                                                \
  void add_product_of(Sum<T>::Type* block, const T* left, std::int64_t left_stride,               \
                      std::int64_t height, const T* right, std::int64_t right_stride,             \
                      std::int64_t width, std::int64_t tokens, Sum<T>::Type* scratch) {           \
    if (width >= height) {                                                                        \
      add_packed(block, width, std::int64_t{1}, left, left_stride, height, right, right_stride,   \
                 width, tokens, scratch);                                                         \
    } else {                                                                                      \
      add_packed(block, std::int64_t{1}, width, right, right_stride, width, left, left_stride,    \
                 height, tokens, scratch);                                                        \
    }                                                                                             \
  }                                                                                               \
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
