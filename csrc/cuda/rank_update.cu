// Rank update of a symmetric matrix, on and below its diagonal: each number of V is read and
// written once.
#include "cuda/rank_update.h"

#include "cuda/errors.h"
#include "cuda/launch.h"

namespace activedpo {

namespace {

constexpr int kTilesAtOnce = 2;  // per multiprocessor: as many as its registers allow

__global__ void __launch_bounds__(RankTile::kThreads, kTilesAtOnce)
    rank_update_kernel(const RankUpdate update) {
  __shared__ RankTile::Room room;
  const RankTile tile(update, blockIdx.x, static_cast<int>(threadIdx.x));
  const RankTile::Numbers old = tile.read();
  RankTile::Numbers sums{};
  for (std::int64_t first = 0; first < update.m; first += RankTile::kDepth) {
    tile.fill(&room, first);
    __syncthreads();
    tile.add(&sums, room, first);
    __syncthreads();
  }
  tile.write(old, sums);
}

}  // namespace

void rank_update(const RankUpdate& update, const Target& target) {
  if (update.k == 0 || update.m == 0) return;
  const DeviceGuard guard(target.device);
  const auto tiles = static_cast<unsigned>(RankTile::count(update.k));
  rank_update_kernel<<<tiles, RankTile::kThreads, 0, target.stream>>>(update);
  check_launch("launch of rank_update");
}

}  // namespace activedpo
