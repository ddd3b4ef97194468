// The GPU's rank_update on the CPU, for the tests: tiles and threads one after another.
#include "cuda/rank_update.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/parts.h"

namespace py = pybind11;

namespace activedpo {

namespace {

void run_tile(const RankUpdate& update, std::int64_t tile) {
  const auto room = std::make_unique<RankTile::Room>();
  std::vector<RankTile::Numbers> old, sums(RankTile::kThreads, RankTile::Numbers{});
  std::vector<RankTile> threads;
  for (int thread = 0; thread < RankTile::kThreads; ++thread) {
    threads.emplace_back(update, tile, thread);
    old.push_back(threads.back().read());
  }
  // Each loop over threads ends at a barrier of the GPU's threads.
  for (std::int64_t first = 0; first < update.m; first += RankTile::kDepth) {
    for (const auto& thread : threads) thread.fill(room.get(), first);
    for (int i = 0; i < RankTile::kThreads; ++i) threads[i].add(&sums[i], *room, first);
  }
  for (int i = 0; i < RankTile::kThreads; ++i) threads[i].write(old[i], sums[i]);
}

}  // namespace

void bind_rank_update(py::module_& module) {
  module.def(
      "rank_update",
      [](std::uintptr_t v, std::int64_t v_stride, std::uintptr_t points,
         std::int64_t points_stride, std::int64_t k, std::int64_t m, double alpha) {
        const RankUpdate update{reinterpret_cast<double*>(v), v_stride,
                                reinterpret_cast<const double*>(points), points_stride,
                                k, m, alpha};
        for (std::int64_t tile = 0; tile < RankTile::count(k); ++tile) run_tile(update, tile);
      },
      "The arithmetic of activedpo_fast._cuda.rank_update.",
      py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("v"), py::arg("v_stride"),
      py::arg("points"), py::arg("points_stride"), py::arg("k"), py::arg("m"), py::arg("alpha"));
}

}  // namespace activedpo
