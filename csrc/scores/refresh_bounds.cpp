#include "scores/refresh_bounds.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/scratch.h"
#include "scores/row_dot_products.h"

namespace activedpo {

namespace {

constexpr std::int64_t kSmallestBlock = 4;
// A candidate's bound is checked again after at least this many of its pending directions, or this
// part of them: often it does not need the others.
constexpr std::int64_t kSmallestStep = 64;
constexpr std::int64_t kStepPart = 2;
constexpr std::int64_t kSerialProducts = std::int64_t{1} << 19;  // multiplications for one thread
constexpr std::int64_t kProducts = std::int64_t{1} << 21;  // inner products kept at a time

struct Bound {
  double upper;
  std::int64_t candidate;
  bool operator<(const Bound& other) const { return upper < other.upper; }
};

template <typename T>
class BoundRefresh {
 public:
  using S = typename Sum<T>::Type;

  BoundRefresh(const RowSource& rows, std::int64_t k, const Candidates& candidates,
               const Directions& directions, const Memory& memory, int num_threads)
      : rows_(rows), k_(k), c_(candidates), d_(directions), m_(memory), threads_(num_threads),
        dots_room_(num_threads, kDotScratch),
        row_room_(num_threads, rows.in_memory() ? 0 : kDotRows * rows.row_bytes) {}

  // See refresh_bounds(); `unread` is set to the row that could not be read.
  std::int64_t run(std::int64_t* contenders, Memory* memory) {
    double best = -std::numeric_limits<double>::infinity(), top = 0;
    std::vector<std::int64_t> up_to_date;
    for (std::int64_t i = 0; i < c_.n; ++i) {
      if (!c_.left[i]) continue;
      if (c_.version[i] < d_.count) {
        top = std::max(top, upper(i));
      } else {
        best = std::max(best, lower(i));
        up_to_date.push_back(i);
      }
    }
    double cut = std::max(best, top * (1 - memory->margin));
    std::vector<Bound> heap = stale_above(cut);
    std::int64_t block = std::max(memory->block, kSmallestBlock);
    std::vector<double> bounds;  // of the advanced candidates, before they were advanced
    while (unread < 0) {
      if (heap.empty() || heap.front().upper < best) {
        if (cut <= best || cut <= 0) break;
        // No candidate above the cut is left: lower the cut.
        memory->margin = std::min(1.0, 2 * memory->margin);
        cut = std::max(best, cut * (1 - memory->margin));
        heap = stale_above(cut);
        continue;
      }
      std::vector<std::int64_t> batch;
      while (!heap.empty() && heap.front().upper >= best &&
             static_cast<std::int64_t>(batch.size()) < block) {
        batch.push_back(heap.front().candidate);
        bounds.push_back(heap.front().upper);
        std::pop_heap(heap.begin(), heap.end());
        heap.pop_back();
      }
      move_on(batch);
      for (const std::int64_t i : batch) {
        if (c_.version[i] == d_.count) {
          best = std::max(best, lower(i));
          up_to_date.push_back(i);
        } else {
          heap.push_back({upper(i), i});
          std::push_heap(heap.begin(), heap.end());
        }
      }
      block = std::max(block, static_cast<std::int64_t>(bounds.size()));
    }
    // Candidates that had to be advanced in any order: the next pick will be similar.
    const auto needed = std::count_if(bounds.begin(), bounds.end(),
                                      [best](double bound) { return bound >= best; });
    memory->block = (memory->block + needed) / 2;
    if (heap.size() > 4 * bounds.size() + 64) memory->margin /= 2;

    std::int64_t found = 0;
    for (const std::int64_t i : up_to_date) {
      if (upper(i) >= best) contenders[found++] = i;
    }
    std::sort(contenders, contenders + found);
    return found;
  }

  std::int64_t touched = 0;
  std::atomic<std::int64_t> unread{-1};

 private:
  double value(std::int64_t i, double score) const {
    return c_.inverse_cost == nullptr ? score : score * c_.inverse_cost[i];
  }
  double upper(std::int64_t i) const { return value(i, c_.score[i] + c_.error_bound[i]); }
  double lower(std::int64_t i) const { return value(i, c_.score[i] - c_.error_bound[i]); }

  std::vector<Bound> stale_above(double cut) {
    std::vector<Bound> heap;
    for (std::int64_t i = 0; i < c_.n; ++i) {
      if (!c_.left[i] || c_.version[i] == d_.count) continue;
      const double bound = upper(i);
      if (bound >= cut) heap.push_back({bound, i});
    }
    std::make_heap(heap.begin(), heap.end());
    return heap;
  }

  // Returns the direction up to which a candidate is advanced next.
  std::int64_t next_stop(std::int64_t i) const {
    const std::int64_t waiting = d_.count - c_.version[i];
    return c_.version[i] + std::min(waiting, std::max(kSmallestStep, waiting / kStepPart));
  }

