// Norms of rows and lengths of pairs: a warp for each.
#include <algorithm>
#include <cstdint>

// LaneLengths is compiled for the GPU only here, with numbers that only the GPU has.
#pragma nv_diag_suppress 20011, 20012, 20014
#include "../pair_lengths.h"
#include "device_numbers.h"
#include "errors.h"
#include "launch.h"

namespace activedpo {

namespace {

constexpr int kWarps = 8;  // of a block
constexpr std::int64_t kMostBlocks = 1 << 20;

// Calls use(unit, lane) for the warp's share of `units`.
template <typename Use>
__device__ void each(std::int64_t units, const Use& use) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t warps = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t unit = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; unit < units;
       unit += warps) {
    use(unit, lane);
  }
}

__device__ void write_root(double* to, double part, int lane) {
  for (int apart = 16; apart > 0; apart /= 2) part += __shfl_xor_sync(0xffffffffu, part, apart);
  if (lane == 0) *to = sqrt(part);
}

// Warps that share a row write the same number.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) norms_kernel(const PairLengths given) {
  each(2 * given.n_pairs, [&](std::int64_t at, int lane) {
    const std::int64_t row = given.pairs[at];
    write_root(given.row_norm + row, LaneLengths<T, DeviceNumbers>(given, lane).of_row(row), lane);
  });
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) lengths_kernel(const PairLengths given) {
  each(given.n_pairs, [&](std::int64_t pair, int lane) {
    write_root(given.pair_length + pair, LaneLengths<T, DeviceNumbers>(given, lane).of_pair(pair),
               lane);
  });
}

unsigned blocks(std::int64_t units) {
  return static_cast<unsigned>(std::min((units + kWarps - 1) / kWarps, kMostBlocks));
}

}  // namespace

template <typename T>
void pair_lengths(const PairLengths& given, const Target& target) {
  if (given.n_pairs == 0) return;
  const DeviceGuard guard(target.device);
  norms_kernel<T><<<blocks(2 * given.n_pairs), 32 * kWarps, 0, target.stream>>>(given);
  check_launch("launch of pair_lengths");
  lengths_kernel<T><<<blocks(given.n_pairs), 32 * kWarps, 0, target.stream>>>(given);
  check_launch("launch of pair_lengths");
}

template void pair_lengths<float>(const PairLengths&, const Target&);
template void pair_lengths<double>(const PairLengths&, const Target&);
template void pair_lengths<BFloat16>(const PairLengths&, const Target&);
template void pair_lengths<Half>(const PairLengths&, const Target&);

}  // namespace activedpo
