// Launches of the operations on a GPU: on the given stream, without waiting for it. They throw as
// in errors.h.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/pair_norms.h"
#include "cuda/rank_update.h"

namespace activedpo {

struct Target {
  int device;
  cudaStream_t stream;  // of that device
};

// T: float, double, BFloat16 or Half.
template <typename T>
void pair_norms(const PairNorms& given, const Target& target);  // pair_norms.cu
void rank_update(const RankUpdate& update, const Target& target);  // rank_update.cu

}  // namespace activedpo
