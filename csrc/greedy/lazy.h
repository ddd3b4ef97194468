// Running scores, brought up to date if they may be the largest: scores/refresh_bounds.cpp for a
// grid of threads.
// Old scores are upper bounds, because scores only fall.
#pragma once

#include <cmath>
#include <cstdint>

#include "greedy/problem.h"
#include "greedy/products.h"
#include "greedy/team.h"

namespace activedpo {

template <typename T, class Grid>
class GreedyLazy {
 public:
  using S = typename Sum<T>::Type;

  ACTIVEDPO_HOST_DEVICE GreedyLazy(GreedyTeam<Grid>& team, const GreedyProblem& problem,
                                   const GreedyRoom<S>& room)
      : team_(team), p_(problem), room_(room), products_(team, problem, room) {}

  // Call it first; a barrier must follow. `unused`: the workspace has no state yet.
  ACTIVEDPO_HOST_DEVICE void start(bool unused) {
    if (unused) {
      for (std::int64_t i = team_.thread(); i < p_.n_candidates; i += team_.threads()) {
        room_.inherited[i] = 0;
        room_.version[i] = 0;
      }
      products_.clear();
    } else {
      margin_ = *room_.margin;
    }
    for (std::int64_t tile = team_.thread(); tile < 3 * room_.tiles; tile += team_.threads()) {
      room_.in_tile[tile] = 0;
    }
    if (team_.thread() == 0) {
      for (int list = 0; list < 3; ++list) room_.counters[list] = 0;
    }
  }

  // Keeps what a next `start` needs.
  ACTIVEDPO_HOST_DEVICE void stop() const {
    if (team_.thread() == 0) *room_.margin = margin_;
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
      const GreedyBounds moved =
          advance(products_.pass(tiles_of_list(), listed, oldest, count));
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
    return value(i, p_.score[i] + p_.error_bound[i]);
  }
  ACTIVEDPO_HOST_DEVICE double lower(std::int64_t i) const {
    return value(i, p_.score[i] - p_.error_bound[i]);
  }
  ACTIVEDPO_HOST_DEVICE bool zero(std::int64_t i) const {  // a zero feature, which stays one
    return p_.score[i] + p_.error_bound[i] == 0;
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
    const int next = (list_ + 1) % 3;
    if (team_.thread() == 0) room_.counters[next] = 0;
    for (std::int64_t tile = team_.thread(); tile < room_.tiles; tile += team_.threads()) {
      room_.in_tile[next * room_.tiles + tile] = 0;
    }
    return room_.counters + list_;
  }
  // Numbers of listed candidates by the tiles of their versions.
  ACTIVEDPO_HOST_DEVICE std::int32_t* tiles_of_list() const {
    return room_.in_tile + list_ * room_.tiles;
  }
  ACTIVEDPO_HOST_DEVICE void append(std::int32_t* counter, std::int64_t i) {
    const std::int32_t version = room_.version[i];
    const std::int32_t rank = team_.grid.add(tiles_of_list() + GreedyPass::tile_of(version), 1);
    room_.list[team_.grid.add(counter, 1)] = {static_cast<std::int32_t>(i), version, rank};
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

  // Advances the listed candidates; returns the bounds of all of them.
  ACTIVEDPO_HOST_DEVICE GreedyBounds advance(const GreedyPass& pass) {
    GreedyBounds mine = none();
    const std::int64_t places = pass.groups * GreedyProducts<T, Grid>::kTogether;
    for (std::int64_t begin = 0; begin < places; begin += room_.wave) {
      products_.form(pass, begin);
      team_.grid.barrier();
      products_.multiply(pass, begin);
      team_.grid.barrier();
      mine = team_.larger(mine, lower_scores(pass, begin));
    }
    return team_.exchange(mine);
  }

  // Brings a wave of listed candidates up to date, or as far as one pass goes.
  ACTIVEDPO_PHASE GreedyBounds lower_scores(const GreedyPass& pass, std::int64_t begin) {
    GreedyBounds mine = none();
    const std::int64_t places = products_.here(pass, begin) * GreedyProducts<T, Grid>::kTogether;
    for (std::int64_t place = team_.worker(); place < places; place += team_.workers()) {
      const GreedyListed entry = room_.order[begin + place];
      if (entry.candidate < 0) continue;
      const std::int64_t to = pass.stop(entry.version);
      lower_score(pass, entry, place, to);
      if (team_.grid.lane() == 0) note(&mine, entry.candidate, to == pass.count);
    }
    return mine;
  }

  ACTIVEDPO_HOST_DEVICE void lower_score(const GreedyPass& pass, const GreedyListed& entry,
                                         std::int64_t place, std::int64_t to) {
    const std::int64_t i = entry.candidate;
    const std::int64_t first = GreedyPass::tile_of(entry.version) * kGreedyTile;
    const double reach = p_.reach[i];
    // A bound on the score's root during these directions.
    const double root = std::sqrt(p_.score[i] + p_.error_bound[i]);
    double lost = 0, error_bound = 0, inherited = 0;
    for (std::int64_t s = entry.version + team_.grid.lane(); s < to; s += Grid::kLanes) {
      const double f = std::fabs(products_.dot(pass, place, s - first)) * reach * room_.norm[s];
      const double error = room_.error[s] * reach;
      const double turned = room_.turn[s] * root;
      lost += f * f;
      error_bound += (2 * f + error) * error + (2 * f + turned) * turned;
      inherited += room_.turn[s] * std::fmin(f + error, root);
    }
    lost = team_.grid.sum(lost);
    error_bound = team_.grid.sum(error_bound);
    inherited = team_.grid.sum(inherited);
    if (team_.grid.lane() != 0) return;
    p_.score[i] = std::fmax(0.0, p_.score[i] - lost);
    p_.error_bound[i] += error_bound;
    room_.inherited[i] += inherited;
    room_.version[i] = static_cast<std::int32_t>(to);
  }

  GreedyTeam<Grid>& team_;
  const GreedyProblem& p_;
  const GreedyRoom<S>& room_;
  GreedyProducts<T, Grid> products_;
  double margin_ = 0.01;  // bounds within this of the largest, relatively, are considered first
  int list_ = 0;
};

}  // namespace activedpo
