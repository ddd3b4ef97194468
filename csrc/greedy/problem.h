// Greedy log-det selection by a grid of threads that makes pick after pick; on a GPU it stays
// resident for many of them (cuda/greedy.cu). This file defines inputs, outputs and workspace; select.h has
// the loop over picks, lazy.h and root.h the parts of a pick. The policy and its error bounds are
// those of running_scores.py and scores/refresh_bounds.cpp.
//
// The code is written for a `Grid`: cuda/greedy.cu has the GPU's, and testing/greedy.cpp has one of
// CPU threads, for the tests:
//   kLanes, kGroups     lanes of a group (a warp), groups of a block
//   lane(), group()     this thread's lane and group; block(), blocks() likewise, in the grid
//   barrier()           for the whole grid; writes before it are visible after it
//   block_barrier()     the same for a block
//   sum(x), max(x)      over a group's lanes; all of them get the result
//   sums(x, own)        of n numbers a lane, each over the lanes: a lane gets n / kLanes of the sums,
//                       in order of lanes
//   from(x, lane)       one lane's x, for its whole group
//   add(counter, n)     counter += n, atomically; returns the old value
//   four(p)             four numbers at an address aligned for them
//   product(x, y)       x * y, rounded: not fused with later operations
//   widen(x)            a stored number in the precision used for sums
//   shared()            the block's GreedyShared
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/four.h"
#include "common/host_device.h"
#include "common/numbers.h"

namespace activedpo {

// V^-1 = X^T X for X = F B. B is `base` or root_norm I, and F = I - D^T Y (the WY form of C. Bischof
// and C. Van Loan, "The WY representation for products of Householder matrices", 1987) with D in
// `directions` and Y in `pulled`. A pick of phi with r = X phi replaces F by (I - weight r r^T) F,
// which appends r to D and weight F^T r to Y.
struct GreedyProblem {
  // The candidates: see PairFeatures.
  std::int64_t n_candidates;
  std::int64_t dim;           // k
  const void* rows;           // [R, row_stride]
  std::int64_t row_stride;    // in numbers
  const std::int64_t* pairs;  // [n_candidates, 2]
  const double* row_divisor;  // [R]
  const double* pair_divisor;  // [n_candidates], like the arrays below
  const double* reach;
  const double* size;
  double* score;  // in: the first scores, with errors of at most `error_bound`
  double* error_bound;

  // Candidates that may be picked: those left, of prompts and groups with room. Updated in place.
  std::uint8_t* left;
  const double* inverse_cost;   // or null: values are score * inverse_cost
  const std::int32_t* prompt;   // or null, like `group`, whose entries may be -1: no group
  std::int32_t* prompt_room;
  const std::int32_t* group;
  std::int32_t* group_room;
  double min_score;
  const std::int64_t* forced;  // [n_forced], the first picks
  std::int64_t n_forced;

  // V^-1 before the picks.
  double root_norm;     // sqrt(kappa / lam), a bound on the norm of X
  double root_error;    // error of |X phi|, over the feature's size
  const double* base;   // [dim, dim], or null
  double* directions;   // [n_before + n_picks, dim], with n_before rows filled in
  double* pulled;       // likewise
  std::int64_t n_before;
  bool rounds;          // whether first scores have larger rounding errors than fresh ones

  // Out: `count` picks, n_picks if enough candidates can be picked.
  std::int64_t n_picks;
  std::int64_t* picks;
  double* scores;
  std::int64_t* touched;  // rows read for each pick, counting repeats
  std::int64_t* count;
};

constexpr int kGreedyMaxBlocks = 1024;
constexpr int kGreedySlots = 8;      // contenders rescored at a time
constexpr int kGreedyColumns = 32;   // numbers of a vector that a block forms at a time
constexpr int kGreedyPiece = 1024;   // numbers of a vector that a group multiplies at a time
constexpr int kGreedyTile = 16;      // directions that a group multiplies candidates with at a time
constexpr int kGreedyTiles = 8;      // tiles before a candidate's bound is checked again
constexpr int kGreedyWave = 1024;    // candidates that are advanced between two barriers
constexpr int kGreedyRun = 32;       // products that a lane sums in S's precision

// Candidates that a group multiplies at a time: their sums and numbers fit into registers.
template <typename S>
constexpr int kGreedyTogether = sizeof(S) > 4 ? 2 : 4;

// Error of the product of a feature with a direction, over the feature's reach and the direction's
// norm: kGreedyRun roundings, plus a few of the feature's and the direction's numbers.
template <typename S>
constexpr double kGreedyDotError =
    (kGreedyRun + 8) * static_cast<double>(std::numeric_limits<S>::epsilon()) / 2;

constexpr double kGreedyInfinity = std::numeric_limits<double>::infinity();

// A phase is a separate function, with its own registers and one copy of its instructions.
#ifdef __CUDACC__
#define ACTIVEDPO_PHASE __host__ __device__ __noinline__
#else
#define ACTIVEDPO_PHASE
#endif

struct GreedyListed {
  std::int32_t candidate;  // -1: an empty place
  std::int32_t version;
  std::int32_t rank;  // among those listed whose versions are in the same tile
};

// Bounds that threads exchange; they keep the largest of each.
struct GreedyBounds {
  double best;    // lower bound of the values that are up to date
  double top;     // upper bound of the others; -1 if there are none
  double oldest;  // minus the smallest version of those listed
};

template <int Groups>
struct GreedyShared {
  double columns[Groups][kGreedyColumns];
  GreedyBounds bounds[Groups];
  GreedyBounds found[Groups];
  double maximum[Groups];
  double score[kGreedySlots];
  double error_bound[kGreedySlots];
};

// Views of one block of memory, which need not be cleared. Later launches go on with what is there.
template <typename S>
struct GreedyRoom {
  std::int64_t capacity;  // of D and Y
  std::int64_t pieces;    // per vector: kGreedyPiece numbers each, or the rest
  std::int64_t chunks;    // per vector: kGreedyColumns numbers each, or the rest
  std::int64_t tiles;     // that a version can be in
  std::int64_t width;     // of a row of `unit` and `features`; see `whole`
  std::int64_t wave;      // candidates advanced between two barriers

