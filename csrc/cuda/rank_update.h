// V <- V + alpha * sum of p p^T over the points, on and below the diagonal of V: the work of one
// thread of one tile. rank_update.cu runs it on a GPU; testing/rank_update.cpp runs the same
// functions on the CPU, thread after thread, for the tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace activedpo {

struct RankUpdate {
  double* v;  // [k, k]
  std::int64_t v_stride;
  const double* points;  // [m, k]
  std::int64_t points_stride;
  std::int64_t k;
  std::int64_t m;
  double alpha;
};

// A tile of 64 x 64 numbers of V has 16 x 16 threads. Thread (y, x) has 4 x 4 of them: rows 4y to
// 4y + 3, columns x, x + 16, x + 32 and x + 48. So half a warp reads 128 contiguous bytes.
class RankTile {
 public:
  static constexpr int kThreads = 256;
  static constexpr int kDepth = 16;  // points in `Room` at a time

  // Shared by the threads of a tile: the points' numbers for its rows and its columns.
  struct alignas(16) Room {
    double rows[kDepth][64];
    double columns[kDepth][64];
  };
  struct Numbers {
    double at[4][4];
  };

  static std::int64_t count(std::int64_t k) {
    const std::int64_t side = (k + kSide - 1) / kSide;
    return side * (side + 1) / 2;
  }

  // Tiles are numbered row by row: 0 is (0, 0), 1 is (1, 0), 2 is (1, 1), 3 is (2, 0), ...
  ACTIVEDPO_HOST_DEVICE RankTile(const RankUpdate& update, std::int64_t tile, int thread)
      : update_(update), thread_(thread) {
    auto i = static_cast<std::int64_t>((std::sqrt(8 * static_cast<double>(tile) + 1) - 1) / 2);
    if (i * (i + 1) / 2 > tile) --i;  // the root was rounded
    if ((i + 1) * (i + 2) / 2 <= tile) ++i;
    row_ = i * kSide;
    column_ = (tile - i * (i + 1) / 2) * kSide;
  }

  // Reads the thread's numbers of V. Called first, so that they arrive while sums are formed.
  ACTIVEDPO_HOST_DEVICE Numbers read() const {
    Numbers old{};
    each([&](int i, int j, double* v) { old.at[i][j] = *v; });
    return old;
  }

  ACTIVEDPO_HOST_DEVICE void write(const Numbers& old, const Numbers& sums) const {
    each([&](int i, int j, double* v) { *v = old.at[i][j] + update_.alpha * sums.at[i][j]; });
  }

  // Copies the thread's part of points first, first + 1, ... to the room; zeros beyond k.
  ACTIVEDPO_HOST_DEVICE void fill(Room* room, std::int64_t first) const {
    const int at = thread_ % kSide;
    for (int depth = thread_ / kSide; depth < kDepth; depth += kThreads / kSide) {
      if (first + depth >= update_.m) return;
      const double* point = update_.points + (first + depth) * update_.points_stride;
      room->rows[depth][at] = row_ + at < update_.k ? point[row_ + at] : 0;
      room->columns[depth][at] = column_ + at < update_.k ? point[column_ + at] : 0;
    }
  }

  // Adds the products of the points in the room to the thread's sums.
  ACTIVEDPO_HOST_DEVICE void add(Numbers* sums, const Room& room, std::int64_t first) const {
    const int x = thread_ % 16, y = thread_ / 16;
    const auto left = update_.m - first;
    const int depths = left < kDepth ? static_cast<int>(left) : kDepth;
    for (int depth = 0; depth < depths; ++depth) {
      double row[4], column[4];
      for (int i = 0; i < 4; ++i) row[i] = room.rows[depth][4 * y + i];
      for (int j = 0; j < 4; ++j) column[j] = room.columns[depth][x + 16 * j];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) sums->at[i][j] += row[i] * column[j];
      }
    }
  }

 private:
  static constexpr int kSide = 64;

  // Calls f(i, j, address) for the thread's numbers on and below the diagonal.
  template <typename F>
  ACTIVEDPO_HOST_DEVICE void each(const F& f) const {
    const int x = thread_ % 16, y = thread_ / 16;
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = row_ + 4 * y + i;
      for (int j = 0; j < 4; ++j) {
        const std::int64_t column = column_ + x + 16 * j;
        if (row < update_.k && column <= row) f(i, j, update_.v + row * update_.v_stride + column);
      }
    }
  }

  const RankUpdate& update_;
  int thread_;
  std::int64_t row_, column_;  // first row and column of the tile
};

}  // namespace activedpo
