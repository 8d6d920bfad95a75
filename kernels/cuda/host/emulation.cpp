#include "emulation.h"

#include <string.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 4096;
constexpr unsigned char kPoison = 0xff;  // a NaN in every dtype

enum class State { kReady, kWaiting, kDone };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  Place place;
  State state;
  int exchanges;
};

struct Warp {
  uint32_t messages[2][kWarp][kMessage];  // by turns: a lane is at most one operation ahead of the others
  int arrived;
};

struct Block {
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  std::vector<int> ready;
  const std::function<void()>* kernel;
  ucontext_t scheduler;
  int threads, current, at_barrier;
};

Block block;
int schedule;  // 0: in order; -1: the last thread first; above: random from this seed
std::mt19937 generator;

void enter() {
  (*block.kernel)();
  block.fibres[block.current]->state = State::kDone;
}  // on to block.scheduler

int next() {
  int at = static_cast<int>(block.ready.size()) - 1;
  if (schedule > 0) at = static_cast<int>(generator() % block.ready.size());
  const int thread = block.ready[at];
  block.ready[at] = block.ready.back();
  block.ready.pop_back();
  return thread;
}

void yield() {
  Fibre& fibre = *block.fibres[block.current];
  swapcontext(&fibre.context, &block.scheduler);
}

void wake(int first, int count) {  // in the order in which `next` shall find them
  for (int i = 0; i < count; ++i) {
    const int thread = schedule < 0 ? first + i : first + count - 1 - i;
    if (block.fibres[thread]->state != State::kWaiting) continue;
    block.fibres[thread]->state = State::kReady;
    block.ready.push_back(thread);
  }
}

bool run_block(const Place& place) {
  memset(block.memory.data(), kPoison, block.memory.size());
  block.at_barrier = 0;
  block.ready.clear();
  for (Warp& warp : block.warps) warp.arrived = 0;
  for (int i = 0; i < block.threads; ++i) {
    Fibre& fibre = *block.fibres[i];
    fibre.place = place;
    fibre.place.thread = dim3(i);
    fibre.state = State::kWaiting;
    fibre.exchanges = 0;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &block.scheduler;
    makecontext(&fibre.context, enter, 0);
  }
  wake(0, block.threads);
  while (!block.ready.empty()) {
    block.current = next();
    swapcontext(&block.scheduler, &block.fibres[block.current]->context);
  }
  for (int i = 0; i < block.threads; ++i) {
    if (block.fibres[i]->state != State::kDone) return false;  // some threads wait for ones that never come
  }
  return true;
}

}  // namespace

const Place& place() { return block.fibres[block.current]->place; }

unsigned char* shared() {
  unsigned char* at = block.memory.data();
  return at + (16 - reinterpret_cast<uintptr_t>(at) % 16) % 16;
}

void barrier() {
  block.fibres[block.current]->state = State::kWaiting;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    wake(0, block.threads);
  }
  yield();
}

const uint32_t (*exchange(const uint32_t* words, int count)) [kMessage] {
  Fibre& fibre = *block.fibres[block.current];
  Warp& warp = block.warps[block.current / kWarp];
  uint32_t (*messages)[kMessage] = warp.messages[fibre.exchanges++ % 2];
  memcpy(messages[block.current % kWarp], words, sizeof(uint32_t) * count);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    wake(block.current / kWarp * kWarp, kWarp);  // this lane goes on
  } else {
    fibre.state = State::kWaiting;
    yield();
  }
  return messages;
}

cudaError_t run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  while (static_cast<int>(block.fibres.size()) < threads) block.fibres.emplace_back(new Fibre);
  block.threads = threads;
  block.kernel = &kernel;
  block.warps.resize((threads + kWarp - 1) / kWarp);
  block.memory.resize(16 + shared_bytes + kGuard);
  generator.seed(schedule);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      Place place;
      place.block = dim3(x, y);
      place.block_size = dim3(threads);
      place.grid = grid;
      if (!run_block(place)) return cudaErrorLaunchFailure;
      for (const unsigned char* end = shared() + shared_bytes;
           end < block.memory.data() + block.memory.size(); ++end) {
        if (*end != kPoison) return cudaErrorIllegalAddress;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void acs_emulation_schedule(int value) {
  emulation::schedule = value;
}
