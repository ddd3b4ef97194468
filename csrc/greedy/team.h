// Collective operations of a greedy selection's threads, on a Grid (see problem.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "greedy/problem.h"

namespace activedpo {

template <class Grid>
class GreedyTeam {
 public:
  ACTIVEDPO_HOST_DEVICE GreedyTeam(Grid& grid, GreedyBounds* bounds) : grid(grid), bounds_(bounds) {}

  ACTIVEDPO_HOST_DEVICE int thread_of_block() const {
    return grid.group() * Grid::kLanes + grid.lane();
  }
  ACTIVEDPO_HOST_DEVICE std::int64_t thread() const {
    return std::int64_t{grid.block()} * kThreads + thread_of_block();
  }
  ACTIVEDPO_HOST_DEVICE std::int64_t threads() const {
    return std::int64_t{grid.blocks()} * kThreads;
  }
  // Groups are numbered consecutively, too.
  ACTIVEDPO_HOST_DEVICE std::int64_t worker() const {
    return std::int64_t{grid.block()} * Grid::kGroups + grid.group();
  }
  ACTIVEDPO_HOST_DEVICE std::int64_t workers() const {
    return std::int64_t{grid.blocks()} * Grid::kGroups;
  }

  // Returns the largest of all threads' bounds to all of them. This is a barrier of the grid.
  ACTIVEDPO_PHASE GreedyBounds exchange(GreedyBounds mine) {
    auto& shared = grid.shared();
    mine = max(mine);
    if (grid.lane() == 0) shared.bounds[grid.group()] = mine;
    grid.block_barrier();
    // Two buffers: a late thread may still be reading the previous one.
    GreedyBounds* const all = bounds_ + turn_ * kGreedyMaxBlocks;
    turn_ ^= 1;
    if (thread_of_block() == 0) {
      for (int g = 1; g < Grid::kGroups; ++g) mine = larger(mine, shared.bounds[g]);
      all[grid.block()] = mine;
    }
    grid.barrier();
    // A block reads them once; the next call's block barrier comes before `found` is written again.
    for (int b = thread_of_block(); b < grid.blocks(); b += kThreads) mine = larger(mine, all[b]);
    mine = max(mine);
    if (grid.lane() == 0) shared.found[grid.group()] = mine;
    grid.block_barrier();
    for (int g = 0; g < Grid::kGroups; ++g) mine = larger(mine, shared.found[g]);
    return mine;
  }

  // Returns the largest value of a block's threads to all of them.
  ACTIVEDPO_HOST_DEVICE double block_max(double mine) {
    auto& shared = grid.shared();
    mine = grid.max(mine);
    if (grid.lane() == 0) shared.maximum[grid.group()] = mine;
    grid.block_barrier();
    for (int g = 0; g < Grid::kGroups; ++g) mine = std::fmax(mine, shared.maximum[g]);
    grid.block_barrier();
    return mine;
  }

  ACTIVEDPO_HOST_DEVICE static GreedyBounds larger(const GreedyBounds& a, const GreedyBounds& b) {
    return {std::fmax(a.best, b.best), std::fmax(a.top, b.top), std::fmax(a.oldest, b.oldest)};
  }

  static constexpr int kThreads = Grid::kLanes * Grid::kGroups;
  Grid& grid;

 private:
  ACTIVEDPO_HOST_DEVICE GreedyBounds max(const GreedyBounds& mine) {
    return {grid.max(mine.best), grid.max(mine.top), grid.max(mine.oldest)};
  }

  GreedyBounds* const bounds_;
  int turn_ = 0;
};

}  // namespace activedpo
