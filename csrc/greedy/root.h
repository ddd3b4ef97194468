// Fresh scores, from the root X = F B of V^-1 in float64, and its update by a pick (problem.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "greedy/feature.h"
#include "greedy/problem.h"
#include "greedy/team.h"

namespace activedpo {

// Up to kGreedySlots candidates: part of a list, or a single one.
struct GreedyBatch {
  const GreedyListed* list;
  std::int64_t single;
  std::int64_t size;

  ACTIVEDPO_HOST_DEVICE std::int64_t at(std::int64_t slot) const {
    return list == nullptr ? single : list[slot].candidate;
  }
};

template <typename T, class Grid>
class GreedyRoot {
 public:
  using S = typename Sum<T>::Type;

  ACTIVEDPO_HOST_DEVICE GreedyRoot(GreedyTeam<Grid>& team, const GreedyProblem& problem,
                                   const GreedyRoom<S>& room)
      : team_(team), p_(problem), room_(room) {}

  // Rescores candidates after `count` picks. Their scores and error bounds are then in the block's
  // shared memory, and after the next barrier also in the candidates' arrays.
  ACTIVEDPO_PHASE void look(const GreedyBatch& batch, std::int64_t count) {
    const std::int64_t n = p_.n_before + count;
    if (p_.base != nullptr) {
      whiten(batch);
      team_.grid.barrier();
    }
    dots(batch.size, p_.pulled, n, [&](std::int64_t slot) { return Whitened(*this, batch, slot); });
    team_.grid.barrier();
    columns(
        room_.lengths, batch.size, p_.directions, n,
        [&](std::int64_t slot, std::int64_t s) { return dot(slot, s); },
        [&](std::int64_t slot, std::int64_t j, double sum) {
          const double r = Whitened(*this, batch, slot)[j] - sum;
          room_.residual[slot * p_.dim + j] = r;
          return r * r;
        });
    team_.grid.barrier();
    measure(batch);
  }

  // Adds a candidate passed to `look` to the root, as pick number `count`: `onto`, a barrier,
  // `learn`, a barrier, `settle`.
  ACTIVEDPO_PHASE void onto(std::int64_t slot, std::int64_t count) {
    const double* const r = room_.residual + slot * p_.dim;
    dots(1, p_.directions, p_.n_before + count, [&](std::int64_t) { return r; });
  }
  ACTIVEDPO_PHASE void learn(std::int64_t slot, std::int64_t candidate, double gain,
                                   std::int64_t count) {
    const std::int64_t n = p_.n_before + count;
    const double root = std::sqrt(1 + gain);
    const double weight = 1 / (root * (1 + root));  // (1 - 1/root) / gain
    // A bound on |w|, because |F^T r| <= |r|.
    const double norm = p_.root_norm * std::sqrt(gain) / root;
    const double over = norm > 0 ? 1 / norm : 0;
    const double* const r = room_.residual + slot * p_.dim;
    if (team_.thread() == 0) {
      const double share = p_.size[candidate] / root;
      room_.norm[count] = norm;
      room_.turn[count] = p_.root_error * share;
      room_.error[count] = p_.root_error * p_.root_norm * share;
    }
    const auto keep = [&](std::int64_t j, double w) {
      room_.unit[count * room_.width + j] = static_cast<S>(w * over);
      return w * w;
    };
    columns(
        room_.w_lengths, 1, p_.pulled, n, [&](std::int64_t, std::int64_t s) { return dot(0, s); },
        [&](std::int64_t, std::int64_t j, double sum) {
          const double solved = r[j] - sum;
          p_.directions[n * p_.dim + j] = r[j];
          p_.pulled[n * p_.dim + j] = weight * solved;
          if (p_.base == nullptr) return keep(j, p_.root_norm * solved / root);
          room_.solved[j] = solved;
          return 0.0;
        });
    if (p_.base == nullptr) return;
    team_.grid.barrier();
    columns(
        room_.w_lengths, 1, p_.base, p_.dim,
        [&](std::int64_t, std::int64_t s) { return room_.solved[s]; },
        [&](std::int64_t, std::int64_t j, double sum) { return keep(j, sum / root); });
  }
  // Adds the rounding error of products with w, which requires all of w.
  ACTIVEDPO_HOST_DEVICE void settle(std::int64_t count) {
    if (team_.worker() != 0) return;
    const double square = total(room_.w_lengths);
    if (team_.grid.lane() == 0) {
      room_.error[count] += kGreedyDotError<S> * std::sqrt(square);
    }
  }

