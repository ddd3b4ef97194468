// Norms of rows and of their pairs' differences: a warp for each.
#include <algorithm>
#include <cstdint>

// LaneNorms is compiled for the GPU only here, with numbers that only the GPU has.
#pragma nv_diag_suppress 20011, 20012, 20014
#include "cuda/device_numbers.h"
#include "cuda/errors.h"
#include "cuda/launch.h"
#include "cuda/pair_norms.h"

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
__global__ void __launch_bounds__(32 * kWarps) norms_kernel(const PairNorms given) {
  each(2 * given.n_pairs, [&](std::int64_t at, int lane) {
    const std::int64_t row = given.pairs[at];
    write_root(given.row_norm + row, LaneNorms<T, DeviceNumbers>(given, lane).of_row(row), lane);
  });
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) differences_kernel(const PairNorms given) {
  each(given.n_pairs, [&](std::int64_t pair, int lane) {
    write_root(given.pair_norm + pair, LaneNorms<T, DeviceNumbers>(given, lane).of_pair(pair),
               lane);
  });
}

unsigned blocks(std::int64_t units) {
  return static_cast<unsigned>(std::min((units + kWarps - 1) / kWarps, kMostBlocks));
}

}  // namespace

template <typename T>
void pair_norms(const PairNorms& given, const Target& target) {
  if (given.n_pairs == 0) return;
  const DeviceGuard guard(target.device);
  norms_kernel<T><<<blocks(2 * given.n_pairs), 32 * kWarps, 0, target.stream>>>(given);
  check_launch("launch of pair_norms");
  differences_kernel<T><<<blocks(given.n_pairs), 32 * kWarps, 0, target.stream>>>(given);
  check_launch("launch of pair_norms");
}

template void pair_norms<float>(const PairNorms&, const Target&);
template void pair_norms<double>(const PairNorms&, const Target&);
template void pair_norms<BFloat16>(const PairNorms&, const Target&);
template void pair_norms<Half>(const PairNorms&, const Target&);

}  // namespace activedpo
