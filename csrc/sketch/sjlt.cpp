#include "sketch/sjlt.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/philox.h"

namespace activedpo {

namespace {

constexpr int kLanes = 16;  // Philox blocks at a time
constexpr std::int64_t kWords = 4 * kLanes;
// Positions whose bits are drawn at a time; their signs are one group of blocks.
constexpr std::int64_t kGroup = 32 * kWords;
// Numbers per bucket, on average, summed in float32 before they are added to float64 sums: half
// the memory traffic, and rounding does not grow with the length of the row.
constexpr std::int64_t kShort = 32;

// words[i] = word i mod 4 of block i / 4, for kWords words from `first`, a multiple of 4.
ACTIVEDPO_INLINE void draw_words(std::uint32_t* target, std::int64_t first, std::uint32_t stream,
                                 std::uint64_t key) {
  std::uint32_t words[4][kLanes];
  philox_blocks<kLanes>(words, static_cast<std::uint64_t>(first) / 4, 0, stream, key);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int w = 0; w < 4; ++w) target[4 * lane + w] = words[w][lane];
  }
}

ACTIVEDPO_CLONES
void draw_group(std::uint32_t* buckets, std::uint32_t* signs, std::int64_t first, std::int64_t run,
                std::int64_t k, std::uint32_t stream, std::uint64_t key) {
  draw_words(signs, first / 32, stream + kSignStreams, key);
  for (std::int64_t r = 0; r < kGroup / run; r += kWords) {
    draw_words(buckets + r, first / run + r, stream, key);
    for (std::int64_t i = r; i < r + kWords; ++i) {
      const std::uint64_t scaled = std::uint64_t{buckets[i]} * static_cast<std::uint64_t>(k);
      buckets[i] = static_cast<std::uint32_t>(scaled >> 32);
    }
  }
}

ACTIVEDPO_INLINE float with_sign(float x, std::uint32_t negative) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits ^= negative << 31;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
ACTIVEDPO_INLINE double with_sign(double x, std::uint32_t negative) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits ^= static_cast<std::uint64_t>(negative) << 63;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Adds a whole run of 16: target[(bucket & 15) ^ l] += sign(l) x[l]. target is the first of the 16
// buckets that include `bucket`; bit first + l of `signs` is set if sign(l) is negative.
template <class Set, typename A, typename T>
ACTIVEDPO_INLINE void add_run(A* target, const T* x, std::uint32_t bucket, std::uint32_t signs,
                              std::uint32_t first) {
  if constexpr (Set::bytes < 32 || sizeof(T) != sizeof(float)) {
    for (std::uint32_t l = 0; l < kSjltRun; ++l) {
      target[(bucket & 15u) ^ l] += with_sign(x[l], signs >> (first + l) & 1u);
    }
  } else {
    typedef std::uint32_t Bits __attribute__((vector_size(32)));
    // Aligned only like a single number: `x` may be one of the caller's rows.
    typedef Bits Input __attribute__((aligned(4), may_alias));
    constexpr int width = std::min<int>(8, Set::bytes / sizeof(A));
    typedef float Floats __attribute__((vector_size(4 * width)));
    typedef A Sums __attribute__((vector_size(width * sizeof(A)), aligned(sizeof(A)), may_alias));
    const Bits lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    const Bits from = lanes ^ (bucket & 7u);
    for (std::uint32_t half = 0; half < 2; ++half) {
      const Bits flips = ((signs + Bits{}) << (31 - first - 8 * half - lanes)) & 0x80000000u;
      const Bits flipped = *reinterpret_cast<const Input*>(x + 8 * half) ^ flips;
#if defined(__clang__)  // Clang has no shuffle by a variable
      Bits moved;
      for (int l = 0; l < 8; ++l) moved[l] = flipped[from[l]];
#else
      const Bits moved = __builtin_shuffle(flipped, from);
#endif
      Floats part[8 / width];
      std::memcpy(part, &moved, sizeof moved);
      A* const eight = target + ((8 * half) ^ (bucket & 8u));
      for (int p = 0; p < 8 / width; ++p) {
        *reinterpret_cast<Sums*>(eight + p * width) += __builtin_convertvector(part[p], Sums);
      }
    }
  }
}

// Adds the two runs of each of `words` sign words.
template <class Set, typename A, typename T>
ACTIVEDPO_INLINE void add_two_runs(A* sums, const T* x, const std::uint32_t* buckets,
                                   const std::uint32_t* signs, std::size_t words) {
  for (std::size_t w = 0; w < words; ++w) {
    const std::uint32_t one = buckets[2 * w], two = buckets[2 * w + 1];
    add_run<Set>(sums + (one & ~15u), x + 32 * w, one, signs[w], 0);
    add_run<Set>(sums + (two & ~15u), x + 32 * w + kSjltRun, two, signs[w], kSjltRun);
  }
}

