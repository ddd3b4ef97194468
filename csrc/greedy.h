// Greedy log-det selection in one go: all picks of a batch by one grid of threads, which on a GPU
// stays resident (cuda/greedy.cu). This file has what goes in and out, and the room to work in;
// greedy_select.h has the loop over picks, greedy_lazy.h and greedy_root.h what a pick is made of.
// The policy and its bounds of errors are those of selection/scores.py and advance.cpp.
//
// All of it is written for a `Grid`, of which cuda/greedy.cu has the GPU's and greedy_host.cpp one
// of CPU threads, for the tests:
//   kLanes, kGroups     lanes of a group (a warp), groups of a block
//   lane(), group()     which one this is; block(), blocks() likewise, of the grid
//   barrier()           for the whole grid; what was written before it can be read after it
//   block_barrier()     the same for a block
//   sum(x), max(x)      over a group's lanes; all of them get it
//   from(x, lane)       one lane's x, for all of its group
//   add(counter, n)     counter += n, atomically; returns what it was
//   last_of(n, counter) whether this call is the n-th; what callers before wrote can be read then
//   product(x, y)       x * y, rounded: not fused with what is done to it
//   widen(x)            a stored number in the precision that is summed in
//   shared()            a GreedyShared of the block's own
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "host_device.h"
#include "numbers.h"

namespace activedpo {

// V^-1 = X^T X for X = F B. B is `base` or root_norm I, and F = I - D^T Y (the WY form of C. Bischof
// and C. Van Loan, "The WY representation for products of Householder matrices", 1987) with D in
// `directions` and Y in `pulled`. A pick of phi with r = X phi makes F into (I - weight r r^T) F,
// which appends r to D and weight F^T r to Y.
struct GreedyProblem {
  // The candidates: see PairFeatures.
  std::int64_t n_candidates;
  std::int64_t dim;           // k
  const void* rows;           // [R, row_stride]
  std::int64_t row_stride;    // in numbers
  const std::int64_t* pairs;  // [n_candidates, 2]
  const double* row_divisor;  // [R]
  const double* pair_divisor;  // [n_candidates], as all that follows
  const double* reach;
  const double* size;
  double* score;  // in: the first scores, right to within `doubt`
  double* doubt;

  // What may be picked: what is left, of prompts and groups that have room. It is changed.
  std::uint8_t* left;
  const double* inverse_cost;   // or null: values are score * inverse_cost
  const std::int32_t* prompt;   // or null, and so `group`, which may be -1: of no group
  std::int32_t* prompt_room;
  const std::int32_t* group;
  std::int32_t* group_room;
  double min_score;
  const std::int64_t* forced;  // [n_forced], the first picks
  std::int64_t n_forced;

  // V^-1 before the picks.
  double root_norm;     // sqrt(kappa / lam), the norm of X at most
  double root_error;    // of |X phi|, over the feature's size
  const double* base;   // [dim, dim], or null
  double* directions;   // [n_before + n_picks, dim], with n_before rows filled in
  double* pulled;       // likewise
  std::int64_t n_before;
  bool rounds;          // whether first scores round more than fresh ones

