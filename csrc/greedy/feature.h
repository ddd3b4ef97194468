// A candidate's feature, formed number by number from the two rows of its pair.
#pragma once

#include <cstdint>

#include "greedy/problem.h"

namespace activedpo {

template <typename T, class Grid>
class GreedyFeature {
 public:
  using S = typename Sum<T>::Type;

  ACTIVEDPO_HOST_DEVICE GreedyFeature(const GreedyProblem& p, std::int64_t candidate) {
    const std::int64_t a = p.pairs[2 * candidate], b = p.pairs[2 * candidate + 1];
    first_ = static_cast<const T*>(p.rows) + a * p.row_stride;
    second_ = static_cast<const T*>(p.rows) + b * p.row_stride;
    over_first_ = 1 / p.row_divisor[a];
    over_second_ = 1 / p.row_divisor[b];
    over_ = 1 / p.pair_divisor[candidate];
  }

  // phi[j]. Nothing is fused, so the difference of two equal rows is zero.
  ACTIVEDPO_HOST_DEVICE double operator[](std::int64_t j) const {
    const double first = Grid::product(Grid::widen(first_[j]), over_first_);
    const double second = Grid::product(Grid::widen(second_[j]), over_second_);
    return (first - second) * over_;
  }

  // phi / scale in the precision that products are summed in. For scale = reach, the norms of its
  // parts add up to 1, whatever the rows' norms.
  class Scaled {
   public:
    ACTIVEDPO_HOST_DEVICE Scaled(const GreedyFeature& feature, double scale)
        : first_(feature.first_), second_(feature.second_),
          over_first_(static_cast<S>(feature.over_first_ * feature.over_ / scale)),
          over_second_(static_cast<S>(feature.over_second_ * feature.over_ / scale)) {}
    // n times four numbers, from j, j + step, ... on; numbers from `dim` on are zero. Everything is
    // loaded before it is used, so that the loads wait for memory together.
    template <int n>
    ACTIVEDPO_HOST_DEVICE void load(Four<S> (&to)[n], std::int64_t j, std::int64_t step,
                                    std::int64_t dim) const {
      Four<T> first[n], second[n];
      read_fours<Grid>(first, first_, j, step, dim);
      read_fours<Grid>(second, second_, j, step, dim);
      ACTIVEDPO_UNROLL
      for (int a = 0; a < n; ++a) {
        ACTIVEDPO_UNROLL
        for (int q = 0; q < 4; ++q) {
          to[a].at[q] = Grid::widen(first[a].at[q]) * over_first_ -
                        Grid::widen(second[a].at[q]) * over_second_;
        }
      }
    }

   private:
    const T* first_;
    const T* second_;
    S over_first_, over_second_;
  };

 private:
  const T* first_;
  const T* second_;
  double over_first_, over_second_, over_;
};

}  // namespace activedpo
