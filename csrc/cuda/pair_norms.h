// Norms of rows and of the differences of pairs of them, for rows in a GPU's memory: what one lane
// of a warp sums. pair_norms.cu runs it on a GPU, testing/pair_norms.cpp on the CPU for the tests.
// scores/pair_norms.h is the CPU's own.
#pragma once

#include <cstdint>

#include "common/four.h"
#include "common/host_device.h"

namespace activedpo {

struct PairNorms {
  const void* rows;
  std::int64_t row_stride;  // in numbers
  std::int64_t k;
  const std::int64_t* pairs;  // [n_pairs, 2]
  std::int64_t n_pairs;
  bool by_row;
  double* row_norm;     // of every row that is in a pair; the others are unchanged
  double* pair_norm;  // [n_pairs]
};

// `Numbers` has four(p), widen(x) and product(x, y): see greedy/problem.h.
template <typename T, class Numbers>
class LaneNorms {
 public:
  static constexpr int kLanes = 32;

  ACTIVEDPO_HOST_DEVICE LaneNorms(const PairNorms& given, int lane)
      : given_(given), lane_(lane) {}

  // The lane's part of |row|^2.
  ACTIVEDPO_HOST_DEVICE double of_row(std::int64_t row) const {
    const T* const x = at(row);
    double sum = 0;
    for (std::int64_t j = 4 * lane_; j < given_.k; j += kAhead * kStep) {
      Four<T> numbers[kAhead];
      read_fours<Numbers>(numbers, x, j, kStep, given_.k);
      ACTIVEDPO_UNROLL
      for (int i = 0; i < 4 * kAhead; ++i) {
        const double value = Numbers::widen(numbers[i / 4].at[i % 4]);
        sum += value * value;
      }
    }
    return sum;
  }

  // Its part of the square of a pair's norm, once the norms are known.
  ACTIVEDPO_HOST_DEVICE double of_pair(std::int64_t pair) const {
    const std::int64_t a = given_.pairs[2 * pair], b = given_.pairs[2 * pair + 1];
    const double over_a = over(a), over_b = over(b);
    const T *const x = at(a), *const y = at(b);
    double sum = 0;
    for (std::int64_t j = 4 * lane_; j < given_.k; j += kAhead * kStep) {
      Four<T> first[kAhead], second[kAhead];
      read_fours<Numbers>(first, x, j, kStep, given_.k);
      read_fours<Numbers>(second, y, j, kStep, given_.k);
      ACTIVEDPO_UNROLL
      for (int i = 0; i < 4 * kAhead; ++i) {
        // Nothing is fused, so the difference of two equal rows is zero.
        const double difference =
            Numbers::product(Numbers::widen(first[i / 4].at[i % 4]), over_a) -
            Numbers::product(Numbers::widen(second[i / 4].at[i % 4]), over_b);
        sum += difference * difference;
      }
    }
    return sum;
  }

 private:
  static constexpr int kAhead = 4;  // loads of a row before their numbers are used
  static constexpr std::int64_t kStep = 4 * kLanes;

  ACTIVEDPO_HOST_DEVICE const T* at(std::int64_t row) const {
    return static_cast<const T*>(given_.rows) + row * given_.row_stride;
  }
  ACTIVEDPO_HOST_DEVICE double over(std::int64_t row) const {
    return given_.by_row && given_.row_norm[row] > 0 ? 1 / given_.row_norm[row] : 1;
  }

  const PairNorms& given_;
  const int lane_;
};

}  // namespace activedpo