  // Out: `count` picks, n_picks of them if there are so many.
  std::int64_t n_picks;
  std::int64_t* picks;
  double* scores;
  std::int64_t* touched;  // rows looked at for each pick, repeatedly or not
  std::int64_t* count;
};

constexpr int kGreedyMaxBlocks = 1024;
constexpr int kGreedySlots = 8;      // contenders that are scored afresh at a time
constexpr int kGreedyColumns = 64;   // numbers of a vector that a block forms at a time
constexpr int kGreedyPiece = 1024;   // numbers of a vector that a group multiplies at a time
constexpr int kGreedyTile = 16;      // directions that a candidate is multiplied with at a time
constexpr int kGreedyTiles = 8;      // and so many times before its bound is looked at again
constexpr int kGreedyRun = 32;       // products that a lane sums in the storage's precision

// Error of the product of a feature with a direction, over the feature's reach and the direction's
// norm: kGreedyRun roundings, and a few of the feature's and the direction's numbers.
template <typename S>
constexpr double kGreedyDotError =
    (kGreedyRun + 8) * static_cast<double>(std::numeric_limits<S>::epsilon()) / 2;

constexpr double kGreedyInfinity = std::numeric_limits<double>::infinity();

// A phase is a function of its own, with registers of its own and one copy of its instructions.
// Arrays whose loops are unrolled stay in registers.
#ifdef __CUDACC__
#define ACTIVEDPO_PHASE __host__ __device__ __noinline__
#define ACTIVEDPO_UNROLL _Pragma("unroll")
#else
#define ACTIVEDPO_PHASE
#define ACTIVEDPO_UNROLL
#endif

struct GreedyListed {
  std::int32_t candidate;
  std::int32_t version;
};

// What the threads tell each other: the largest of each.
struct GreedyBounds {
  double best;    // lower bound of the values that are up to date
  double top;     // upper bound of the others; -1 where there are none
  double oldest;  // minus the least version of those listed
};

template <int Groups>
struct GreedyShared {
  double columns[Groups][kGreedyColumns];
  GreedyBounds bounds[Groups];
  double maximum[Groups];
  double score[kGreedySlots];
  double doubt[kGreedySlots];
};

// Views of one piece of memory that need not be cleared.
template <typename S>
struct GreedyRoom {
  std::int64_t capacity;  // of D and Y
  std::int64_t pieces;    // of a vector: kGreedyPiece numbers, or what is left
  std::int64_t chunks;    // of a vector: kGreedyColumns numbers, or what is left

  GreedyBounds* bounds;   // [2, kGreedyMaxBlocks]
  std::int32_t* counters;  // [3], lengths of lists
  double* inherited;       // [n_candidates]; see selection/scores.py
  std::int32_t* version;   // [n_candidates], how many directions a score has seen
  GreedyListed* list;      // [n_candidates]
  double* parts;           // [n_candidates, kGreedyTiles, 3], what tiles do to a listed score
  std::int32_t* arrived;   // [n_candidates], tiles of it that are done
  S* unit;                 // [n_picks + kGreedyTile, dim], directions w over `norm`
  double* norm;            // [n_picks], a bound of |w|
  double* error;           // [n_picks], bound of the error of phi . w for a pair with reach 1
  double* turn;            // [n_picks]; see selection/scores.py
  double* residual;        // [kGreedySlots, dim], r of contenders
  double* whitened;        // [kGreedySlots, dim], B phi of contenders; with `base` only
  double* solved;          // [dim], F^T r of the pick; with `base` only
  double* dots;            // [kGreedySlots, capacity, pieces]
  double* lengths;         // [kGreedySlots, chunks], parts of |r|^2
  double* w_lengths;       // [chunks], parts of |w|^2

  // Lays the arrays out from `memory` on; returns how many bytes that takes.
  std::size_t lay_out(const GreedyProblem& p, char* memory) {
    capacity = p.n_before + p.n_picks;
    pieces = (p.dim + kGreedyPiece - 1) / kGreedyPiece;
    chunks = (p.dim + kGreedyColumns - 1) / kGreedyColumns;
    const std::int64_t with_base = p.base == nullptr ? 0 : p.dim;
    std::size_t used = 0;
    const auto take = [&](auto*& array, std::int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += (static_cast<std::size_t>(count) * sizeof *array + 255) / 256 * 256;
    };
    take(bounds, 2 * kGreedyMaxBlocks);
    take(counters, 3);
    take(inherited, p.n_candidates);
    take(version, p.n_candidates);
    take(list, p.n_candidates);
    take(parts, p.n_candidates * kGreedyTiles * 3);
    take(arrived, p.n_candidates);
    take(unit, (p.n_picks + kGreedyTile) * p.dim);
    take(norm, p.n_picks);
    take(error, p.n_picks);
    take(turn, p.n_picks);
    take(residual, kGreedySlots * p.dim);
    take(whitened, kGreedySlots * with_base);
    take(solved, with_base);
    take(dots, kGreedySlots * capacity * pieces);
    take(lengths, kGreedySlots * chunks);
    take(w_lengths, chunks);
    return used;
  }
};

}  // namespace activedpo
