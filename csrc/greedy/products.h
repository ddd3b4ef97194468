// Products of listed candidates with the directions that they have not seen (lazy.h).
#pragma once

#include <cstdint>

#include "greedy/feature.h"
#include "greedy/problem.h"
#include "greedy/team.h"

namespace activedpo {

// A list of candidates to multiply, each with up to kGreedyTiles tiles of directions. A tile's
// directions have consecutive numbers from a multiple of kGreedyTile on, so that candidates of
// similar versions are multiplied with the same ones.
struct GreedyPass {
  const std::int32_t* in_tile;
  std::int64_t listed;
  std::int64_t oldest;  // tile of the smallest version
  std::int64_t count;   // of directions
  std::int64_t groups;  // of places in `order`: see GreedyProducts::pass

  ACTIVEDPO_HOST_DEVICE static std::int64_t tile_of(std::int64_t version) {
    return version / kGreedyTile;
  }
  // The number of directions that a candidate will have seen.
  ACTIVEDPO_HOST_DEVICE std::int64_t stop(std::int64_t version) const {
    const std::int64_t most = (tile_of(version) + kGreedyTiles) * kGreedyTile;
    return most < count ? most : count;
  }
  // The largest number of tiles of a candidate.
  ACTIVEDPO_HOST_DEVICE std::int64_t tiles() const {
    return tile_of(stop(oldest * kGreedyTile) - 1) - oldest + 1;
  }
};

template <typename T, class Grid>
class GreedyProducts {
 public:
  using S = typename Sum<T>::Type;
  static constexpr int kTogether = kGreedyTogether<S>;

  ACTIVEDPO_HOST_DEVICE GreedyProducts(GreedyTeam<Grid>& team, const GreedyProblem& problem,
                                       const GreedyRoom<S>& room)
      : team_(team), p_(problem), room_(room) {}

  // Clears the thread's part of the numbers that nothing else writes.
  ACTIVEDPO_HOST_DEVICE void clear() {
    const std::int64_t rows = p_.n_picks + kGreedyTile;
    for (std::int64_t s = team_.thread(); s < rows; s += team_.threads()) {
      for (std::int64_t j = p_.dim; j < room_.whole(p_.dim); ++j) room_.unit[s * room_.width + j] = 0;
    }
  }

  // A list whose candidates are put into groups of kTogether places in `order`; those whose versions
  // are in different tiles do not share a group.
  ACTIVEDPO_HOST_DEVICE GreedyPass pass(const std::int32_t* in_tile, std::int64_t listed,
                                        std::int64_t oldest, std::int64_t count) const {
    GreedyPass pass{in_tile, listed, GreedyPass::tile_of(oldest), count, 0};
    pass.groups = groups(pass, GreedyPass::tile_of(count - 1) + 1);
    return pass;
  }

  // Writes the features of those whose places in `order` are from `begin` on, as many as a wave
  // has. The first wave (`begin` is 0) writes all of `order`, from the list.
  ACTIVEDPO_PHASE void form(const GreedyPass& pass, std::int64_t begin) const {
    const std::int64_t slots = begin == 0 ? pass.listed : here(pass, begin) * kTogether;
    for (std::int64_t unit = team_.worker(); unit < slots * room_.pieces; unit += team_.workers()) {
      const std::int64_t piece = unit / slots, from = unit - piece * slots;
      if (begin > 0) {
        const GreedyListed entry = room_.order[begin + from];
        if (entry.candidate >= 0) write(entry.candidate, from, piece);
        continue;
      }
      const GreedyListed entry = room_.list[from];
      const std::int64_t tile = GreedyPass::tile_of(entry.version);
      const std::int64_t place = groups(pass, tile) * kTogether + entry.rank;
      if (piece == 0 && team_.grid.lane() == 0) put(entry, place, pass.in_tile[tile]);
      if (place < room_.wave) write(entry.candidate, place, piece);
    }
  }

  // Multiplies the wave of `begin`. (Directions after the last one are read too, and empty places;
  // their products are not used.)
  ACTIVEDPO_PHASE void multiply(const GreedyPass& pass, std::int64_t begin) const {
    const auto groups = static_cast<std::uint32_t>(here(pass, begin));
    const auto tiles = static_cast<std::uint32_t>(pass.tiles());
    const auto units = groups * tiles * static_cast<std::uint32_t>(room_.pieces);
    // Neighbors take different candidates and, mostly, the same numbers of the same directions.
    for (auto unit = static_cast<std::uint32_t>(team_.worker()); unit < units;
         unit += static_cast<std::uint32_t>(team_.workers())) {
      const std::uint32_t rest = unit / groups, group = unit - rest * groups;
      const std::uint32_t piece = rest / tiles, tile = rest - piece * tiles;
      const std::int64_t first = room_.order[begin + group * kTogether].version / kGreedyTile + tile;
      if (first * kGreedyTile >= pass.count) continue;
      double own[kOwn];
      multiply(own, room_.features + group * kTogether * room_.width,
               room_.unit + first * kGreedyTile * room_.width, piece);
      double* const to = room_.products + at(pass, group, tile, piece) + team_.grid.lane() * kOwn;
      ACTIVEDPO_UNROLL
      for (int i = 0; i < kOwn; ++i) to[i] = own[i];
    }
  }

