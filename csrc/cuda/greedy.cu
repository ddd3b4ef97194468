// The GPU grid for greedy/: its groups are warps, and all blocks are resident.
#include "cuda/greedy.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <stdexcept>

// GreedySelect is compiled for the GPU only here, with a grid that only the GPU has.
#pragma nv_diag_suppress 20011, 20012, 20014
#include "cuda/device_numbers.h"
#include "cuda/errors.h"
#include "greedy/select.h"

namespace activedpo {

namespace {

constexpr int kThreads = 256;
// Per multiprocessor: more blocks hide more memory latency, but blocks wait for each other.
constexpr int kBlocksAtOnce = 2;

class DeviceGrid : public DeviceNumbers {
 public:
  static constexpr int kLanes = 32;
  static constexpr int kGroups = kThreads / kLanes;
  using Shared = GreedyShared<kGroups>;

  __device__ explicit DeviceGrid(Shared* shared)
      : shared_(shared), all_(cooperative_groups::this_grid()) {}

  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ int group() const { return static_cast<int>(threadIdx.x) / kLanes; }
  __device__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ int blocks() const { return static_cast<int>(gridDim.x); }

  __device__ void barrier() { all_.sync(); }
  __device__ void block_barrier() { __syncthreads(); }

  __device__ double sum(double x) const {
    for (int apart = kLanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(kAll, x, apart);
    return x;
  }
  __device__ double max(double x) const {
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      x = fmax(x, __shfl_xor_sync(kAll, x, apart));
    }
    return x;
  }
  // In each step, lanes in pairs exchange the halves of the sums that the other one goes on with.
  template <typename S, int n>
  __device__ void sums(const S (&x)[n], double (&own)[n / kLanes]) const {
    double parts[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      parts[i] = folded(x[i], x[i + n / 2], (lane() & (kLanes / 2)) != 0, kLanes / 2);
    }
#pragma unroll
    for (int half = n / 4, apart = kLanes / 4; apart > 0; half /= 2, apart /= 2) {
      const bool upper = (lane() & apart) != 0;
#pragma unroll
      for (int i = 0; i < n / 4; ++i) {
        if (i < half) parts[i] = folded(parts[i], parts[i + half], upper, apart);
      }
    }
#pragma unroll
    for (int i = 0; i < n / kLanes; ++i) own[i] = parts[i];
  }
  __device__ double from(double x, int lane) const { return __shfl_sync(kAll, x, lane); }

  __device__ std::int32_t add(std::int32_t* counter, std::int32_t n) {
    return atomicAdd(counter, n);
  }
  __device__ Shared& shared() { return *shared_; }

 private:
  static constexpr unsigned kAll = 0xffffffffu;

  // This lane's half of two sums: the lower or the upper one, with the other lane's part.
  template <typename S>
  __device__ static double folded(S lower, S upper, bool take_upper, int apart) {
    const S other = __shfl_xor_sync(kAll, take_upper ? lower : upper, apart);
    return static_cast<double>(take_upper ? upper : lower) + static_cast<double>(other);
  }

  Shared* shared_;
  cooperative_groups::grid_group all_;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    greedy_kernel(const __grid_constant__ GreedyProblem problem,
                  const __grid_constant__ GreedyRoom<typename Sum<T>::Type> room,
                  std::int64_t begin, std::int64_t end) {
  using Room = GreedyRoom<typename Sum<T>::Type>;
  __shared__ DeviceGrid::Shared shared;
  // Every barrier empties the cache of the multiprocessor, where each phase would look for these.
  __shared__ GreedyProblem near_problem;
  __shared__ Room near_room;
  if (threadIdx.x == 0) {
    near_problem = problem;
    near_room = room;
  }
  __syncthreads();
  DeviceGrid grid(&shared);
  GreedySelect<T, DeviceGrid>(grid, near_problem, near_room).run(begin, end);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

template <typename T>
void greedy_select(const GreedyProblem& problem, char* memory, std::int64_t begin,
                   std::int64_t end, const Target& target) {
  const DeviceGuard guard(target.device);
  if (attribute(cudaDevAttrCooperativeLaunch, target.device) == 0) {
    throw std::runtime_error("the GPU has no cooperative launch, which greedy_select needs");
  }
  int fit = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, greedy_kernel<T>, kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int at_once = std::min(fit, kBlocksAtOnce) *
                      attribute(cudaDevAttrMultiProcessorCount, target.device);
  const int blocks = std::min(at_once, kGreedyMaxBlocks);
  if (blocks == 0) throw std::runtime_error("the GPU has no room for a block of greedy_select");

  GreedyRoom<typename Sum<T>::Type> room{};
  room.lay_out(problem, memory);
  void* arguments[] = {const_cast<GreedyProblem*>(&problem), &room, &begin, &end};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&greedy_kernel<T>),
                                    dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                                    0, target.stream),
        "launch of greedy_select");
  check_launch("launch of greedy_select");
}

template void greedy_select<float>(const GreedyProblem&, char*, std::int64_t, std::int64_t,
                                   const Target&);
template void greedy_select<double>(const GreedyProblem&, char*, std::int64_t, std::int64_t,
                                   const Target&);
template void greedy_select<BFloat16>(const GreedyProblem&, char*, std::int64_t, std::int64_t,
                                   const Target&);
template void greedy_select<Half>(const GreedyProblem&, char*, std::int64_t, std::int64_t,
                                   const Target&);

}  // namespace activedpo
