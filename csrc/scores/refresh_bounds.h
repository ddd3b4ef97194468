// Running scores of candidate pairs while directions are added: exact, and lazy.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace activedpo {

// The state of n pairs of rows. With f = phi . w for a pair's feature phi and a direction w, a
// direction lowers the pair's score by f^2; `version` is the number of directions applied so far.
struct Candidates {
  std::int64_t n;
  const std::int64_t* pairs;      // [n, 2] row numbers
  const double* row_divisor;      // [rows]
  const double* pair_divisor;     // [n]
  const double* reach;            // [n], sum of the norms of phi's two parts: scales errors of f
  const std::uint8_t* left;       // [n], 0: may no longer be picked
  const double* inverse_cost;     // [n], or null: values are score * inverse_cost
  double* score;                  // [n]
  double* error_bound;                  // [n], bound on the score's error
  double* inherited;              // [n], error of a fresh score's root due to earlier picks
  std::int32_t* version;          // [n]
};

struct Directions {
  const void* unit;     // [count, stride] of Sum<T>, directions divided by `norm`, zero-padded
  std::int64_t stride;  // numbers; k rounded up to kDotAlign, or more
  const double* norm;   // [count]
  const double* error;  // [count], bound on the error of f for a pair with reach 1
  const double* turn;   // [count], scales the error of a score's loss: see running_scores.py
  std::int64_t count;
};

// Workspace that is kept from call to call. It affects the amount of work, but not the result,
// except for rounding.
struct Memory {
  // Products of rows with directions [rows, capacity], in Sum<T>, for the first row_version[r]
  // directions; shared by all pairs of a row. Null if there is no room for them.
  void* products;
  std::int64_t capacity;
  std::int32_t* row_version;  // [rows]
  std::int32_t* place;        // [rows], -1 everywhere, before and after a call
  double margin;       // bounds within this of the largest, relatively, are considered first
  std::int64_t block;  // initial number of candidates brought up to date at a time
};

// Brings candidates up to date until every one whose value may be the largest is up to date. Scores
// only fall, so old scores are upper bounds: those that cannot reach the largest lower bound stay
// unchanged. Writes the up-to-date candidates whose values may be the largest to `contenders` [n],
// ascending, and returns their number, or -1 - r if row r could not be read. Adds the number of
// rows read to `touched`.
template <typename T>
std::int64_t refresh_bounds(std::int64_t* contenders, std::int64_t* touched,
                            const RowSource& rows, std::int64_t k, const Candidates& candidates,
                            const Directions& directions, Memory* memory, int num_threads);

}  // namespace activedpo