  void move_on(const std::vector<std::int64_t>& batch) {
    // The more directions pairs have pending, the fewer pairs are processed at a time.
    std::size_t begin = 0;
    while (begin < batch.size() && unread < 0) {
      std::int32_t oldest = static_cast<std::int32_t>(d_.count);
      std::size_t end = begin;
      while (end < batch.size()) {
        oldest = std::min(oldest, c_.version[batch[end]]);
        const auto products = static_cast<std::int64_t>(2 * (end - begin + 1)) *
                              (d_.count - oldest);
        if (end > begin && products > kProducts) break;
        ++end;
      }
      apply(batch.data() + begin, static_cast<std::int64_t>(end - begin));
      begin = end;
    }
  }

  // A row whose products with directions [from, to) are needed.
  struct Task {
    std::int64_t row;
    std::int64_t from, to;
    std::int64_t start, end;  // the directions that its panel is multiplied with
    std::int64_t first;       // index of the product with `start` in products_
  };

  void apply(const std::int64_t* batch, std::int64_t count) {
    std::vector<Task> tasks = rows_of(batch, count);
    // Rows with about the same number of pending directions are multiplied together.
    std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
      return a.from != b.from ? a.from < b.from : a.row < b.row;
    });
    const auto n_tasks = static_cast<std::int64_t>(tasks.size());
    // Panels of equal size, the same number for each thread.
    const std::int64_t rounds = (n_tasks + kDotRows * threads_ - 1) / (kDotRows * threads_);
    const std::int64_t shares = std::max<std::int64_t>(1, rounds * threads_);
    panel_ = std::clamp<std::int64_t>((n_tasks + shares - 1) / shares, 4, kDotRows);
    std::int64_t room = 0;
    for (std::int64_t begin = 0; begin < n_tasks; begin += panel_) {
      Task* const first = tasks.data() + begin;
      Task* const last = tasks.data() + std::min(n_tasks, begin + panel_);
      std::int64_t end = 0;
      for (const Task* task = first; task != last; ++task) end = std::max(end, task->to);
      for (Task* task = first; task != last; ++task) {
        task->start = first->from;
        task->end = end;
        task->first = room;
        room += end - first->from;
        m_.place[task->row] = static_cast<std::int32_t>(task - tasks.data());
      }
    }
    if (static_cast<std::int64_t>(products_.size()) < room) {
      products_.resize(static_cast<std::size_t>(room));
    }
    touched += n_tasks;
    multiply(tasks, room);

#pragma omp parallel for schedule(static) num_threads(threads_) if (count > 64)
    for (std::int64_t j = 0; j < count; ++j) {
      if (unread < 0) lower_score(batch[j], tasks);
    }
    for (const Task& task : tasks) m_.place[task.row] = -1;
  }

  std::vector<Task> rows_of(const std::int64_t* batch, std::int64_t count) {
    std::vector<Task> tasks;
    for (std::int64_t j = 0; j < count; ++j) {
      const std::int64_t i = batch[j];
      if (c_.score[i] + c_.error_bound[i] == 0) continue;  // a zero feature stays zero
      const std::int64_t to = next_stop(i);
      for (int side = 0; side < 2; ++side) {
        const std::int64_t row = c_.pairs[2 * i + side];
        const std::int64_t from = kept() ? m_.row_version[row] : c_.version[i];
        if (from >= to) continue;  // known from another pair
        std::int32_t& place = m_.place[row];
        if (place < 0) {
          place = static_cast<std::int32_t>(tasks.size());
          tasks.push_back({row, from, to, 0, 0, 0});
        }
        Task& task = tasks[static_cast<std::size_t>(place)];
        task.from = std::min(task.from, from);
        task.to = std::max(task.to, to);
      }
    }
    return tasks;
  }

  // `room`: the number of inner products.
  void multiply(const std::vector<Task>& tasks, std::int64_t room) {
    const auto n_tasks = static_cast<std::int64_t>(tasks.size());
    const std::int64_t panels = (n_tasks + panel_ - 1) / panel_;
    // A few products take less time than waking a second thread.
    const bool worth_it = panels > 1 && room * k_ > kSerialProducts;
#pragma omp parallel for schedule(dynamic) num_threads(threads_) if (worth_it)
    for (std::int64_t p = 0; p < panels; ++p) {
      const std::int64_t begin = p * panel_;
      const std::int64_t here = std::min(panel_, n_tasks - begin);
      const Task* task = tasks.data() + begin;
      const T* numbers[kDotRows];
      char* at = row_room_.of(thread_number());
      for (std::int64_t r = 0; r < here; ++r) {
        numbers[r] = reinterpret_cast<const T*>(
            rows_.get(task[r].row, at + r * rows_.row_bytes));
        if (numbers[r] == nullptr) unread = task[r].row;
      }
      if (unread >= 0) continue;
      row_dot_products<T>(products_.data() + task->first, numbers, here, k_,
                          static_cast<const S*>(d_.unit) + task->start * d_.stride, d_.stride,
                          task->end - task->start, dots_room_.of(thread_number()));
      for (std::int64_t r = 0; kept() && r < here; ++r) {
        const double* product = products_.data() + task[r].first - task[r].start;
        S* target = kept_products(task[r].row);
        for (std::int64_t s = task[r].from; s < task->end; ++s) {
          target[s] = static_cast<S>(product[s]);
        }
        m_.row_version[task[r].row] = static_cast<std::int32_t>(task->end);
      }
    }
  }

