// Running scores, brought up to date if they may be the largest: advance.cpp for a grid of threads.
// Old scores are upper bounds, because scores only fall.
#pragma once

#include <cmath>
#include <cstdint>

#include "greedy.h"
#include "greedy_feature.h"
#include "greedy_team.h"

namespace activedpo {

template <typename T, class Grid>
class GreedyLazy {
 public:
  using S = typename Sum<T>::Type;

  ACTIVEDPO_HOST_DEVICE GreedyLazy(GreedyTeam<Grid>& team, const GreedyProblem& problem,
                                   const GreedyRoom<S>& room)
      : team_(team), p_(problem), room_(room) {}

  // Clears the thread's part of the workspace. Call it first; a barrier must follow.
  ACTIVEDPO_HOST_DEVICE void clear() {
    for (std::int64_t i = team_.thread(); i < p_.n_candidates; i += team_.threads()) {
      room_.inherited[i] = 0;
      room_.version[i] = 0;
      room_.arrived[i] = 0;
    }
    if (team_.thread() == 0) {
      for (int list = 0; list < 3; ++list) room_.counters[list] = 0;
    }
  }

  // Returns the bounds of the thread's part of the candidates, after `count` directions.
  ACTIVEDPO_PHASE GreedyBounds scan(std::int64_t count) const {
    GreedyBounds mine = none();
    for (std::int64_t i = team_.thread(); i < p_.n_candidates; i += team_.threads()) {
      if (open(i)) note(&mine, i, room_.version[i] == count);
    }
    return mine;
  }

  // Brings candidates up to date until every one whose value may be the largest is up to date, and
  // returns the largest lower bound. `bounds` are those of all candidates. Adds the number of rows
  // read to `looked`.
  ACTIVEDPO_HOST_DEVICE double bring_up_to_date(std::int64_t count, GreedyBounds bounds,
                                                std::int64_t* looked) {
    const double highest = bounds.top;
    double margin = margin_;
    while (bounds.top >= 0 && bounds.top >= bounds.best) {
      const double cut = std::fmax(bounds.best, bounds.top * (1 - margin));
      margin = std::fmin(1.0, 2 * margin);
      std::int32_t* const counter = new_list();
      const GreedyBounds rest = team_.exchange(list_stale(count, cut, counter));
      const std::int64_t listed = *counter;
      bounds = {std::fmax(bounds.best, rest.best), rest.top, 0};
      if (listed == 0) continue;
      *looked += 2 * listed;
      const auto oldest = static_cast<std::int64_t>(-rest.oldest);
      const GreedyBounds moved = team_.exchange(advance(count, listed, oldest));
      bounds = {std::fmax(bounds.best, moved.best), std::fmax(bounds.top, moved.top), 0};
    }
    // The margin that would have been right: the next pick will be similar.
    if (highest > 0) {
      margin_ = std::fmin(1.0, std::fmax(kLeastMargin, 1 - bounds.best / highest));
    }
    return bounds.best;
  }

  // Lists the up-to-date candidates whose values may be the largest, in any order. Returns their
  // number; `any` is set to whether one of them is not certainly zero.
  ACTIVEDPO_PHASE std::int64_t contenders(std::int64_t count, double best, bool* any) {
    std::int32_t* const counter = new_list();
    GreedyBounds mine = none();
    for (std::int64_t i = team_.thread(); i < p_.n_candidates; i += team_.threads()) {
      if (!open(i) || room_.version[i] != count || upper(i) < best) continue;
      append(counter, i);
      if (!zero(i)) mine.best = 1;
    }
    *any = team_.exchange(mine).best > 0;
    return *counter;
  }

  ACTIVEDPO_HOST_DEVICE double value(std::int64_t i, double score) const {
    return p_.inverse_cost == nullptr ? score : score * p_.inverse_cost[i];
  }

 private:
  static constexpr double kLeastMargin = 1e-3;

