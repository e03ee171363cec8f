// Attention while pages are still coming. A task stops before the first page of its list that is not there, and any
// thread goes on with it when the page has come: so a thread waits only while no task has anything to do. Each task
// meets its pages in the order of its list, whatever came first. Included by attention.cpp alone.
#pragma once
#include <algorithm>
#include <chrono>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "attention_groups.h"
#include "parallel.h"

namespace inferix {

// Who waits spins about 20 us, then sleeps: the thread that brings the pages may want the core.
class Patience {
 public:
  void pass() {
    constexpr int kSpins = 400;
    if (spins_++ < kSpins)
      pause();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(20));
  }

 private:
  int spins_ = 0;
};

inline void check_arrivals(const PagedAttentionParams& p) {
  for (int64_t i = 0; p.arrivals && i < p.entries.n; ++i)
    if (p.arrivals[2 * i] < -1 || p.arrivals[2 * i] >= p.counter_count)
      throw std::invalid_argument("plan.arrivals[" + std::to_string(i) + "] must name one of " +
                                  std::to_string(p.counter_count) + " counters, or -1, got " +
                                  std::to_string(p.arrivals[2 * i]));
}

// The tasks of a call whose plan has arrivals.
class ArrivingTasks {
 public:
  ArrivingTasks(const PagedAttentionParams& p, const std::vector<Task>& tasks)
      : p_(p), tasks_(tasks), states_(tasks.size()), stages_(tasks.size(), Stage::stopped), stopped_(tasks.size()) {}

  // Of each thread, until every task that is left has a thread, or too long was waited for a page. attend(task,
  // workspace) goes on with a task and returns whether it is done.
  template <typename Attend>
  void work(const Attend& attend, Workspace& w) {
    Patience patience;
    while (const Claim claim = next(w)) {
      if (claim.task == kNone) {
        patience.pass();
        continue;
      }
      stop(claim.task, attend(tasks_[claim.task], w), w);
      patience = Patience();
    }
  }

  void require_all() const {
    if (!missing_.empty()) throw NotArrived(missing_, p_.deadline);
  }

 private:
  using Clock = std::chrono::steady_clock;
  enum class Stage : uint8_t { stopped, running, done };
  static constexpr int64_t kNone = -1;  // of the stopped tasks none can go on

  struct Claim {
    bool more;  // or the thread is not needed any more
    int64_t task;
    explicit operator bool() const { return more; }
  };

  // Finds a task that can go on, and puts its state into the workspace.
  Claim next(Workspace& w) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopped_ == 0 || !missing_.empty()) return {false, kNone};
    const int64_t count = static_cast<int64_t>(tasks_.size());
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = (turn_ + n) % count;
      if (stages_[i] != Stage::stopped || !can_go_on(states_[i])) continue;
      turn_ = i + 1, stages_[i] = Stage::running, --stopped_;
      if (states_[i].entry == kNotBegun)
        w.entry = kNotBegun;  // and the memory that this thread has
      else
        static_cast<TaskState&>(w) = std::move(states_[i]);
      return {true, i};
    }
    if (std::chrono::duration<float>(Clock::now() - begin_).count() > p_.deadline) missing_ = find_missing();
    return {missing_.empty(), kNone};
  }

  void stop(int64_t i, bool done, Workspace& w) {
    const std::lock_guard<std::mutex> lock(mutex_);
    stages_[i] = done ? Stage::done : Stage::stopped;
    if (done) return;
    states_[i] = std::move(static_cast<TaskState&>(w));
    ++stopped_;
  }

  bool can_go_on(const TaskState& state) const { return state.entry == kNotBegun || has_arrived(p_, state.entry); }

  // Page ids of the lists that are not done.
  std::vector<int32_t> find_missing() const {
    std::vector<int32_t> found;
    for (size_t i = 0; i < tasks_.size(); ++i) {
      const int64_t list = list_of(p_, tasks_[i]);
      for (int64_t entry = p_.page_indptr[list]; stages_[i] != Stage::done && entry < p_.page_indptr[list + 1]; ++entry)
        if (!has_arrived(p_, entry)) found.push_back(p_.entries.ids[entry]);
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
  }

  const PagedAttentionParams& p_;
  const std::vector<Task>& tasks_;
  const Clock::time_point begin_ = Clock::now();
  std::mutex mutex_;               // of all that follows
  std::vector<TaskState> states_;  // of stopped tasks
  std::vector<Stage> stages_;
  size_t stopped_;  // how many
  int64_t turn_ = 0;  // where the search for a task begins
  std::vector<int32_t> missing_;
};

}  // namespace inferix
