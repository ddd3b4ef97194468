// Marks functions that are used in GPU kernels and that the regular tests run on the CPU.
#pragma once

#ifdef __CUDACC__
#define ACTIVEDPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ACTIVEDPO_HOST_DEVICE inline
#endif

// Arrays whose loops are unrolled stay in a GPU's registers.
#ifdef __CUDACC__
#define ACTIVEDPO_UNROLL _Pragma("unroll")
#define ACTIVEDPO_UNROLL_8 _Pragma("unroll 8")
#else
#define ACTIVEDPO_UNROLL
#define ACTIVEDPO_UNROLL_8
#endif
