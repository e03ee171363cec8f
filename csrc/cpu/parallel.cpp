#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace inferix {
namespace {

// A worker spins about 20 us for the next job before it sleeps: kernels of one layer follow each other closely,
// but torch's own threads want the core in between.
constexpr int kSpins = 400;

class ThreadPool {
 public:
  void run(int threads, int64_t tasks, void (*task)(const void*, int64_t), const void* context) {
    std::unique_lock<std::mutex> one_job(running_, std::try_to_lock);
    // Another Python thread runs a job: its workers have the cores, so this thread works alone.
    if (!one_job || threads <= 1 || tasks <= 1) {
      for (int64_t i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    for (; workers_ < threads - 1; ++workers_) std::thread([this, id = workers_] { serve(id); }).detach();
    task_ = task, context_ = context, tasks_ = tasks, helpers_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    visitors_.fetch_and(~kClosed, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(sleeping_);
      job_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work();
    // A worker that wakes up late finds the door closed: nobody waits for it.
    visitors_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; visitors_.load(std::memory_order_acquire) != kClosed; ++spins) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
  }

 private:
  static constexpr uint32_t kClosed = 1u << 31;

  void serve(int id) {
    for (uint64_t seen = 0;;) {
      seen = next_job(seen);
      // Enter, then look whether the door was open: the other order would let the caller leave in between.
      if (!(visitors_.fetch_add(1, std::memory_order_acq_rel) & kClosed) && id < helpers_) work();
      visitors_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t next_job(uint64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins, pause()) {
      if (const uint64_t job = job_.load(std::memory_order_acquire); job != seen) return job;
    }
    std::unique_lock<std::mutex> lock(sleeping_);
    wake_.wait(lock, [&] { return job_.load(std::memory_order_acquire) != seen; });
    return job_.load(std::memory_order_acquire);
  }

  void work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(context_, i);
  }

  std::mutex running_, sleeping_;
  std::condition_variable wake_;
  std::atomic<uint64_t> job_{0};
  std::atomic<uint32_t> visitors_{kClosed};  // workers inside the job; the top bit is the closed door
  std::atomic<int64_t> next_{0};
  void (*task_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t tasks_ = 0;
  int helpers_ = 0, workers_ = 0;
};

// Never destroyed: workers may still be asleep in it when the process ends.
ThreadPool* thread_pool() {
  static std::atomic<ThreadPool*> instance{[] {
    // A forked child has none of our threads: it starts over with a new pool.
    pthread_atfork(nullptr, nullptr, [] { instance.store(new ThreadPool); });
    return new ThreadPool;
  }()};
  return instance.load();
}

}  // namespace

void parallel_run(int threads, int64_t tasks, void (*task)(const void*, int64_t), const void* context) {
  thread_pool()->run(threads, tasks, task, context);
}

}  // namespace inferix
