// The sparse Johnson-Lindenstrauss transform with one non-zero a column (CountSketch).
#pragma once

#include <cstdint>

namespace activedpo {

// out[i, bucket(p)] += sign(p) * x[i, p] for n rows of `length` numbers into k buckets.
// Rows are contiguous, `*_stride` numbers apart. bucket and sign depend on (key, p, k) alone, and the
// result does not depend on num_threads.
template <typename T>
void sjlt(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
          std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads);

}  // namespace activedpo
