#include "scores/pair_norms.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/scratch.h"

namespace activedpo {

namespace {

constexpr int kLanes = 16;
constexpr std::int64_t kKept = 16;       // rows from files that a thread caches
constexpr std::int64_t kPairsAtATime = 64;

ACTIVEDPO_INLINE double lane_sum(const double (&lane)[kLanes]) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lane[i];
  return sum;
}

template <typename T>
ACTIVEDPO_INLINE double square_of(const T* x, std::int64_t k) {
  double lane[kLanes] = {};
  std::int64_t c = 0;
  for (; c + kLanes <= k; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const double value = static_cast<double>(widened(x[c + i]));
      lane[i] += value * value;
    }
  }
  for (int i = 0; c + i < k; ++i) {
    const double value = static_cast<double>(widened(x[c + i]));
    lane[i] += value * value;
  }
  return lane_sum(lane);
}

// Divide, do not multiply by reciprocals: a fused multiply-subtract of equal rows is not zero.
template <bool Divide, typename T>
ACTIVEDPO_INLINE double square_of_difference(const T* x, double x_divisor, const T* y,
                                             double y_divisor, std::int64_t k) {
  double lane[kLanes] = {};
  const auto add = [&](std::int64_t c, int i) {
    double a = static_cast<double>(widened(x[c + i])), b = static_cast<double>(widened(y[c + i]));
    if (Divide) {
      a /= x_divisor;
      b /= y_divisor;
    }
    const double difference = a - b;
    lane[i] += difference * difference;
  };
  std::int64_t c = 0;
  for (; c + kLanes <= k; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) add(c, i);
  }
  for (int i = 0; c + i < k; ++i) add(c, i);
  return lane_sum(lane);
}

#define ACTIVEDPO_SQUARES(T)                                                                      \
  ACTIVEDPO_CLONES double square(const T* x, std::int64_t k) { return square_of(x, k); }          \
  ACTIVEDPO_CLONES double square_between(const T* x, double x_divisor, const T* y,                \
                                         double y_divisor, std::int64_t k) {                      \
    return x_divisor == 1 && y_divisor == 1                                                       \
               ? square_of_difference<false>(x, x_divisor, y, y_divisor, k)                       \
               : square_of_difference<true>(x, x_divisor, y, y_divisor, k);                       \
  }
ACTIVEDPO_SQUARES(float)
ACTIVEDPO_SQUARES(double)
ACTIVEDPO_SQUARES(BFloat16)
ACTIVEDPO_SQUARES(Half)
#undef ACTIVEDPO_SQUARES

// The rows that a thread read last, with their norms.
template <typename T>
class Reader {
 public:
  Reader(const RowSource& rows, std::int64_t k, char* room) : rows_(rows), k_(k), room_(room) {
    std::fill(kept_, kept_ + kKept + 1, -1);
  }
  struct Row {
    const T* numbers;
    double norm;
  };
  // Numbers are null if the row could not be read. They stay valid until another row is read into
  // their place; the place of row `beside` is not reused.
  Row operator()(std::int64_t row, std::int64_t beside = -1) {
    if (row == beside) return known_[row % kKept];
    const bool taken = beside >= 0 && row % kKept == beside % kKept;
    const std::int64_t slot = taken ? kKept : row % kKept;
    if (kept_[slot] != row) {
      const char* got = rows_.get(row, room_ + slot * rows_.row_bytes);
      if (got == nullptr) return {nullptr, 0};
      const T* numbers = reinterpret_cast<const T*>(got);
      kept_[slot] = row;
      known_[slot] = {numbers, std::sqrt(square(numbers, k_))};
    }
    return known_[slot];
  }

 private:
  const RowSource& rows_;
  std::int64_t k_;
  char* room_;
  std::int64_t kept_[kKept + 1];
  Row known_[kKept + 1];
};

}  // namespace

template <typename T>
std::int64_t pair_norms(double* row_norm, double* pair_norm, const RowSource& rows,
                        std::int64_t k, const std::int64_t* pairs, std::int64_t n_pairs,
                        bool by_row, int num_threads) {
  std::atomic<std::int64_t> unread{-1};
  const std::int64_t blocks = (n_pairs + kPairsAtATime - 1) / kPairsAtATime;
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, std::max<std::int64_t>(
      blocks, 1)));
  Scratch<char> room(threads, rows.in_memory() ? 0 : (kKept + 1) * rows.row_bytes);

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t block = 0; block < blocks; ++block) {
    Reader<T> read(rows, k, room.of(thread_number()));
    const std::int64_t end = std::min(n_pairs, (block + 1) * kPairsAtATime);
    for (std::int64_t i = block * kPairsAtATime; i < end && unread < 0; ++i) {
      const std::int64_t a = pairs[2 * i], b = pairs[2 * i + 1];
      const auto first = read(a);
      const auto second = first.numbers == nullptr ? first : read(b, a);
      if (second.numbers == nullptr) {
        unread = first.numbers == nullptr ? a : b;
        break;
      }
      // Threads that share a row write the same value.
      row_norm[a] = first.norm;
      row_norm[b] = second.norm;
      pair_norm[i] = std::sqrt(square_between(
          first.numbers, by_row && first.norm > 0 ? first.norm : 1.0, second.numbers,
          by_row && second.norm > 0 ? second.norm : 1.0, k));
    }
  }
  return unread;
}

#define ACTIVEDPO_PAIR_NORMS(T)                                                                   \
  template std::int64_t pair_norms<T>(double*, double*, const RowSource&, std::int64_t,           \
                                      const std::int64_t*, std::int64_t, bool, int);
ACTIVEDPO_PAIR_NORMS(float)
ACTIVEDPO_PAIR_NORMS(double)
ACTIVEDPO_PAIR_NORMS(BFloat16)
ACTIVEDPO_PAIR_NORMS(Half)
#undef ACTIVEDPO_PAIR_NORMS

}  // namespace activedpo
