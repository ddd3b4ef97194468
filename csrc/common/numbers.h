// Number types for storage and for computation.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/versions.h"

namespace activedpo {

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// The type that products of T are summed in.
template <typename T>
struct Sum {
  using Type = T;
};
template <>
struct Sum<BFloat16> {
  using Type = float;
};
template <>
struct Sum<Half> {
  using Type = float;
};

ACTIVEDPO_INLINE float widened(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
ACTIVEDPO_INLINE float widened(Half x) {
  // Move exponent and mantissa into place, then correct the exponent's bias by a multiplication,
  // which also normalizes subnormal numbers. Infinities and NaN get float's largest exponent.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  std::uint32_t bits = magnitude;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 5.192296858534828e+33f;  // 2^112
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
  bits |= static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
ACTIVEDPO_INLINE float widened(float x) { return x; }
ACTIVEDPO_INLINE double widened(double x) { return x; }

}  // namespace activedpo
