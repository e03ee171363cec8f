// An emulator of one thread block of a Hopper GPU on the CPU: the functions of csrc/cuda/ptx.cuh and wgmma.cuh.
//
// Threads are fibers that run until they have to wait, in random order. Asynchronous work is done as late as possible:
// a copy fills its destination with garbage until a random later moment when its bytes arrive, a wgmma reads shared
// memory only when it is waited for. So a missing wait gives a wrong result. When all threads wait and no copy is
// pending, that is reported as a deadlock. Tensor maps, swizzles, descriptors and fragments follow the PTX ISA and
// share no code with layouts.h.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to jump to another stack
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "../../../csrc/cpu/elements.h"
#include "../../../csrc/cuda/layouts.h"

#define INFERIX_DEVICE inline
#define INFERIX_KERNEL(threads) inline void
#define INFERIX_GRID_CONSTANT const

namespace inferix::sm90 {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "machine: %s\n", what);
  std::exit(1);
}

struct TensorMap {
  const char* base;
  TensorBox box;
  int element_bytes;
};

// An mbarrier.
struct Barrier {
  int count, missing, bytes = 0;
  uint32_t phase = 0;
  void turn() {
    if (missing == 0 && bytes == 0) ++phase, missing = count;
    if (missing < 0 || bytes < 0) fail("too many arrivals or bytes at a barrier");
  }
};

struct Copy {
  std::function<void()> run;
};

struct Product {
  std::function<void(const std::vector<float>& b, int thread)> add;
  std::function<std::vector<float>()> read_b;
};

struct Fiber {
  ucontext_t begin;  // then it goes on at `place`: swapcontext asks the kernel for signal masks, setjmp does not
  jmp_buf place;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready;  // or empty
  bool done = false;
  std::vector<Product> products;
  uint64_t exchanged[2];
  uint32_t a[16][4];  // A fragments of the pending products
};

class Machine {
 public:
  static constexpr int kStack = 96 * 1024, kMemory = 240 * 1024;
  Machine(int threads, uint32_t seed) : memory(kMemory, char(0xff)), fibers(threads), random(seed) {}

  void run(int block_x, int block_y, const std::function<void()>& kernel) {
    x = block_x, y = block_y, body = &kernel;
    for (Fiber& fiber : fibers) {
      fiber.done = fiber.begun = false;
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.begin);
      fiber.begin.uc_stack.ss_sp = fiber.stack.get();
      fiber.begin.uc_stack.ss_size = kStack;
      makecontext(&fiber.begin, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    }
    while (sweep()) {
    }
    if (!copies.empty()) fail("copies pending at the end");
  }

  void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    Fiber& fiber = fibers[current];
    fiber.ready = std::move(ready);
    leave(fiber);
  }

  // A barrier of n threads that pass the same key: returns after all have arrived.
  void meet(int key, int n) {
    Meeting& meeting = meetings[key];
    const int round = meeting.round;
    if (++meeting.come == n) {
      meeting.come = 0;
      ++meeting.round;
    } else {
      wait_until([&meeting, round] { return meeting.round != round; });
    }
  }

  Fiber& self() { return fibers[current]; }

  std::vector<char> memory;
  std::vector<Fiber> fibers;
  std::map<uint64_t*, Barrier> barriers;
  std::vector<Copy> copies;
  std::map<std::pair<int, size_t>, std::vector<float>> right_operands;  // of a warpgroup's pending products
  int current = 0, x = 0, y = 0;
  int slow = -1;  // a warpgroup that is seldom scheduled: the others get as far ahead as synchronisation allows

 private:
  struct Meeting {
    int come = 0, round = 0;
  };
  static void enter();

  // From the scheduler to a fiber, until that leaves.
  [[gnu::noinline]] void go_on(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.begin);
  }
  [[gnu::noinline]] void leave(Fiber& fiber) {
    if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
  }

  bool sweep() {
    bool moved = false, left = false, skipped = false;
    const int warps = int(fibers.size()) / 32, first = int(random() % warps);
    for (int i = 0; i < warps; ++i) {
      const int warp = (first + i) % warps;
      if (random() % 16 < (warp * 32 / kWarpgroup == slow ? 14 : 4)) {
        skipped = true;
        left = true;
        continue;
      }
      for (int lane = 0; lane < 32; ++lane) {
        current = warp * 32 + lane;
        Fiber& fiber = fibers[current];
        if (fiber.done) continue;
        left = true;
        if (fiber.ready && !fiber.ready()) continue;
        fiber.ready = nullptr;
        go_on(fiber);
        moved = true;
      }
    }
    if (!copies.empty() && (random() % 3 == 0 || (!moved && !skipped))) {
      const size_t which = random() % copies.size();
      const Copy copy = copies[which];
      copies.erase(copies.begin() + which);
      copy.run();
      moved = true;
    }
    if (left && !moved && !skipped) fail("deadlock: every thread waits");
    return left;
  }

  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  std::map<int, Meeting> meetings;
  std::mt19937 random;
};

