// Rows read four numbers at a time, by one load where they are aligned for it.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace activedpo {

template <typename T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T at[4];
};

// Reads n times four numbers of a row from j, j + step, ... on; numbers from `end` on are zero.
// `Numbers` has four(p), the four numbers at an aligned address.
template <class Numbers, int n, typename T>
ACTIVEDPO_HOST_DEVICE void read_fours(Four<T> (&to)[n], const T* row, std::int64_t j,
                                      std::int64_t step, std::int64_t end) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(row) % alignof(Four<T>) == 0;
  if (aligned && j + (n - 1) * step + 4 <= end) {
    ACTIVEDPO_UNROLL
    for (int a = 0; a < n; ++a) to[a] = Numbers::four(row + j + a * step);
    return;
  }
  ACTIVEDPO_UNROLL
  for (int a = 0; a < n; ++a) {
    ACTIVEDPO_UNROLL
    for (int q = 0; q < 4; ++q) {
      const std::int64_t at = j + a * step + q;
      to[a].at[q] = at < end ? row[at] : T{};
    }
  }
}

}  // namespace activedpo