  ACTIVEDPO_HOST_DEVICE static GreedyBounds none() {
    return {-kGreedyInfinity, -1, -kGreedyInfinity};
  }
  ACTIVEDPO_HOST_DEVICE double upper(std::int64_t i) const {
    return value(i, p_.score[i] + p_.doubt[i]);
  }
  ACTIVEDPO_HOST_DEVICE double lower(std::int64_t i) const {
    return value(i, p_.score[i] - p_.doubt[i]);
  }
  ACTIVEDPO_HOST_DEVICE bool zero(std::int64_t i) const {  // a zero feature, which stays one
    return p_.score[i] + p_.doubt[i] == 0;
  }
  ACTIVEDPO_HOST_DEVICE bool open(std::int64_t i) const {
    if (!p_.left[i]) return false;
    if (p_.prompt != nullptr && p_.prompt_room[p_.prompt[i]] <= 0) return false;
    return p_.group == nullptr || p_.group[i] < 0 || p_.group_room[p_.group[i]] > 0;
  }
  ACTIVEDPO_HOST_DEVICE void note(GreedyBounds* bounds, std::int64_t i, bool up_to_date) const {
    if (up_to_date) {
      bounds->best = std::fmax(bounds->best, lower(i));
    } else {
      bounds->top = std::fmax(bounds->top, upper(i));
    }
  }

  // Returns the counter of a new list. There are three counters: one is in use, a thread may still
  // be reading the previous one, and the next one is set to zero meanwhile.
  ACTIVEDPO_HOST_DEVICE std::int32_t* new_list() {
    list_ = (list_ + 1) % 3;
    if (team_.thread() == 0) room_.counters[(list_ + 1) % 3] = 0;
    return room_.counters + list_;
  }
  ACTIVEDPO_HOST_DEVICE void append(std::int32_t* counter, std::int64_t i) {
    room_.list[team_.grid.add(counter, 1)] = {static_cast<std::int32_t>(i), room_.version[i]};
  }

  // Lists the thread's candidates that are not up to date and may reach `cut`.
  ACTIVEDPO_PHASE GreedyBounds list_stale(std::int64_t count, double cut,
                                                std::int32_t* counter) {
    GreedyBounds mine = none();
    for (std::int64_t i = team_.thread(); i < p_.n_candidates; i += team_.threads()) {
      if (!open(i) || room_.version[i] == count) continue;
      if (upper(i) < cut) {
        note(&mine, i, false);
      } else if (zero(i)) {
        room_.version[i] = static_cast<std::int32_t>(count);
        note(&mine, i, true);
      } else {
        append(counter, i);
        mine.oldest = std::fmax(mine.oldest, -static_cast<double>(room_.version[i]));
      }
    }
    return mine;
  }

  // Advances the listed candidates by as many directions as are processed at once. Each group takes
  // a tile of directions; the one that finishes a candidate's last tile updates its score.
  ACTIVEDPO_PHASE GreedyBounds advance(std::int64_t count, std::int64_t listed,
                                             std::int64_t oldest) {
    GreedyBounds mine = none();
    const std::int64_t tiles = tiles_of(stop(oldest, count) - oldest);
    // Neighbors take different candidates and, mostly, the same directions.
    for (std::int64_t unit = team_.worker(); unit < listed * tiles; unit += team_.workers()) {
      const std::int64_t place = unit % listed, tile = unit / listed;
      const GreedyListed entry = room_.list[place];
      const std::int64_t to = stop(entry.version, count);
      const std::int64_t from = entry.version + tile * kGreedyTile;
      if (from >= to) continue;
      double* const parts = room_.parts + place * kGreedyTiles * 3;
      see(entry.candidate, from, to - from < kGreedyTile ? to - from : kGreedyTile,
          parts + tile * 3);
      const auto all = static_cast<std::int32_t>(tiles_of(to - entry.version));
      if (team_.grid.lane() == 0 && team_.grid.last_of(all, room_.arrived + place)) {
        room_.arrived[place] = 0;
        lower_score(entry.candidate, parts, all, to);
        note(&mine, entry.candidate, to == count);
      }
    }
    return mine;
  }
  ACTIVEDPO_HOST_DEVICE static std::int64_t stop(std::int64_t version, std::int64_t count) {
    const std::int64_t most = version + std::int64_t{kGreedyTile} * kGreedyTiles;
    return most < count ? most : count;
  }
  ACTIVEDPO_HOST_DEVICE static std::int64_t tiles_of(std::int64_t directions) {
    return (directions + kGreedyTile - 1) / kGreedyTile;
  }