 private:
  static constexpr int kTogether = 4;  // rows of a matrix that a group multiplies a piece with
  static constexpr int kPerLane = kGreedyColumns / Grid::kLanes;
  static constexpr int kAhead = Grid::kLanes < 16 ? Grid::kLanes : 16;  // rows in flight; see columns

  // B phi of a candidate.
  class Whitened {
   public:
    ACTIVEDPO_HOST_DEVICE Whitened(const GreedyRoot& root, const GreedyBatch& batch,
                                   std::int64_t slot)
        : feature_(root.p_, batch.at(slot)), norm_(root.p_.root_norm),
          ready_(root.p_.base == nullptr ? nullptr
                                         : root.room_.whitened + slot * root.p_.dim) {}
    ACTIVEDPO_HOST_DEVICE double operator[](std::int64_t j) const {
      return ready_ == nullptr ? norm_ * feature_[j] : ready_[j];
    }

   private:
    GreedyFeature<T, Grid> feature_;
    double norm_;
    const double* ready_;
  };

  ACTIVEDPO_HOST_DEVICE void whiten(const GreedyBatch& batch) {
    for (std::int64_t unit = team_.worker(); unit < batch.size * p_.dim;
         unit += team_.workers()) {
      const GreedyFeature<T, Grid> phi(p_, batch.at(unit / p_.dim));
      const double* const row = p_.base + unit % p_.dim * p_.dim;
      double sum = 0;
      for (std::int64_t j = team_.grid.lane(); j < p_.dim; j += Grid::kLanes) {
        sum += row[j] * phi[j];
      }
      sum = team_.grid.sum(sum);
      if (team_.grid.lane() == 0) room_.whitened[unit] = sum;
    }
  }

  // Computes inner products of vectors with the first n rows of a matrix, piece by piece.
  template <class Vector>
  ACTIVEDPO_HOST_DEVICE void dots(std::int64_t vectors, const double* matrix, std::int64_t n,
                                  const Vector& vector) {
    const std::int64_t tiles = (n + kTogether - 1) / kTogether;
    for (std::int64_t unit = team_.worker(); unit < vectors * room_.pieces * tiles;
         unit += team_.workers()) {
      const std::int64_t slot = unit / tiles / room_.pieces;
      const std::int64_t piece = unit / tiles % room_.pieces;
      const std::int64_t first = unit % tiles * kTogether;
      const std::int64_t begin = piece * kGreedyPiece;
      const std::int64_t end = begin + kGreedyPiece < p_.dim ? begin + kGreedyPiece : p_.dim;
      const double* rows[kTogether];
      ACTIVEDPO_UNROLL
      for (int s = 0; s < kTogether; ++s) {
        rows[s] = matrix + (first + s < n ? first + s : n - 1) * p_.dim;
      }
      const auto x = vector(slot);
      double sums[kTogether] = {};
      for (std::int64_t j = begin + team_.grid.lane(); j < end; j += Grid::kLanes) {
        const double number = x[j];
        ACTIVEDPO_UNROLL
        for (int s = 0; s < kTogether; ++s) sums[s] += number * rows[s][j];
      }
      ACTIVEDPO_UNROLL
      for (int s = 0; s < kTogether; ++s) {
        const double sum = team_.grid.sum(sums[s]);
        if (team_.grid.lane() == 0 && first + s < n) {
          room_.dots[(slot * room_.capacity + first + s) * room_.pieces + piece] = sum;
        }
      }
    }
  }
  ACTIVEDPO_HOST_DEVICE double dot(std::int64_t slot, std::int64_t s) const {
    const double* const pieces = room_.dots + (slot * room_.capacity + s) * room_.pieces;
    double sum = 0;
    ACTIVEDPO_UNROLL_8
    for (std::int64_t piece = 0; piece < room_.pieces; ++piece) sum += pieces[piece];
    return sum;
  }

