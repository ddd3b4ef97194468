// The sparse Johnson-Lindenstrauss transform with one non-zero a column (CountSketch).
#pragma once

#include <cstdint>
#include <cstring>

namespace activedpo {

// Positions are hashed in groups of so many.
constexpr std::int64_t kSjltGroup = 64;

// codes[p - first] = 2 * bucket(p) + (sign(p) < 0) for `count` positions from `first`, a multiple of
// 4; count is a multiple of kSjltGroup.
void sjlt_codes(std::uint32_t* codes, std::uint64_t first, std::int64_t count, std::uint32_t k,
                std::uint32_t stream, std::uint64_t key);

// sums[bucket] += sign * x for `count` numbers. The sign is put in by its bit: a branch that is
// random would be mispredicted half of the time.
template <typename T>
inline void sjlt_scatter(double* sums, const T* x, const std::uint32_t* codes,
                         std::int64_t count) {
  for (std::int64_t p = 0; p < count; ++p) {
    const std::uint32_t code = codes[p];
    const double value = static_cast<double>(x[p]);
    std::uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits ^= static_cast<std::uint64_t>(code) << 63;
    double signed_value;
    std::memcpy(&signed_value, &bits, sizeof bits);
    sums[code >> 1] += signed_value;
  }
}

// out[i, bucket(p)] += sign(p) * x[i, p] for n rows of `length` numbers into k buckets.
// Rows are contiguous, `*_stride` numbers apart. bucket and sign depend on (key, p, k) alone, and the
// result does not depend on num_threads.
template <typename T>
void sjlt(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
          std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads);

}  // namespace activedpo
