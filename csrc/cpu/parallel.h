// A small thread pool. Not OpenMP: torch brings a runtime of its own, and two of them spin against each other.
#pragma once
#include <cstdint>

namespace inferix {

// Of a thread that spins.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs task(0) ... task(tasks - 1) on the caller and up to threads - 1 workers; returns when all are done.
// Which thread runs a task is not fixed, so a task must not depend on it. Tasks must not throw.
void parallel_run(int threads, int64_t tasks, void (*task)(const void* context, int64_t index), const void* context);

template <typename Task>
void parallel_for(int threads, int64_t tasks, const Task& task) {
  parallel_run(threads, tasks, [](const void* context, int64_t i) { (*static_cast<const Task*>(context))(i); }, &task);
}

}  // namespace inferix