  // Writes the effect of n <= kGreedyTile directions from `from` on a candidate to `parts`: the
  // decrease of its score, and the increases of its doubt and its inherited error.
  ACTIVEDPO_HOST_DEVICE void see(std::int64_t i, std::int64_t from, std::int64_t n,
                                 double* parts) const {
    if (n <= 2) {
      see<2>(i, from, n, parts);
    } else if (n <= 4) {
      see<4>(i, from, n, parts);
    } else if (n <= 8) {
      see<8>(i, from, n, parts);
    } else {
      see<kGreedyTile>(i, from, n, parts);
    }
  }
  template <int Width>
  ACTIVEDPO_HOST_DEVICE void see(std::int64_t i, std::int64_t from, std::int64_t n,
                                 double* parts) const {
    const double reach = p_.reach[i];
    double dots[Width];
    multiply<Width>(dots, typename GreedyFeature<T, Grid>::Scaled({p_, i}, reach), from);
    if (team_.grid.lane() != 0) return;
    // A bound on the score's root during these directions.
    const double root = std::sqrt(p_.score[i] + p_.doubt[i]);
    double lost = 0, doubt = 0, inherited = 0;
    ACTIVEDPO_UNROLL
    for (int s = 0; s < Width; ++s) {
      if (s >= n) continue;
      const double f = std::fabs(dots[s]) * reach * room_.norm[from + s];
      const double error = room_.error[from + s] * reach;
      const double turned = room_.turn[from + s] * root;
      lost += f * f;
      doubt += (2 * f + error) * error + (2 * f + turned) * turned;
      inherited += room_.turn[from + s] * std::fmin(f + error, root);
    }
    parts[0] = lost;
    parts[1] = doubt;
    parts[2] = inherited;
  }

  // Inner products of a feature with `Width` directions. (Rows after the last direction are read
  // too; their results are not used.)
  template <int Width, class Feature>
  ACTIVEDPO_HOST_DEVICE void multiply(double (&dots)[Width], const Feature& feature,
                                      std::int64_t from) const {
    constexpr std::int64_t run = std::int64_t{kGreedyRun} * Grid::kLanes;
    const S* const unit = room_.unit + from * p_.dim;
    ACTIVEDPO_UNROLL
    for (int s = 0; s < Width; ++s) dots[s] = 0;
    for (std::int64_t begin = 0; begin < p_.dim; begin += run) {
      const std::int64_t end = begin + run < p_.dim ? begin + run : p_.dim;
      S sums[Width] = {};
      for (std::int64_t j = begin + team_.grid.lane(); j < end; j += Grid::kLanes) {
        const S x = feature[j];
        ACTIVEDPO_UNROLL
        for (int s = 0; s < Width; ++s) sums[s] += x * unit[s * p_.dim + j];
      }
      ACTIVEDPO_UNROLL
      for (int s = 0; s < Width; ++s) dots[s] += static_cast<double>(sums[s]);
    }
    ACTIVEDPO_UNROLL
    for (int s = 0; s < Width; ++s) dots[s] = team_.grid.sum(dots[s]);
  }

  ACTIVEDPO_HOST_DEVICE void lower_score(std::int64_t i, const double* parts, std::int32_t tiles,
                                         std::int64_t to) {
    double lost = 0, doubt = 0, inherited = 0;
    for (std::int32_t tile = 0; tile < tiles; ++tile) {
      lost += parts[3 * tile];
      doubt += parts[3 * tile + 1];
      inherited += parts[3 * tile + 2];
    }
    p_.score[i] = std::fmax(0.0, p_.score[i] - lost);
    p_.doubt[i] += doubt;
    room_.inherited[i] += inherited;
    room_.version[i] = static_cast<std::int32_t>(to);
  }

  GreedyTeam<Grid>& team_;
  const GreedyProblem& p_;
  const GreedyRoom<S>& room_;
  double margin_ = 0.01;  // bounds within this of the largest, relatively, are considered first
  int list_ = 0;
};

}  // namespace activedpo
