// The loop over picks (problem.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "greedy/lazy.h"
#include "greedy/problem.h"
#include "greedy/root.h"
#include "greedy/team.h"

namespace activedpo {

template <typename T, class Grid>
class GreedySelect {
 public:
  using S = typename Sum<T>::Type;

  ACTIVEDPO_HOST_DEVICE GreedySelect(Grid& grid, const GreedyProblem& problem,
                                     const GreedyRoom<S>& room)
      : p_(problem), room_(room), team_(grid, room.bounds), lazy_(team_, problem, room),
        root_(team_, problem, room) {}

  // Makes the picks from number `begin`, of which the last call left the state, to `end`, or as many
  // of them as can be made.
  ACTIVEDPO_HOST_DEVICE void run(std::int64_t begin, std::int64_t end) {
    count_ = begin;
    lazy_.start(begin == 0);
    GreedyBounds bounds = team_.exchange(lazy_.scan(begin));
    std::int64_t looked = 0;
    while (count_ < end) {
      Choice choice{-1, 0, -1};
      if (count_ < p_.n_forced) {
        choice.candidate = p_.forced[count_];
      } else {
        choice = choose(lazy_.bring_up_to_date(count_, bounds, &looked));
        if (choice.candidate < 0) break;
        if (choice.score < p_.min_score) {
          if (p_.inverse_cost == nullptr) break;
          // A costlier one may have a higher score. This one will not: scores only fall.
          if (team_.thread() == 0) p_.left[choice.candidate] = 0;
          team_.grid.barrier();
          bounds = team_.exchange(lazy_.scan(count_));
          continue;
        }
      }
      if (choice.slot < 0) {
        root_.look({nullptr, choice.candidate, 1}, count_);
        choice.slot = 0;
      }
      bounds = take(choice, looked);
      looked = 0;
    }
    lazy_.stop();
    if (team_.thread() == 0) *p_.count = count_;
  }

 private:
  struct Choice {
    std::int64_t candidate;  // -1: none left
    double score;
    std::int64_t slot;  // of its residual; -1: none
  };

  // Returns the candidate with the largest value; the first one if several cannot be told apart.
  ACTIVEDPO_HOST_DEVICE Choice choose(double best) {
    bool any = false;
    const std::int64_t found = lazy_.contenders(count_, best, &any);
    if (found == 0) return {-1, 0, -1};
    GreedyBatch batch{nullptr, -1, 0};
    std::int64_t begin = found;  // of the batch in the list
    // First scores are fresh, unless they round more; those of zero features always are.
    if (any && (p_.rounds || count_ > 0)) {
      for (begin = 0;; begin += kGreedySlots) {
        const std::int64_t size = found - begin < kGreedySlots ? found - begin : kGreedySlots;
        batch = {room_.list + begin, -1, size};
        root_.look(batch, count_);
        if (begin + size == found) break;
      }
    }
    double least = -kGreedyInfinity;
    each(found, begin, [&](std::int64_t i, double score, double error_bound) {
      least = std::fmax(least, lazy_.value(i, score - error_bound));
    });
    least = team_.block_max(least);
    double first = -kGreedyInfinity;  // minus the candidate's number
    each(found, begin, [&](std::int64_t i, double score, double error_bound) {
      const bool best = lazy_.value(i, score + error_bound) >= least;
      if (best) first = std::fmax(first, -static_cast<double>(i));
    });
    const auto candidate = static_cast<std::int64_t>(-team_.block_max(first));
    for (std::int64_t slot = 0; slot < batch.size; ++slot) {
      if (batch.at(slot) == candidate) {
        return {candidate, team_.grid.shared().score[slot], slot};
      }
    }
    return {candidate, p_.score[candidate], -1};
  }

  // Calls f(candidate, score, error_bound) for the listed contenders, each by one thread of every
  // block.
  // Those from `begin` on were in the last `look`.
  template <typename F>
  ACTIVEDPO_HOST_DEVICE void each(std::int64_t found, std::int64_t begin, const F& f) {
    const auto& shared = team_.grid.shared();
    for (std::int64_t at = team_.thread_of_block(); at < found; at += team_.kThreads) {
      const std::int64_t i = room_.list[at].candidate;
      if (at < begin) {
        f(i, p_.score[i], p_.error_bound[i]);
      } else {
        f(i, shared.score[at - begin], shared.error_bound[at - begin]);
      }
    }
  }

  // Picks a candidate that was passed to `look`; returns the bounds of those left.
  ACTIVEDPO_HOST_DEVICE GreedyBounds take(const Choice& choice, std::int64_t looked) {
    const double gain = team_.grid.shared().score[choice.slot];
    root_.onto(choice.slot, count_);
    if (team_.thread() == 0) {
      p_.picks[count_] = choice.candidate;
      p_.scores[count_] = gain;
      p_.touched[count_] = looked;
      close(choice.candidate);
    }
    team_.grid.barrier();
    root_.learn(choice.slot, choice.candidate, gain, count_);
    const GreedyBounds bounds = team_.exchange(lazy_.scan(count_ + 1));
    root_.settle(count_);
    ++count_;
    return bounds;
  }

  ACTIVEDPO_HOST_DEVICE void close(std::int64_t i) {
    p_.left[i] = 0;
    if (p_.prompt != nullptr) --p_.prompt_room[p_.prompt[i]];
    if (p_.group != nullptr && p_.group[i] >= 0) --p_.group_room[p_.group[i]];
  }

  const GreedyProblem& p_;
  const GreedyRoom<S>& room_;
  GreedyTeam<Grid> team_;
  GreedyLazy<T, Grid> lazy_;
  GreedyRoot<T, Grid> root_;
  std::int64_t count_ = 0;  // picks so far
};

}  // namespace activedpo