inline Machine* machine = nullptr;
inline void Machine::enter() {
  (*machine->body)();
  machine->self().done = true;
  machine->leave(machine->self());
}

inline int thread_index() { return machine->current; }
inline int block_index() { return machine->x; }
inline int block_index_y() { return machine->y; }
inline void named_barrier_sync(int barrier, int threads) { machine->meet(barrier, threads); }
inline void sync_threads() { machine->meet(0, int(machine->fibers.size())); }
inline void sync_warp() { machine->meet(1000 + thread_index() / 32, 32); }
inline void sync_quad() { machine->meet(2000 + thread_index() / 4, 4); }

template <typename T>
T exchange(T x, int from) {
  Fiber& self = machine->self();
  const int warp = thread_index() / 32 * 32;
  self.exchanged[0] = 0;
  std::memcpy(&self.exchanged[0], &x, sizeof x);
  sync_warp();
  const uint64_t bits = machine->fibers[warp + from].exchanged[0];
  sync_warp();
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <typename T>
T shfl_xor(T x, int mask) {
  return exchange(x, thread_index() % 32 ^ mask);
}
template <typename T>
T shfl_up(T x, int distance) {
  const int lane = thread_index() % 32;
  return exchange(x, lane >= distance ? lane - distance : lane);
}
template <typename T>
T shfl_idx(T x, int lane) {
  return exchange(x, lane);
}

inline bool any_in_warp(bool x) {
  for (int mask = 1; mask < 32; mask *= 2) x = shfl_xor(x, mask) || x;
  return x;
}

template <typename T>
void atomic_max(T* at, T x) {
  *at = std::max(*at, x);
}
template <typename T>
void atomic_min(T* at, T x) {
  *at = std::min(*at, x);
}
template <typename T>
void atomic_add(T* at, T x) {
  *at += x;
}

inline int opaque(int x) { return x; }
template <int kCount>
void warpgroup_reg_alloc() {}
template <int kCount>
void warpgroup_reg_dealloc() {}

inline char* shared_memory() { return machine->memory.data() + 48; }  // as badly aligned as it may be
inline uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(static_cast<const char*>(x) - machine->memory.data()) + 4096;  // not 0 at the start
}
inline char* at_shared(uint32_t address) { return machine->memory.data() + (address - 4096); }

inline Barrier& barrier_at(uint64_t* barrier) {
  const auto found = machine->barriers.find(barrier);
  if (found == machine->barriers.end()) fail("a barrier that was never initialised");
  return found->second;
}
inline void mbarrier_init(uint64_t* barrier, int count) { machine->barriers[barrier] = Barrier{count, count}; }
inline void mbarrier_arrive(uint64_t* barrier) {
  Barrier& b = barrier_at(barrier);
  --b.missing;
  b.turn();
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  Barrier& b = barrier_at(barrier);
  b.bytes += bytes;
  --b.missing;
  b.turn();
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  machine->wait_until([barrier, parity] { return (barrier_at(barrier).phase & 1) != parity; });
}
inline void fence_mbarrier_init() {}
inline void fence_proxy_async() {}

