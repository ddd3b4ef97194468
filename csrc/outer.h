// Sketches of gradients that are sums of outer products over tokens. A gradient is never there as a
// whole: a tile of it is formed, goes into the sketch, and makes room for the next.
#pragma once

#include <cstdint>

#include "product.h"

namespace activedpo {

// The tokens begin .. end-1 add to a row. As ops.py lays them out: int64 [S, 3].
struct Segment {
  std::int64_t begin, end, row;
};

// out[row] += S vec(sum of left_t right_tT) for every segment; left is [N, height], right is
// [N, width], out has k columns. sides: what "kronecker" projects height and width to; reference.kronecker_place
// has the first run and the stride, both below k / gcd(k, 16). A row does not
// depend on num_threads, and on segments of other rows only in the order of float64 additions: few
// rows are cut into parts.
template <typename T>
struct OuterSketch {
  double* out;
  std::int64_t out_stride;
  const T* left;
  std::int64_t left_stride;
  const T* right;
  std::int64_t right_stride;
  const Segment* segments;
  std::int64_t n_segments;
  std::int64_t height, width, k;
  std::uint64_t key;
  std::int64_t sides[2];
  std::int64_t first_run, run_stride;  // where "kronecker" lays the runs of a matrix
  int num_threads;

  void sjlt() const;
  void rademacher() const;
  void kronecker() const;
};

}  // namespace activedpo
