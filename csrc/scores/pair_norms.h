// Norms of rows and of the differences of pairs of them, in float64.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace activedpo {

// row_norm[r] = |row r| for every row that is in a pair (others are unchanged), and
// pair_norm[i] = |a / divisor(a) - b / divisor(b)| for pair i = (a, b), where a row's divisor is its
// norm (1 if that is zero) with `by_row` and 1 without. Sums do not depend on threads or neighbors.
// Returns -1, or the number of a row that could not be read.
template <typename T>
std::int64_t pair_norms(double* row_norm, double* pair_norm, const RowSource& rows,
                        std::int64_t k, const std::int64_t* pairs, std::int64_t n_pairs,
                        bool by_row, int num_threads);

}  // namespace activedpo