  GreedyBounds* bounds;   // [2, kGreedyMaxBlocks]
  std::int32_t* counters;  // [3], lengths of lists
  double* margin;          // [1]; see GreedyLazy
  double* inherited;       // [n_candidates]; see running_scores.py
  std::int32_t* version;   // [n_candidates], number of directions a score has seen
  std::int32_t* in_tile;   // [3, tiles], how many are listed by the tile of their version
  GreedyListed* list;      // [n_candidates]
  GreedyListed* order;     // a list by tiles; every tile's part is filled up to kGreedyTogether
  S* features;             // [wave, width], scaled, of candidates in `order`
  double* products;        // [wave / together, up to kGreedyTiles, pieces, together, kGreedyTile]
  S* unit;                 // [n_picks + kGreedyTile, width], directions w divided by `norm`
  double* norm;            // [n_picks], a bound on |w|
  double* error;           // [n_picks], bound on the error of phi . w for a pair with reach 1
  double* turn;            // [n_picks]; see running_scores.py
  double* residual;        // [kGreedySlots, dim], r of contenders
  double* whitened;        // [kGreedySlots, dim], B phi of contenders; only with `base`
  double* solved;          // [dim], F^T r of the pick; only with `base`
  double* dots;            // [kGreedySlots, capacity, pieces]
  double* lengths;         // [kGreedySlots, chunks], parts of |r|^2
  double* w_lengths;       // [chunks], parts of |w|^2

  // dim, rounded up to whole fours: the numbers in between are zero in `unit` and `features`.
  ACTIVEDPO_HOST_DEVICE static std::int64_t whole(std::int64_t dim) { return (dim + 3) / 4 * 4; }

  // Lays out the arrays from `memory` on; returns the number of bytes used.
  std::size_t lay_out(const GreedyProblem& p, char* memory) {
    capacity = p.n_before + p.n_picks;
    pieces = (p.dim + kGreedyPiece - 1) / kGreedyPiece;
    chunks = (p.dim + kGreedyColumns - 1) / kGreedyColumns;
    tiles = p.n_picks / kGreedyTile + 1;
    // One cache line more: rows a power of two apart would share few of the cache's sets.
    width = whole(p.dim) + 128 / static_cast<std::int64_t>(sizeof(S));
    const std::int64_t together = kGreedyTogether<S>;
    const std::int64_t places = (p.n_candidates + (together - 1) * tiles + together - 1) /
                                together * together;
    wave = places < kGreedyWave ? places : kGreedyWave;
    const std::int64_t at_once = tiles < kGreedyTiles ? tiles : kGreedyTiles;
    const std::int64_t with_base = p.base == nullptr ? 0 : p.dim;
    std::size_t used = 0;
    const auto take = [&](auto*& array, std::int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += (static_cast<std::size_t>(count) * sizeof *array + 255) / 256 * 256;
    };
    take(bounds, 2 * kGreedyMaxBlocks);
    take(counters, 3);
    take(margin, 1);
    take(inherited, p.n_candidates);
    take(version, p.n_candidates);
    take(in_tile, 3 * tiles);
    take(list, p.n_candidates);
    take(order, places);
    take(features, wave * width);
    take(products, wave * at_once * pieces * kGreedyTile);
    take(unit, (p.n_picks + kGreedyTile) * width);
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
