// The dense projection by a matrix of random signs.
#pragma once

#include <cstdint>

namespace activedpo {

constexpr int kRademacherColumns = 128;  // the columns of one Philox block

// sums[i * 128 + c] += sum_p sign(first + p, 128 * column_block + c) * x[i, p] for n rows of `length`
// numbers and c < 128.
template <typename T>
void rademacher_columns(double* sums, const T* x, std::int64_t x_stride, std::int64_t n,
                        std::int64_t length, std::uint64_t first, std::uint32_t column_block,
                        std::uint64_t key);

// out[i, j] += sum_p sign(p, j) * x[i, p] / sqrt(k) for n rows of `length` numbers and j < k.
// Rows are contiguous, `*_stride` numbers apart. sign depends only on (key, p, j), and the result
// does not depend on num_threads.
template <typename T>
void rademacher(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
                std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads);

}  // namespace activedpo
