// Marks functions that are used in GPU kernels and that the regular tests run on the CPU.
#pragma once

#ifdef __CUDACC__
#define ACTIVEDPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ACTIVEDPO_HOST_DEVICE inline
#endif
