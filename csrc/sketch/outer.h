// Sketches of gradients that are sums of outer products over tokens. A whole gradient never exists:
// each tile of it is formed, added to the sketch, and overwritten by the next.
#pragma once

#include <cstdint>

#include "sketch/product.h"

namespace activedpo {

// Tokens begin .. end-1 add to a row. Same layout as in ops/sketch.py: int64 [S, 3].
struct Segment {
  std::int64_t begin, end, row;
};

// out[row] += S vec(sum of left_t right_tT) for every segment; left is [N, height], right is
// [N, width], out has k columns. sides: the sizes that "kronecker" projects height and width to.
// first_run and run_stride are those of reference.kronecker_place, both below k / gcd(k, 16). A
// row does not depend on num_threads, and depends on other rows' segments only in the order of
// float64 additions: if there are few rows, they are split into parts.
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
  std::int64_t first_run, run_stride;  // where "kronecker" places the runs of a matrix
  int num_threads;

  void sjlt() const;
  void rademacher() const;
  void kronecker() const;
};

}  // namespace activedpo
