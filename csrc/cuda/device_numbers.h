// How code for both processors reads and multiplies numbers on a GPU (see greedy/problem.h).
#pragma once

#include <cuda_fp16.h>

#include "common/four.h"
#include "common/numbers.h"

namespace activedpo {

struct DeviceNumbers {
  // Rows are always in global memory, which the compiler does not see.
  template <typename T>
  __device__ static Four<T> four(const T* address) {
    __builtin_assume(__isGlobal(address));
    return *reinterpret_cast<const Four<T>*>(address);
  }
  __device__ static double product(double x, double y) { return __dmul_rn(x, y); }
  __device__ static float widen(float x) { return x; }
  __device__ static double widen(double x) { return x; }
  __device__ static float widen(BFloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
  }
  __device__ static float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
};

}  // namespace activedpo
