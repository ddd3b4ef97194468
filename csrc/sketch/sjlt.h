// The sparse Johnson-Lindenstrauss transform with one non-zero per column (CountSketch). Positions
// come in runs with neighboring buckets. activedpo_fast/ops/reference.py has the definition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/scratch.h"

namespace activedpo {

constexpr std::int64_t kSjltRun = 16;             // the longest run
constexpr std::int64_t kSjltPositions = 1 << 20;  // positions whose bits are kept at a time

// Buckets and signs of a range of positions, drawn once for all rows.
class SjltHash {
 public:
  SjltHash(std::int64_t k, std::uint32_t stream, std::uint64_t key);

  // Draws the bits that `add`, `bucket` and `negative` need for positions begin .. end-1.
  void draw(std::int64_t begin, std::int64_t end, int num_threads);

  // sums[bucket(p)] += sign(p) * x[p - position] for `count` positions from `position`.
  template <typename A, typename T>
  void add(A* sums, const T* x, std::int64_t position, std::int64_t count) const;

  std::int64_t bucket(std::int64_t position) const {
    const std::int64_t p = position - first_;
    return buckets_[static_cast<std::size_t>(p / run_)] ^ (p % run_);
  }
  // 1 if the sign is negative.
  std::uint32_t negative(std::int64_t position) const {
    const std::int64_t p = position - first_;
    return signs_[static_cast<std::size_t>(p / 32)] >> (p % 32) & 1u;
  }

 private:
  std::int64_t k_, run_;
  std::uint32_t stream_;
  std::uint64_t key_;
  std::int64_t first_ = 0;
  std::vector<std::uint32_t> buckets_;  // one per run: that of its first position
  std::vector<std::uint32_t> signs_;    // one bit per position
};

// With fewer rows than this, rows are split into parts, so that all threads have work. Each part
// has separate sums, which cost k additions, so it must be larger than that.
constexpr std::int64_t kFewRows = 8;
inline std::int64_t sjlt_parts(std::int64_t rows, std::int64_t length, std::int64_t k) {
  return rows >= kFewRows ? 1 : std::clamp<std::int64_t>(length / (4 * k), 1, 8);
}

// Calls add(row, part, target) for every row and part, each by one thread. The parts of a row are
// added in order, so the result does not depend on the number of threads. row_of(r) is the address
// of row r's k sums; if there are several parts, `scratch` has room for rows * parts times k sums.
template <typename RowOf, typename Add>
void sjlt_sum_parts(std::int64_t rows, std::int64_t parts, std::int64_t k,
                    Scratch<double>& scratch, int num_threads, RowOf row_of, Add add) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (std::int64_t item = 0; item < rows * parts; ++item) {
    const std::int64_t row = item / parts;
    double* target = parts > 1 ? scratch.of(item) : row_of(row);
    if (parts > 1) std::fill(target, target + k, 0.0);
    add(row, item % parts, target);
  }
  if (parts == 1) return;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t row = 0; row < rows; ++row) {
    double* target = row_of(row);
    for (std::int64_t part = 0; part < parts; ++part) {
      const double* source = scratch.of(row * parts + part);
      for (std::int64_t j = 0; j < k; ++j) target[j] += source[j];
    }
  }
}

// out[i, bucket(p)] += sign(p) * x[i, p] for n rows of `length` numbers into k buckets.
// Rows are contiguous, `*_stride` numbers apart. bucket and sign depend only on (key, p, k), and
// the result does not depend on num_threads.
template <typename T>
void sjlt(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
          std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads);

}  // namespace activedpo
