// The same on the CPU as cuda/device_numbers.h on a GPU, for the tests.
#pragma once

#include "common/four.h"
#include "common/numbers.h"

namespace activedpo {

struct HostNumbers {
  template <typename T>
  static Four<T> four(const T* address) {
    return *reinterpret_cast<const Four<T>*>(address);
  }
  static double product(double x, double y) { return x * y; }
  template <typename T>
  static typename Sum<T>::Type widen(T x) {
    return widened(x);
  }
};

}  // namespace activedpo
