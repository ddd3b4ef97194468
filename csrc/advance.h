// Running scores of candidate pairs while directions are learned: exact, and lazy.
#pragma once

#include <cstdint>

#include "rows.h"

namespace activedpo {

// What is known of n pairs of rows. With f = phi . w for a pair's feature phi and a direction w, a
// direction lowers the pair's score by f^2; `version` says how many directions have been applied.
struct Candidates {
  std::int64_t n;
  const std::int64_t* pairs;      // [n, 2] row numbers
  const double* row_divisor;      // [rows]
  const double* pair_divisor;     // [n]
  const double* reach;            // [n], norms of the two parts of phi: errors of f grow with it
  const std::uint8_t* left;       // [n], 0: not to be picked any more
  const double* inverse_cost;     // [n], or null: values are score * inverse_cost
  double* score;                  // [n]
  double* doubt;                  // [n], bound of the score's error
  double* inherited;              // [n], what earlier picks may turn the root of a fresh score by
  std::int32_t* version;          // [n]
};

struct Directions {
  const void* unit;     // [count, stride] of Sum<T>, each direction over `norm`; padded with zeros
  std::int64_t stride;  // numbers; k rounded up to kDotAlign, or more
  const double* norm;   // [count]
  const double* error;  // [count], bound of the error of f for a pair with reach 1
  const double* turn;   // [count], of what a score loses, over its root: see selection/scores.py
  std::int64_t count;
};

// Workspace that is carried from call to call. It changes how much is done, not what comes out but
// for rounding.
struct Memory {
  // Products of rows with directions [rows, capacity], in Sum<T>, of the first row_version[r] ones,
  // for all the pairs that a row is in; null where there is no room for them.
  void* products;
  std::int64_t capacity;
  std::int32_t* row_version;  // [rows]
  std::int32_t* place;        // [rows], -1 everywhere, before and after a call
  double margin;       // below the largest bound, relative to it: what is looked at first
  std::int64_t block;  // candidates that are brought up to date at a time, to begin with
};

// Brings candidates up to date until every one whose value may be the largest is. Old scores are
// upper bounds, as scores only fall: those that cannot reach the largest lower bound stay as they
// are. Writes the up-to-date candidates whose values may be the largest to `contenders` [n],
// ascending, and returns how many; or -1 - r if row r could not be read. `touched` grows by the
// number of rows that were looked at.
template <typename T>
std::int64_t advance(std::int64_t* contenders, std::int64_t* touched, const RowSource& rows,
                     std::int64_t k, const Candidates& candidates, const Directions& directions,
                     Memory* memory, int num_threads);

}  // namespace activedpo