#define ACTIVEDPO_ADD_RUNS(A, T)                                                                  \
  ACTIVEDPO_VERSIONS(void add_runs(A* sums, const T* x, const std::uint32_t* buckets,             \
                                   const std::uint32_t* signs, std::size_t words),                \
                     add_two_runs<Set>(sums, x, buckets, signs, words);)
ACTIVEDPO_ADD_RUNS(float, float)
ACTIVEDPO_ADD_RUNS(double, float)
ACTIVEDPO_ADD_RUNS(double, double)
#undef ACTIVEDPO_ADD_RUNS

}  // namespace

SjltHash::SjltHash(std::int64_t k, std::uint32_t stream, std::uint64_t key)
    : k_(k), run_(std::gcd(k, kSjltRun)), stream_(stream), key_(key) {}

void SjltHash::draw(std::int64_t begin, std::int64_t end, int num_threads) {
  first_ = begin / kGroup * kGroup;
  const std::int64_t groups = (end - first_ + kGroup - 1) / kGroup;
  buckets_.resize(static_cast<std::size_t>(groups * kGroup / run_));
  signs_.resize(static_cast<std::size_t>(groups * kWords));
#pragma omp parallel for schedule(static) num_threads(num_threads) if (groups * kGroup / run_ > 4096)
  for (std::int64_t g = 0; g < groups; ++g) {
    draw_group(buckets_.data() + g * kGroup / run_, signs_.data() + g * kWords,
               first_ + g * kGroup, run_, k_, stream_, key_);
  }
}

template <typename A, typename T>
void SjltHash::add(A* sums, const T* x, std::int64_t position, std::int64_t count) const {
  const std::int64_t end = position + count;
  std::int64_t p = position;
  const auto one_by_one = [&](std::int64_t until) {
    for (; p < until; ++p) sums[bucket(p)] += with_sign(x[p - position], negative(p));
  };
  if (run_ == kSjltRun) {
    one_by_one(std::min(end, (p + 31) / 32 * 32));
    const std::int64_t words = (end - p) / 32;
    add_runs(sums, x + (p - position), buckets_.data() + (p - first_) / kSjltRun,
             signs_.data() + (p - first_) / 32, static_cast<std::size_t>(words));
    p += 32 * words;
  }
  one_by_one(end);
}

template void SjltHash::add(float*, const float*, std::int64_t, std::int64_t) const;
template void SjltHash::add(double*, const float*, std::int64_t, std::int64_t) const;
template void SjltHash::add(double*, const double*, std::int64_t, std::int64_t) const;

template <typename T>
void sjlt(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
          std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads) {
  if (n == 0 || length == 0) return;
  const std::int64_t slab = std::min(length, kSjltPositions);
  const std::int64_t parts = sjlt_parts(n, slab, k);
  Scratch<double> total(n, k);
  for (std::int64_t row = 0; row < n; ++row) std::fill(total.of(row), total.of(row) + k, 0.0);
  Scratch<double> scratch(parts > 1 ? n * parts : 0, k);
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, n * parts));
  Scratch<T> sums_of(threads, k);
  SjltHash hash(k, kSjltStream, key);
  for (std::int64_t begin = 0; begin < length; begin += slab) {
    const std::int64_t end = std::min(begin + slab, length);
    hash.draw(begin, end, num_threads);
    const std::int64_t step = ((end - begin + parts - 1) / parts + 31) / 32 * 32;
    sjlt_sum_parts(
        n, parts, k, scratch, threads, [&](std::int64_t row) { return total.of(row); },
        [&](std::int64_t row, std::int64_t part, double* target) {
          const std::int64_t until = std::min(begin + (part + 1) * step, end);
          T* sums = sums_of.of(thread_number());
          for (std::int64_t p = begin + part * step; p < until; p += kShort * k) {
            std::fill(sums, sums + k, T(0));
            hash.add(sums, x + row * x_stride + p, p, std::min(kShort * k, until - p));
            for (std::int64_t j = 0; j < k; ++j) target[j] += static_cast<double>(sums[j]);
          }
        });
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const double* sums = total.of(i);
    for (std::int64_t j = 0; j < k; ++j) out[i * out_stride + j] += static_cast<T>(sums[j]);
  }
}

template void sjlt<float>(float*, std::int64_t, const float*, std::int64_t, std::int64_t,
                          std::int64_t, std::int64_t, std::uint64_t, int);
template void sjlt<double>(double*, std::int64_t, const double*, std::int64_t, std::int64_t,
                           std::int64_t, std::int64_t, std::uint64_t, int);

}  // namespace activedpo