  // The product of a place of the wave with direction number s of its first tile and later ones.
  ACTIVEDPO_HOST_DEVICE double dot(const GreedyPass& pass, std::int64_t place, std::int64_t s) const {
    const double* const parts =
        room_.products + at(pass, place / kTogether, s / kGreedyTile, 0) +
        place % kTogether * kGreedyTile + s % kGreedyTile;
    double sum = 0;
    ACTIVEDPO_UNROLL_8
    for (std::int64_t piece = 0; piece < room_.pieces; ++piece) sum += parts[piece * kSums];
    return sum;
  }

  // Groups of the wave of `begin`.
  ACTIVEDPO_HOST_DEVICE std::int64_t here(const GreedyPass& pass, std::int64_t begin) const {
    const std::int64_t left = pass.groups - begin / kTogether, most = room_.wave / kTogether;
    return left < most ? left : most;
  }

 private:
  static constexpr int kSums = kTogether * kGreedyTile;
  static constexpr int kOwn = kSums / Grid::kLanes;
  static constexpr int kAhead = 4;  // loads of each row before their numbers are used
  static constexpr std::int64_t kStep = 4 * Grid::kLanes;

  // Groups of tiles before `end`.
  ACTIVEDPO_HOST_DEVICE std::int64_t groups(const GreedyPass& pass, std::int64_t end) const {
    double found = 0;
    for (std::int64_t tile = pass.oldest + team_.grid.lane(); tile < end; tile += Grid::kLanes) {
      found += (pass.in_tile[tile] + kTogether - 1) / kTogether;
    }
    return static_cast<std::int64_t>(team_.grid.sum(found));
  }

  ACTIVEDPO_HOST_DEVICE void put(const GreedyListed& entry, std::int64_t place,
                                 std::int32_t in_tile) const {
    room_.order[place] = entry;
    if (entry.rank != in_tile - 1) return;
    for (std::int64_t empty = place + 1; empty % kTogether != 0; ++empty) {
      room_.order[empty] = {-1, entry.version, 0};
    }
  }

  ACTIVEDPO_HOST_DEVICE std::int64_t end_of(std::int64_t piece) const {
    const std::int64_t end = (piece + 1) * kGreedyPiece, whole = room_.whole(p_.dim);
    return end < whole ? end : whole;
  }

  // Writes a piece of a candidate's feature.
  ACTIVEDPO_HOST_DEVICE void write(std::int64_t i, std::int64_t place, std::int64_t piece) const {
    const typename GreedyFeature<T, Grid>::Scaled feature({p_, i}, p_.reach[i]);
    S* const to = room_.features + place * room_.width;
    const std::int64_t end = end_of(piece);
    for (std::int64_t j = piece * kGreedyPiece + 4 * team_.grid.lane(); j < end;
         j += kAhead * kStep) {
      Four<S> numbers[kAhead];
      feature.load(numbers, j, kStep, p_.dim);
      ACTIVEDPO_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        if (j + a * kStep < end) {
          *reinterpret_cast<Four<S>*>(to + j + a * kStep) = numbers[a];
        }
      }
    }
  }

  // The lane's products of a group's features with a tile of directions, over a piece.
  ACTIVEDPO_HOST_DEVICE void multiply(double (&own)[kOwn], const S* features, const S* unit,
                                      std::int64_t piece) const {
    constexpr std::int64_t run = std::int64_t{kGreedyRun} * Grid::kLanes;
    const std::int64_t width = room_.width, end = end_of(piece);
    ACTIVEDPO_UNROLL
    for (int i = 0; i < kOwn; ++i) own[i] = 0;
    for (std::int64_t begin = piece * kGreedyPiece; begin < end; begin += run) {
      const std::int64_t stop = begin + run < end ? begin + run : end;
      S sums[kSums] = {};
      for (std::int64_t j = begin + 4 * team_.grid.lane(); j < stop; j += kStep) {
        Four<S> x[kTogether];
        ACTIVEDPO_UNROLL
        for (int c = 0; c < kTogether; ++c) x[c] = Grid::four(features + c * width + j);
        ACTIVEDPO_UNROLL
        for (int s = 0; s < kGreedyTile; ++s) {
          const Four<S> w = Grid::four(unit + s * width + j);
          ACTIVEDPO_UNROLL
          for (int c = 0; c < kTogether; ++c) {
            ACTIVEDPO_UNROLL
            for (int q = 0; q < 4; ++q) sums[c * kGreedyTile + s] += x[c].at[q] * w.at[q];
          }
        }
      }
      double part[kOwn];
      team_.grid.sums(sums, part);
      ACTIVEDPO_UNROLL
      for (int i = 0; i < kOwn; ++i) own[i] += part[i];
    }
  }

  ACTIVEDPO_HOST_DEVICE std::int64_t at(const GreedyPass& pass, std::int64_t group,
                                        std::int64_t tile, std::int64_t piece) const {
    return ((group * pass.tiles() + tile) * room_.pieces + piece) * kSums;
  }

  GreedyTeam<Grid>& team_;
  const GreedyProblem& p_;
  const GreedyRoom<S>& room_;
};

}  // namespace activedpo
