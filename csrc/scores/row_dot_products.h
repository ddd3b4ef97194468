// Inner products of a few rows with many directions: most of a selection's arithmetic.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace activedpo {

constexpr int kDotRows = 16;     // rows multiplied at a time
constexpr int kDotBlock = 512;   // numbers summed in Sum<T>'s precision
constexpr int kDotAlign = 16;    // directions are zero-padded to a multiple of this

constexpr std::int64_t kDotScratch = std::int64_t{kDotRows} * kDotBlock;

// out[r * n_w + s] = rows[r] . w[s] for r < n_rows <= kDotRows and s < n_w. Each kDotBlock products
// are summed in Sum<T>, these sums in float64. The error of a product is at most
// (kDotBlock / lanes + 6) u |row| |w_s| with u = 2^-24 and 16 lanes (2^-53 and 8 for double),
// including the rounding of products and of w to Sum<T>. It is independent of other rows and w's.
template <typename T>
void row_dot_products(double* out, const T* const* rows, std::int64_t n_rows, std::int64_t k,
                      const typename Sum<T>::Type* w, std::int64_t w_stride, std::int64_t n_w,
                      typename Sum<T>::Type* scratch);

}  // namespace activedpo
