#include "sketch/rademacher.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/philox.h"

namespace activedpo {

constexpr int kLanes = 16;
constexpr int kColumns = kRademacherColumns;
constexpr int kPositions = 32;  // a tile of signs (16 KiB in float32) stays in the L1 cache

template <typename T>
struct alignas(64) Tile {
  T sign[kPositions][kColumns];
};

static_assert(kPositions % kLanes == 0, "a tile is made of whole Philox batches");

// +1 if the bit is clear and -1 if it is set, written as bits: only the sign bit differs.
template <typename T>
struct One;
template <>
struct One<float> {
  using Bits = std::uint32_t;
  static constexpr Bits value = 0x3F800000u;
};
template <>
struct One<double> {
  using Bits = std::uint64_t;
  static constexpr Bits value = 0x3FF0000000000000u;
};

template <typename T>
ACTIVEDPO_INLINE void fill_signs(Tile<T>& tile, std::uint64_t first, std::uint32_t column_block,
                                 std::uint64_t key) {
  using Bits = typename One<T>::Bits;
  constexpr int top = 8 * sizeof(Bits) - 1;
  for (int p0 = 0; p0 < kPositions; p0 += kLanes) {
    std::uint32_t words[4][kLanes];
    philox_blocks<kLanes>(words, first + static_cast<std::uint64_t>(p0), column_block,
                          kRademacherStream, key);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int w = 0; w < 4; ++w) {
        const Bits word = words[w][lane];
        Bits bits[32];
        for (int b = 0; b < 32; ++b) bits[b] = ((word >> b) << top) | One<T>::value;
        std::memcpy(&tile.sign[p0 + lane][32 * w], bits, sizeof bits);
      }
    }
  }
}

// sums[i, c] += sum over the tile's positions of sign * x[i, p]. The inner sum, over at most 32
// positions, is in T and starts from zero; the outer sum is in float64: float32 rounding does not
// grow with the row's length. Products with a sign are exact, so fused multiply-adds do not matter.
template <int Rows, class Set, typename T>
ACTIVEDPO_INLINE void add_rows(double* sums, const Tile<T>& tile, const T* x, std::int64_t x_stride,
                               std::int64_t positions) {
  typedef T Vector __attribute__((vector_size(Set::bytes), may_alias));
  constexpr int width = Set::bytes / sizeof(T);
  for (int c = 0; c < kColumns; c += 4 * width) {
    Vector a[Rows][4] = {};
    for (std::int64_t p = 0; p < positions; ++p) {
      const Vector* sign = reinterpret_cast<const Vector*>(&tile.sign[p][c]);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const T value = x[r * x_stride + p];
        a[r][0] += value * sign[0];
        a[r][1] += value * sign[1];
        a[r][2] += value * sign[2];
        a[r][3] += value * sign[3];
      }
    }
    for (int r = 0; r < Rows; ++r) {
      const T* values = reinterpret_cast<const T*>(a[r]);
      double* target = sums + r * kColumns + c;
      for (int j = 0; j < 4 * width; ++j) target[j] += static_cast<double>(values[j]);
    }
  }
}

template <class Set, typename T>
ACTIVEDPO_INLINE void add_tile(double* sums, const Tile<T>& tile, const T* x, std::int64_t x_stride,
                               std::int64_t n, std::int64_t positions) {
  constexpr int rows = Set::count / 8;  // a block of registers is theirs; signs are loaded once
  std::int64_t i = 0;
  for (; i + rows <= n; i += rows) {
    add_rows<rows, Set>(sums + i * kColumns, tile, x + i * x_stride, x_stride, positions);
  }
  for (; i < n; ++i) {
    add_rows<1, Set>(sums + i * kColumns, tile, x + i * x_stride, x_stride, positions);
  }
}

#define ACTIVEDPO_PROJECT_COLUMNS(T)                                                              \
  ACTIVEDPO_VERSIONS(                                                                             \
      void project_columns(double* sums, const T* x, std::int64_t x_stride, std::int64_t n,       \
                           std::int64_t length, std::uint64_t first, std::uint32_t column_block,  \
                           std::uint64_t key),                                                    \
      Tile<T> tile;                                                                               \
      for (std::int64_t p = 0; p < length; p += kPositions) {                                     \
        fill_signs(tile, first + static_cast<std::uint64_t>(p), column_block, key);               \
        add_tile<Set>(sums, tile, x + p, x_stride, n,                                             \
                      std::min<std::int64_t>(kPositions, length - p));                            \
      })                                                                                          \
  template <>                                                                                     \
  void rademacher_columns<T>(double* sums, const T* x, std::int64_t x_stride, std::int64_t n,     \
                             std::int64_t length, std::uint64_t first,                            \
                             std::uint32_t column_block, std::uint64_t key) {                     \
    project_columns(sums, x, x_stride, n, length, first, column_block, key);                      \
  }
ACTIVEDPO_PROJECT_COLUMNS(float)
ACTIVEDPO_PROJECT_COLUMNS(double)
#undef ACTIVEDPO_PROJECT_COLUMNS

// One thread computes 128 columns of all rows: signs are generated once for the whole batch.
template <typename T>
void rademacher(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
                std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads) {
  if (n == 0 || length == 0) return;
  const std::int64_t column_blocks = (k + kColumns - 1) / kColumns;
  // Waking a thread pays off from a few million operations on.
  const double work = static_cast<double>(n) * static_cast<double>(length) * static_cast<double>(k);
  const int threads = static_cast<int>(std::min<double>(
      std::min<std::int64_t>(num_threads, column_blocks), 1.0 + work / (1 << 22)));
  const double scale = 1.0 / std::sqrt(static_cast<double>(k));
  const std::int64_t size = n * kColumns;
  std::vector<double> scratch(static_cast<std::size_t>(threads * size));

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t block = 0; block < column_blocks; ++block) {
#ifdef _OPENMP
    double* sums = scratch.data() + omp_get_thread_num() * size;
#else
    double* sums = scratch.data();
#endif
    std::fill(sums, sums + size, 0.0);
    project_columns(sums, x, x_stride, n, length, 0, static_cast<std::uint32_t>(block), key);
    const std::int64_t first = block * kColumns;
    const std::int64_t columns = std::min<std::int64_t>(kColumns, k - first);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        out[i * out_stride + first + j] += static_cast<T>(sums[i * kColumns + j] * scale);
      }
    }
  }
}

template void rademacher<float>(float*, std::int64_t, const float*, std::int64_t, std::int64_t,
                                std::int64_t, std::int64_t, std::uint64_t, int);
template void rademacher<double>(double*, std::int64_t, const double*, std::int64_t, std::int64_t,
                                 std::int64_t, std::int64_t, std::uint64_t, int);

}  // namespace activedpo
