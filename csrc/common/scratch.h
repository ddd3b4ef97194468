// Scratch memory for threads.
#pragma once

#include <cstdint>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace activedpo {

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// 64-byte aligned memory for every thread, allocated before threads start: an exception must not
// leave a parallel region. It is uninitialized: clearing it would take longer than the work of many
// calls.
template <typename T>
class Scratch {
 public:
  Scratch(std::int64_t threads, std::int64_t size)
      : size_((size + kLine - 1) / kLine * kLine),
        data_(new T[static_cast<std::size_t>(threads * size_ + kLine)]) {
    const auto address = reinterpret_cast<std::uintptr_t>(data_.get());
    first_ = data_.get() + (64 - address % 64) % 64 / sizeof(T);
  }
  T* of(std::int64_t thread) { return first_ + thread * size_; }

 private:
  static constexpr std::int64_t kLine = 64 / sizeof(T);
  std::int64_t size_;
  std::unique_ptr<T[]> data_;
  T* first_;
};

}  // namespace activedpo
