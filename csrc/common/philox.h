// Philox4x32-10, a counter-based random number generator: 128 random bits as a pure function of a
// 128-bit counter and a 64-bit key. J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel
// Random Numbers: As Easy as 1, 2, 3", SC 2011. activedpo_fast/ops/reference.py has the same function.
#pragma once

#include <cstdint>

#include "common/versions.h"

namespace activedpo {

// The last counter word distinguishes the uses, so that they never share bits.
constexpr std::uint32_t kSjltStream = 1;
constexpr std::uint32_t kRademacherStream = 2;
constexpr std::uint32_t kKroneckerLeftStream = 3;
constexpr std::uint32_t kKroneckerRightStream = 4;
constexpr std::uint32_t kSignStreams = 16;  // added to a hash's stream for its signs

// counter[w][lane] is word w of a lane's counter on entry, and word w of its random block on exit.
template <int Lanes>
ACTIVEDPO_INLINE void philox4x32(std::uint32_t (&counter)[4][Lanes], std::uint64_t key) {
  std::uint32_t key_lo = static_cast<std::uint32_t>(key);
  std::uint32_t key_hi = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < Lanes; ++lane) {
      const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0][lane];
      const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2][lane];
      counter[0][lane] = static_cast<std::uint32_t>(b >> 32) ^ counter[1][lane] ^ key_lo;
      counter[1][lane] = static_cast<std::uint32_t>(b);
      counter[2][lane] = static_cast<std::uint32_t>(a >> 32) ^ counter[3][lane] ^ key_hi;
      counter[3][lane] = static_cast<std::uint32_t>(a);
    }
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
}

// Blocks first, first + 1, ... of one stream.
template <int Lanes>
ACTIVEDPO_INLINE void philox_blocks(std::uint32_t (&words)[4][Lanes], std::uint64_t first,
                                    std::uint32_t column, std::uint32_t stream,
                                    std::uint64_t key) {
  for (int lane = 0; lane < Lanes; ++lane) {
    const std::uint64_t block = first + static_cast<std::uint64_t>(lane);
    words[0][lane] = static_cast<std::uint32_t>(block);
    words[1][lane] = static_cast<std::uint32_t>(block >> 32);
    words[2][lane] = column;
    words[3][lane] = stream;
  }
  philox4x32<Lanes>(words, key);
}

}  // namespace activedpo
