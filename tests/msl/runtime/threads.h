// The threads of a threadgroup: fibers on stacks of their own, which run until they wait for others.
#pragma once
#include "base.h"

enum State { READY, AT_SIMD, AT_BARRIER, DONE };
struct Thread {
  void *stack_pointer;
  u8 *stack;
  State state;
  u32 site, flags, id, lane, simdgroup;
  bool barrier;  // waits at a simdgroup_barrier, not at a function of values
  const void *value;
  void *all;
  u32 size, mask;
  Position position;
};

static const u64 STACK = 256 << 10;
static const u32 MAX_THREADS = 1024;
static Thread threads[MAX_THREADS];
static u8 *stacks;
static void *scheduler_stack_pointer;
static Thread *running;
static u32 n_threads, n_simdgroups;
static void **buffer_pointers;

// Saves the registers that a callee must keep, and goes on where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void msl_switch(void **save, void *to);
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size msl_switch,.-msl_switch
)");

static void to_scheduler() {
  Thread *t = running;
  msl_switch(&t->stack_pointer, scheduler_stack_pointer);
}
// Ends the launch: what the thread would do next is not defined.
static void stop() {
  stopped = true;
  running->state = DONE;
  to_scheduler();
  __builtin_trap();
}
// Counts what a thread does, so that a loop without an end is a finding and not a test that hangs.
static void step(u64 &counter) {
  if (++counter < launch->max_steps) return;
  report(ENDLESS, 0, launch->max_steps, 0, false, running->id, msl_site);
  stop();
}
static void thread_main() {
  msl_entry(buffer_pointers, &running->position);
  running->state = DONE;
  to_scheduler();
  __builtin_trap();
}
static void start_thread(Thread &t) {
  t.state = READY;
  memset(t.stack + STACK - 8192, 0xff, 8192 - 64);
  void **sp = (void **)(t.stack + STACK - 64);
  *--sp = nullptr;  // thread_main has no caller
  *--sp = (void *)thread_main;
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  t.stack_pointer = sp;
}
