// Counters by which one thread tells others that what they wait for is in memory.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace inferix {

// Who sees the counter at `value` or above sees all that this thread wrote before. Never lowers it. That it reads and
// writes in one step keeps what an earlier raise promised: to see the later one is to see both.
inline void raise_to(int32_t* counter, int32_t value) {
  int32_t now = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (now < value && !__atomic_compare_exchange_n(counter, &now, value, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
  }
}

inline bool has_reached(const int32_t* counter, int32_t value) {
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE) >= value;
}

// Pages that did not come before a deadline.
struct NotArrived : std::runtime_error {
  NotArrived(std::vector<int32_t> page_ids, float seconds)
      : std::runtime_error("pages did not come"), pages(std::move(page_ids)), deadline(seconds) {}
  std::vector<int32_t> pages;  // ids, in order
  float deadline;              // in seconds
};

}  // namespace inferix
