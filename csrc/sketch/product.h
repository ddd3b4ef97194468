// Sums of outer products over tokens, a block at a time: the parts of a gradient.
#pragma once

#include <cstdint>

#include "common/numbers.h"

namespace activedpo {

constexpr int kProductTokens = 128;   // tokens packed at a time
constexpr int kProductNarrow = 64;    // largest block size in the shorter direction
constexpr int kProductWide = 256;     // and in the longer one

// Scratch size for the packed tokens of one block and its sums, in numbers; 64-byte aligned.
constexpr std::int64_t kProductScratch =
    kProductTokens * (kProductNarrow + kProductWide) + kProductNarrow * kProductWide;

// block[a * width + b] += sum over t < tokens of left[t * left_stride + a] right[t * right_stride + b]
// for a < height and b < width. The shorter of the two is at most kProductNarrow and the longer at
// most kProductWide. The order of additions depends only on these sizes.
template <typename T>
void add_product(typename Sum<T>::Type* block, const T* left, std::int64_t left_stride,
                 std::int64_t height, const T* right, std::int64_t right_stride,
                 std::int64_t width, std::int64_t tokens, typename Sum<T>::Type* scratch);

}  // namespace activedpo