  bool kept() const { return m_.products != nullptr; }
  S* kept_products(std::int64_t row) const {
    return static_cast<S*>(m_.products) + row * m_.capacity;
  }

  void lower_score(std::int64_t i, const std::vector<Task>& tasks) {
    const std::int64_t a = c_.pairs[2 * i], b = c_.pairs[2 * i + 1];
    if (c_.score[i] + c_.error_bound[i] == 0) {
      c_.version[i] = static_cast<std::int32_t>(d_.count);
    } else if (kept()) {
      lower_score(i, kept_products(a), kept_products(b),
                  std::min(m_.row_version[a], m_.row_version[b]));
    } else {
      const Task& first = tasks[static_cast<std::size_t>(m_.place[a])];
      const Task& second = tasks[static_cast<std::size_t>(m_.place[b])];
      lower_score(i, products_.data() + first.first - first.start,
                  products_.data() + second.first - second.start,
                  std::min(first.end, second.end));
    }
  }

  // Updates the score for the directions before `to`.
  template <typename P>
  void lower_score(std::int64_t i, const P* at_first, const P* at_second, std::int64_t to) {
    double score = c_.score[i], error_bound = c_.error_bound[i], inherited = c_.inherited[i];
    const double reach = c_.reach[i];
    const double first = 1 / (c_.row_divisor[c_.pairs[2 * i]] * c_.pair_divisor[i]);
    const double second = 1 / (c_.row_divisor[c_.pairs[2 * i + 1]] * c_.pair_divisor[i]);
    // A good enough bound on the score's root: recomputed when it is far off.
    double bound = score + error_bound, root = std::sqrt(bound);
    for (std::int64_t s = c_.version[i]; s < to; ++s) {
      const double f = std::abs(static_cast<double>(at_first[s]) * first -
                                static_cast<double>(at_second[s]) * second) * d_.norm[s];
      const double error = d_.error[s] * reach;
      inherited += d_.turn[s] * std::min(f + error, root);
      score = std::max(0.0, score - f * f);
      error_bound += (2 * f + error) * error;
      if (score + error_bound > bound || score + error_bound < 0.5 * bound) {
        bound = score + error_bound;
        root = std::sqrt(bound);
      }
      const double turned = d_.turn[s] * root;
      error_bound += (2 * f + turned) * turned;
    }
    c_.score[i] = score;
    c_.error_bound[i] = error_bound;
    c_.inherited[i] = inherited;
    c_.version[i] = static_cast<std::int32_t>(to);
  }

  const RowSource& rows_;
  const std::int64_t k_;
  const Candidates& c_;
  const Directions& d_;
  const Memory& m_;
  const int threads_;
  std::vector<double> products_;
  std::int64_t panel_ = kDotRows;  // rows a thread multiplies at a time
  Scratch<S> dots_room_;
  Scratch<char> row_room_;
};

}  // namespace

template <typename T>
std::int64_t refresh_bounds(std::int64_t* contenders, std::int64_t* touched,
                            const RowSource& rows, std::int64_t k, const Candidates& candidates,
                            const Directions& directions, Memory* memory, int num_threads) {
  BoundRefresh<T> work(rows, k, candidates, directions, *memory, num_threads);
  const std::int64_t found = work.run(contenders, memory);
  *touched += work.touched;
  return work.unread >= 0 ? -1 - work.unread : found;
}

#define ACTIVEDPO_REFRESH_BOUNDS(T)                                                               \
  template std::int64_t refresh_bounds<T>(std::int64_t*, std::int64_t*, const RowSource&,         \
                                          std::int64_t, const Candidates&, const Directions&,     \
                                          Memory*, int);
ACTIVEDPO_REFRESH_BOUNDS(float)
ACTIVEDPO_REFRESH_BOUNDS(double)
ACTIVEDPO_REFRESH_BOUNDS(BFloat16)
ACTIVEDPO_REFRESH_BOUNDS(Half)
#undef ACTIVEDPO_REFRESH_BOUNDS

}  // namespace activedpo
