#include "sjlt.h"

#include <algorithm>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "philox.h"

namespace activedpo {

constexpr int kLanes = kSjltGroup / 4;  // Philox blocks at a time; each serves four positions
constexpr std::int64_t kChunk = 64 * kSjltGroup;  // positions whose codes are kept (16 KiB)

ACTIVEDPO_CLONES
void sjlt_codes(std::uint32_t* codes, std::uint64_t first, std::int64_t count, std::uint32_t k,
                std::uint32_t stream, std::uint64_t key) {
  for (std::int64_t p = 0; p < count; p += kSjltGroup) {
    std::uint32_t words[4][kLanes];
    philox_blocks<kLanes>(words, (first + static_cast<std::uint64_t>(p)) / 4, 0, stream, key);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int w = 0; w < 4; ++w) {
        const std::uint32_t word = words[w][lane];
        const std::uint64_t bucket = (static_cast<std::uint64_t>(word >> 1) * k) >> 31;
        codes[p + 4 * lane + w] = static_cast<std::uint32_t>(bucket << 1) | (word & 1u);
      }
    }
  }
}

// Positions are cut into segments whose length depends on k alone. A segment is summed in position
// order by one thread, and the segments are added in order, all in float64: the same additions
// whatever the number of threads.
template <typename T>
void sjlt(T* out, std::int64_t out_stride, const T* x, std::int64_t x_stride, std::int64_t n,
          std::int64_t length, std::int64_t k, std::uint64_t key, int num_threads) {
  if (n == 0 || length == 0) return;
  // Adding a segment's sums up costs k operations a row; 8 k positions make that small.
  const std::int64_t segment = std::max<std::int64_t>(16, (8 * k + kChunk - 1) / kChunk) * kChunk;
  const std::int64_t segments = (length + segment - 1) / segment;
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, segments));
  const std::int64_t size = n * k;
  // All memory is taken here: an exception must not leave the parallel region.
  std::vector<double> scratch(static_cast<std::size_t>(threads * size));
  std::vector<double> total(static_cast<std::size_t>(size), 0.0);

#pragma omp parallel for ordered schedule(static, 1) num_threads(threads)
  for (std::int64_t s = 0; s < segments; ++s) {
#ifdef _OPENMP
    double* sums = scratch.data() + omp_get_thread_num() * size;
#else
    double* sums = scratch.data();
#endif
    std::fill(sums, sums + size, 0.0);
    alignas(64) std::uint32_t codes[kChunk];
    const std::int64_t end = std::min(length, (s + 1) * segment);
    for (std::int64_t p = s * segment; p < end; p += kChunk) {
      sjlt_codes(codes, static_cast<std::uint64_t>(p), kChunk, static_cast<std::uint32_t>(k),
                 kSjltStream, key);
      for (std::int64_t i = 0; i < n; ++i) {
        sjlt_scatter(sums + i * k, x + i * x_stride + p, codes, std::min(kChunk, end - p));
      }
    }
#pragma omp ordered
    for (std::int64_t j = 0; j < size; ++j) total[j] += sums[j];
  }

  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < k; ++j) out[i * out_stride + j] += static_cast<T>(total[i * k + j]);
  }
}

template void sjlt<float>(float*, std::int64_t, const float*, std::int64_t, std::int64_t,
                          std::int64_t, std::int64_t, std::uint64_t, int);
template void sjlt<double>(double*, std::int64_t, const double*, std::int64_t, std::int64_t,
                           std::int64_t, std::int64_t, std::uint64_t, int);

}  // namespace activedpo
