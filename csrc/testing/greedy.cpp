// The greedy selection of greedy/ on CPU threads: the GPU's code and its phases, for the tests.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "bindings/greedy_problem.h"
#include "bindings/parts.h"
#include "greedy/select.h"
#include "testing/host_numbers.h"

namespace activedpo {

namespace {

class Meeting {
 public:
  explicit Meeting(int workers) : workers_(workers) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const std::int64_t round = round_;
    if (++here_ == workers_) {
      here_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

  std::mutex mutex;

 private:
  const int workers_;
  int here_ = 0;
  std::int64_t round_ = 0;
  std::condition_variable all_here_;
};

// One thread per lane. Lanes of a group meet to exchange their numbers.
template <int Lanes, int Groups>
struct HostBlock {
  struct Group {
    Meeting meeting{Lanes};
    double numbers[Lanes][kGreedyTile * kGreedyTogether<float>];
  };
  Meeting meeting{Lanes * Groups};
  Group groups[Groups];
  GreedyShared<Groups> shared;
};

template <int Lanes, int Groups>
class HostGrid : public HostNumbers {
 public:
  static constexpr int kLanes = Lanes;
  static constexpr int kGroups = Groups;
  using Blocks = std::vector<HostBlock<Lanes, Groups>>;

  HostGrid(Meeting& all, Blocks& blocks, int thread)
      : all_(all), blocks_(blocks), lane_(thread % Lanes), group_(thread / Lanes % Groups),
        block_(thread / Lanes / Groups) {}

  int lane() const { return lane_; }
  int group() const { return group_; }
  int block() const { return block_; }
  int blocks() const { return static_cast<int>(blocks_.size()); }
  void barrier() { all_.wait(); }
  void block_barrier() { own().meeting.wait(); }

  double sum(double x) {
    double whole = 0;
    exchange(&x, 1, [&](int, const double* numbers) { whole += numbers[0]; });
    return whole;
  }
  double max(double x) {
    double largest = x;
    exchange(&x, 1,
             [&](int, const double* numbers) { largest = std::max(largest, numbers[0]); });
    return largest;
  }
  template <typename S, int n>
  void sums(const S (&x)[n], double (&own)[n / Lanes]) {
    for (double& sum : own) sum = 0;
    exchange(x, n, [&](int, const double* numbers) {
      for (int i = 0; i < n / Lanes; ++i) own[i] += numbers[lane_ * (n / Lanes) + i];
    });
  }
  double from(double x, int lane) {
    double found = x;
    exchange(&x, 1, [&](int other, const double* numbers) {
      if (other == lane) found = numbers[0];
    });
    return found;
  }

  std::int32_t add(std::int32_t* counter, std::int32_t n) {
    const std::lock_guard<std::mutex> lock(all_.mutex);
    const std::int32_t before = *counter;
    *counter = before + n;
    return before;
  }
  GreedyShared<Groups>& shared() { return own().shared; }

 private:
  HostBlock<Lanes, Groups>& own() { return blocks_[static_cast<std::size_t>(block_)]; }

  // Calls use(lane, numbers) with the n numbers of every lane of the group, in order.
  template <typename S, typename F>
  void exchange(const S* x, int n, const F& use) {
    auto& group = own().groups[group_];
    for (int i = 0; i < n; ++i) group.numbers[lane_][i] = x[i];
    if constexpr (Lanes > 1) group.meeting.wait();
    for (int lane = 0; lane < Lanes; ++lane) use(lane, group.numbers[lane]);
    if constexpr (Lanes > 1) group.meeting.wait();
  }

  Meeting& all_;
  Blocks& blocks_;
  const int lane_, group_, block_;
};

template <typename T, int Lanes, int Groups>
void greedy_select(const GreedyProblem& problem, char* memory, std::int64_t begin, std::int64_t end,
                   int n_blocks) {
  GreedyRoom<typename Sum<T>::Type> room{};
  room.lay_out(problem, memory);
  const int n_threads = n_blocks * Groups * Lanes;
  Meeting all(n_threads);
  typename HostGrid<Lanes, Groups>::Blocks blocks(static_cast<std::size_t>(n_blocks));
  const auto work = [&](int thread) {
    HostGrid<Lanes, Groups> grid(all, blocks, thread);
    GreedySelect<T, HostGrid<Lanes, Groups>>(grid, problem, room).run(begin, end);
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < n_threads; ++thread) threads.emplace_back(work, thread);
  work(0);
  for (std::thread& thread : threads) thread.join();
}

template <typename T>
void bind_dtype(pybind11::module_& module, const std::string& dtype) {
  namespace py = pybind11;
  bind_greedy_bytes<T>(module, ("greedy_bytes_" + dtype).c_str());
  module.def(
      ("greedy_select_" + dtype).c_str(),
      [](const GreedyProblem& problem, std::uintptr_t room, std::int64_t begin, std::int64_t end,
         int blocks, bool wide) {
        char* const memory = reinterpret_cast<char*>(room);
        if (wide) {
          greedy_select<T, 4, 2>(problem, memory, begin, end, blocks);
        } else {
          greedy_select<T, 1, 1>(problem, memory, begin, end, blocks);
        }
      },
      "A block is a thread, or two groups of four of them.",
      py::call_guard<py::gil_scoped_release>(), py::arg("problem"), py::kw_only(), py::arg("room"),
      py::arg("begin"), py::arg("end"), py::arg("blocks"), py::arg("wide"));
}

}  // namespace

void bind_greedy(pybind11::module_& module) {
  bind_greedy_problem(module);
  bind_dtype<float>(module, "float32");
  bind_dtype<double>(module, "float64");
  bind_dtype<BFloat16>(module, "bfloat16");
  bind_dtype<Half>(module, "float16");
}

}  // namespace activedpo
