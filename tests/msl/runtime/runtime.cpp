// What the compiled kernel calls, and what Python calls to run it.
//
// Kernels are compiled with -fsanitize=thread and a few checks of undefined behaviour, without those sanitizers' own
// runtimes: the functions that they would bring are here.
#include "schedule.h"

extern "C" {
void __tsan_init() {}
#define ACCESS(PREFIX, SIZE, ALIGN)                                                     \
  void PREFIX##read##SIZE(void *p) { access(p, SIZE, false, false, ALIGN); }            \
  void PREFIX##write##SIZE(void *p) { access(p, SIZE, true, false, ALIGN); }            \
  void PREFIX##read_write##SIZE(void *p) {                                              \
    u32 site = msl_site;                                                                \
    access(p, SIZE, false, false, ALIGN);                                               \
    msl_site = site; /* another thread may have run in between */                       \
    access(p, SIZE, true, false, ALIGN);                                                \
  }
#define ACCESSES(SIZE) ACCESS(__tsan_, SIZE, SIZE) ACCESS(__tsan_unaligned_, SIZE, 1)
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
#undef ACCESSES
#undef ACCESS

static void copied(void *to, const void *from, u64 n) {
  u32 site = msl_site;
  if (!n) return;
  access(from, n, false);
  msl_site = site;
  access(to, n, true);
}
void *__tsan_memcpy(void *to, const void *from, u64 n) { copied(to, from, n); return memcpy(to, from, n); }
void *__tsan_memmove(void *to, const void *from, u64 n) { copied(to, from, n); return memmove(to, from, n); }
void *__tsan_memset(void *to, int value, u64 n) {
  if (n) access(to, n, true);
  return memset(to, value, n);
}

static void undefined(u32 what) {
  report(UNDEFINED, what, 0, 0, false, running->id, msl_site);
  stop();
}
void __ubsan_handle_out_of_bounds(void *, u64) { undefined(OUTSIDE_OF_ARRAY); }
void __ubsan_handle_divrem_overflow(void *, u64, u64) { undefined(DIVISION); }
void __ubsan_handle_add_overflow(void *, u64, u64) { undefined(OVERFLOW); }
void __ubsan_handle_sub_overflow(void *, u64, u64) { undefined(OVERFLOW); }
void __ubsan_handle_mul_overflow(void *, u64, u64) { undefined(OVERFLOW); }
void __ubsan_handle_negate_overflow(void *, u64) { undefined(OVERFLOW); }

u32 msl_rt_atomic_read(u64 address, bool will_write) {
  access((void *)address, 4, will_write, true, 4);
  return *(u32 *)address;
}
void msl_rt_atomic_write(u64 address, u32 value) { *(u32 *)address = value; }
void msl_rt_bad_lane(int lane) { report(INACTIVE_LANE, 0, lane, 0, false, running->id, msl_site); }
void msl_rt_barrier(bool whole_threadgroup, int flags) {
  step(launch->barriers);
  running->state = whole_threadgroup ? AT_BARRIER : AT_SIMD;
  running->barrier = true;
  running->flags = flags;
  running->site = msl_site;
  to_scheduler();
}
void msl_rt_gather(const void *value, u32 size, void *all, u32 *mask, u32 *lane) {
  Thread *t = running;
  step(launch->simd_operations);
  t->state = AT_SIMD;
  t->barrier = false;
  t->value = value;
  t->size = size;
  t->all = all;
  t->site = msl_site;
  to_scheduler();
  *mask = t->mask;
  *lane = t->lane;
}

// float to bfloat16, nearest even. A bfloat16 is returned in the low half of xmm0, as a float that holds its bits is.
float __truncsfbf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x);
  u32 half = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_bit_cast(float, half);
}

#define PUBLIC __attribute__((visibility("default")))
PUBLIC u32 msl_n_variables() { return msl_variable_count; }
PUBLIC const char *msl_variable(u32 i, u64 *size) {
  *size = msl_variables[i].size;
  return msl_variables[i].name;
}
// 0 when it ran (with or without findings), 1 when the machine has no memory for it.
PUBLIC int msl_run(Launch *l) {
  static void *pointers[MAX_BUFFERS];
  launch = l;
  stopped = false;
  running = nullptr;
  random_state = l->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  if (!stacks) {
    void *m = mmap(nullptr, MAX_THREADS * STACK, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0);
    if (m == (void *)-1) return 1;
    stacks = (u8 *)m;
  }
  if (!map_memory(pointers)) return 1;
  buffer_pointers = pointers;
  u32 groups[3], total = 1;
  for (int d = 0; d < 3; ++d) total *= groups[d] = (l->grid[d] + l->group[d] - 1) / l->group[d];
  u32 *order = (u32 *)map(total * sizeof(u32), 0);
  if (!order) return 1;
  for (u32 i = 0; i < total; ++i) order[i] = l->order == REVERSE ? total - 1 - i : i;
  if (l->order == RANDOM) shuffle(order, total);
  for (u32 i = 0; i < total && !stopped; ++i) {
    group_index = order[i];
    const u32 at[3] = {group_index % groups[0], group_index / groups[0] % groups[1], group_index / (groups[0] * groups[1])};
    run_threadgroup(at, groups);
    l->groups++;
  }
  running = nullptr;
  unmap_memory();
  l->failed = stopped;
  return 0;
}
}
