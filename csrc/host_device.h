// Functions that GPU kernels are made of and that the ordinary suite runs on the CPU.
#pragma once

#ifdef __CUDACC__
#define ACTIVEDPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ACTIVEDPO_HOST_DEVICE inline
#endif
