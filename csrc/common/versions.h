// One wheel serves every x86-64: marked functions are compiled for several instruction sets, and
// the loader picks one. Random bits and sketches of a ready gradient are the same on all of them
// (see sketch/rademacher.cpp). Products agree to rounding, because some sets fuse multiply-adds.
#pragma once

#define ACTIVEDPO_INLINE inline __attribute__((always_inline))

namespace activedpo {

// The size of vector registers in bytes, and how many there are. GCC keeps wider vectors in memory,
// at a twentieth of the speed, so blocks of registers are sized by this.
template <int Bytes, int Count>
struct Registers {
  static constexpr int bytes = Bytes, count = Count;
};

}  // namespace activedpo

// ACTIVEDPO_CLONES marks a function whose loops the compiler vectorizes. ACTIVEDPO_VERSIONS defines
// a function whose body has such blocks: in it, Set is the set's Registers.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define ACTIVEDPO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define ACTIVEDPO_VERSION(set, bytes, count, signature, ...) \
  __attribute__((target(set))) signature {                   \
    using Set = ::activedpo::Registers<bytes, count>;        \
    __VA_ARGS__                                              \
  }
#define ACTIVEDPO_VERSIONS(signature, ...)                         \
  ACTIVEDPO_VERSION("default", 16, 16, signature, __VA_ARGS__)     \
  ACTIVEDPO_VERSION("avx2,fma", 32, 16, signature, __VA_ARGS__)    \
  ACTIVEDPO_VERSION("avx512f", 64, 32, signature, __VA_ARGS__)
#else
#define ACTIVEDPO_CLONES
#if defined(__aarch64__)
#define ACTIVEDPO_REGISTER_COUNT 32
#else
#define ACTIVEDPO_REGISTER_COUNT 16
#endif
#define ACTIVEDPO_VERSIONS(signature, ...)                                   \
  signature {                                                                \
    using Set = ::activedpo::Registers<16, ACTIVEDPO_REGISTER_COUNT>;        \
    __VA_ARGS__                                                              \
  }
#endif
