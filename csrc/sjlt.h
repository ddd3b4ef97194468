// The sparse Johnson-Lindenstrauss transform with one non-zero a column (CountSketch), its positions
// in runs that land on neighboring buckets. activedpo_fast/ops/reference.py has the definition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "scratch.h"

namespace activedpo {

constexpr std::int64_t kSjltRun = 16;             // the longest run
constexpr std::int64_t kSjltPositions = 1 << 20;  // whose bits are worth keeping at a time

// Buckets and signs of a range of positions, drawn once for all rows.
class SjltHash {
 public:
  SjltHash(std::int64_t k, std::uint32_t stream, std::uint64_t key);

  // Makes ready what `add`, `bucket` and `negative` need for positions begin .. end-1.
  void draw(std::int64_t begin, std::int64_t end, int num_threads);

  // sums[bucket(p)] += sign(p) * x[p - position] for `count` positions from `position`.
  template <typename A, typename T>
  void add(A* sums, const T* x, std::int64_t position, std::int64_t count) const;

  std::int64_t bucket(std::int64_t position) const {
    const std::int64_t p = position - first_;
    return buckets_[static_cast<std::size_t>(p / run_)] ^ (p % run_);
  }
  // 1 where the sign is negative.
  std::uint32_t negative(std::int64_t position) const {
    const std::int64_t p = position - first_;
    return signs_[static_cast<std::size_t>(p / 32)] >> (p % 32) & 1u;
  }

 private:
  std::int64_t k_, run_;
  std::uint32_t stream_;
  std::uint64_t key_;
  std::int64_t first_ = 0;
  std::vector<std::uint32_t> buckets_;  // one a run: that of its first position
  std::vector<std::uint32_t> signs_;    // a bit a position
};

// Rows fewer than this are cut into parts, so that threads have enough to do. A part has sums of its
// own, which cost k additions, so that it is to be larger than that.
constexpr std::int64_t kFewRows = 8;
inline std::int64_t sjlt_parts(std::int64_t rows, std::int64_t length, std::int64_t k) {
  return rows >= kFewRows ? 1 : std::clamp<std::int64_t>(length / (4 * k), 1, 8);
}

// add(row, part, target) for every row and part of it, each by one thread. The parts of a row are
// added up in order, so that the result does not depend on the number of threads. row_of(r) is where
// row r's k sums are; `scratch` has room for the k sums of rows * parts where there are several parts.
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
// Rows are contiguous, `*_stride` numbers apart. bucket and sign depend on (key, p, k) alone, and the
// result does not depend on num_threads.
template <typename T>
void sjlt(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
          std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads);

}  // namespace activedpo