  // Calls use(slot, j, sum over s < n of coefficient(slot, s) * matrix[s][j]) for every number j of
  // `vectors` vectors. A block handles kGreedyColumns numbers at a time, each of its groups a part
  // of the rows. The values that `use` returns are summed into `lengths`.
  template <class Coefficient, class Use>
  ACTIVEDPO_HOST_DEVICE void columns(double* lengths, std::int64_t vectors, const double* matrix,
                                     std::int64_t n, const Coefficient& coefficient,
                                     const Use& use) {
    Grid& grid = team_.grid;
    auto& shared = grid.shared();
    const std::int64_t part = (n + Grid::kGroups - 1) / Grid::kGroups;
    const std::int64_t begin = grid.group() * part;
    const std::int64_t end = begin + part < n ? begin + part : n;
    for (std::int64_t unit = grid.block(); unit < vectors * room_.chunks; unit += grid.blocks()) {
      const std::int64_t slot = unit / room_.chunks;
      const std::int64_t column = unit % room_.chunks * kGreedyColumns;
      double sums[kPerLane] = {};
      for (std::int64_t first = begin; first < end; first += Grid::kLanes) {
        const std::int64_t own = first + grid.lane();
        const double factor = own < end ? coefficient(slot, own) : 0;
        const auto here = static_cast<int>(end - first < Grid::kLanes ? end - first : Grid::kLanes);
        for (int s = 0; s < here; s += kAhead) {
          double numbers[kAhead][kPerLane];
          ACTIVEDPO_UNROLL
          for (int ahead = 0; ahead < kAhead; ++ahead) {
            const double* const row = matrix + (first + s + ahead) * p_.dim + column;
            ACTIVEDPO_UNROLL
            for (int x = 0; x < kPerLane; ++x) {
              const int at = grid.lane() + x * Grid::kLanes;
              numbers[ahead][x] = s + ahead < here && column + at < p_.dim ? row[at] : 0;
            }
          }
          ACTIVEDPO_UNROLL
          for (int ahead = 0; ahead < kAhead; ++ahead) {
            const double a = grid.from(factor, s + ahead);
            ACTIVEDPO_UNROLL
            for (int x = 0; x < kPerLane; ++x) sums[x] += a * numbers[ahead][x];
          }
        }
      }
      ACTIVEDPO_UNROLL
      for (int x = 0; x < kPerLane; ++x) {
        shared.columns[grid.group()][grid.lane() + x * Grid::kLanes] = sums[x];
      }
      grid.block_barrier();
      if (grid.group() == 0) {
        double length = 0;
        ACTIVEDPO_UNROLL
        for (int x = 0; x < kPerLane; ++x) {
          const int at = grid.lane() + x * Grid::kLanes;
          double sum = 0;
          for (int group = 0; group < Grid::kGroups; ++group) sum += shared.columns[group][at];
          if (column + at < p_.dim) length += use(slot, column + at, sum);
        }
        length = grid.sum(length);
        if (grid.lane() == 0) lengths[unit] = length;
      }
      grid.block_barrier();
    }
  }

  // The sum of one vector's lengths, for all lanes of the group.
  ACTIVEDPO_HOST_DEVICE double total(const double* lengths) const {
    double sum = 0;
    for (std::int64_t at = team_.grid.lane(); at < room_.chunks; at += Grid::kLanes) {
      sum += lengths[at];
    }
    return team_.grid.sum(sum);
  }

  ACTIVEDPO_HOST_DEVICE void measure(const GreedyBatch& batch) {
    auto& shared = team_.grid.shared();
    for (std::int64_t slot = team_.grid.group(); slot < batch.size; slot += Grid::kGroups) {
      const double score = total(room_.lengths + slot * room_.chunks);
      if (team_.grid.lane() != 0) continue;
      const std::int64_t i = batch.at(slot);
      const double error = p_.root_error * p_.size[i] + room_.inherited[i];
      const double error_bound = 2 * std::sqrt(score) * error + error * error;
      shared.score[slot] = score;
      shared.error_bound[slot] = error_bound;
      if (team_.grid.block() == 0) {
        p_.score[i] = score;
        p_.error_bound[i] = error_bound;
      }
    }
    team_.grid.block_barrier();
  }

  GreedyTeam<Grid>& team_;
  const GreedyProblem& p_;
  const GreedyRoom<S>& room_;
};

}  // namespace activedpo