// A swizzle: address bits 7 .. 9, or 7 .. 8, flip bits 4 .. 6, or 4 .. 5.
inline uint32_t apply_swizzle(uint32_t address, int swizzle_bytes) {
  const uint32_t chunk = address / 16 % 8, line = address / 128 % 8;
  const uint32_t other = swizzle_bytes == 128 ? chunk ^ line : chunk ^ (line & 3);
  return address - chunk * 16 + other * 16;
}

inline void deliver(uint64_t* barrier, int bytes) {
  Barrier& b = barrier_at(barrier);
  b.bytes -= bytes;
  b.turn();
}

inline void prefetch_tensormap(const TensorMap&) {}
inline void tma_load_tensor(const TensorMap& map, void* to, uint64_t* barrier, std::vector<int64_t> at) {
  const TensorBox& box = map.box;
  const uint32_t start = shared_address(to);
  if (start % 128 || int(at.size()) != box.rank) fail("a tensor copy to a wrong place or of a wrong rank");
  int bytes = map.element_bytes;
  for (int d = 0; d < box.rank; ++d) bytes *= int(box.box[d]);
  std::memset(to, 0xff, bytes);
  machine->copies.push_back({[=] {
    int i[5] = {};
    for (int n = 0; n < bytes; n += map.element_bytes) {
      bool inside = true;
      const char* from = map.base;
      for (int d = 0; d < box.rank; ++d) {
        const int64_t at_d = at[d] + i[d];
        inside = inside && at_d >= 0 && at_d < int64_t(box.size[d]);
        from += at_d * (d ? int64_t(box.stride[d - 1]) : map.element_bytes);
      }
      char* there = at_shared(apply_swizzle(start + n, box.swizzle_bytes));
      if (inside) std::memcpy(there, from, map.element_bytes);
      else std::memset(there, 0, map.element_bytes);
      for (int d = 0; d < box.rank && ++i[d] == int(box.box[d]); ++d) i[d] = 0;
    }
    deliver(barrier, bytes);
  }});
}
inline void tma_load_2d(const TensorMap& map, void* to, uint64_t* barrier, int x, int y) {
  tma_load_tensor(map, to, barrier, {x, y});
}
inline void tma_load_5d(const TensorMap& map, void* to, uint64_t* barrier, int a, int b, int c, int d, int e) {
  tma_load_tensor(map, to, barrier, {a, b, c, d, e});
}
inline void tma_load_1d(const void* from, void* to, uint64_t* barrier, int bytes) {
  if (bytes % 16 || shared_address(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy is not aligned");
  std::memset(to, 0xff, bytes);
  machine->copies.push_back({[=] {
    std::memcpy(to, from, bytes);
    deliver(barrier, bytes);
  }});
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float div_rn(float a, float b) { return a / b; }
inline float fmax(float a, float b) { return std::fmax(a, b); }
inline float rint(float x) { return std::nearbyint(x); }
inline float sqrt_rn(float x) { return std::sqrt(x); }
inline int float_to_int_rn(float x) { return int(std::nearbyint(x)); }
using inferix::bits_of;
using inferix::float_of;
inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t which) {
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const int n = which >> 4 * i & 7;
    y |= ((n < 4 ? a >> 8 * n : b >> 8 * (n - 4)) & 255) << 8 * i;
  }
  return y;
}
inline uint32_t pack_bf16x2(float a, float b) {
  return from_float<Bf16>(a).bits | uint32_t(from_float<Bf16>(b).bits) << 16;
}
inline uint32_t pack_f16x2(float a, float b) {
  return from_float<Half>(a).bits | uint32_t(from_float<Half>(b).bits) << 16;
}
inline uint32_t e4m3_bits(float x) {
  return std::isnan(x) ? 0x7f : e4m3_of(std::fmin(std::fmax(x, -448.f), 448.f), x).bits;
}
inline uint32_t pack_e4m3x4(float a, float b, float c, float d) {
  return e4m3_bits(a) | e4m3_bits(b) << 8 | e4m3_bits(c) << 16 | e4m3_bits(d) << 24;
}
inline float half_to_float(uint16_t bits) { return to_float(Half{bits}); }

}  // namespace inferix::sm90

#include "tensor_cores.h"
