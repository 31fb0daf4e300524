// The order in which threads run, and what they wait for: lanes of a simdgroup, or the whole threadgroup.
#pragma once
#include "memory.h"

template <class T> static void shuffle(T *items, u32 n) {
  for (u32 i = n; i > 1; --i) {
    u32 j = random_below(i);
    T swapped = items[i - 1];
    items[i - 1] = items[j];
    items[j] = swapped;
  }
}

// Lets the lanes of a simdgroup that wait at a function go on, once none of its lanes can run.
static bool release_simdgroup(u32 s) {
  u32 begin = s * 32, end = begin + 32 < n_threads ? begin + 32 : n_threads, here = 0;
  Thread *first = nullptr, *other = nullptr;
  for (u32 i = begin; i < end; ++i) {
    Thread &t = threads[i];
    if (t.state == READY) return false;
    if (t.state == AT_SIMD && !first) first = &t;
  }
  if (!first) return false;
  for (u32 i = begin; i < end; ++i) {
    Thread &t = threads[i];
    bool elsewhere = t.state == AT_BARRIER || (t.state == AT_SIMD && t.site != first->site);
    if (t.state == AT_SIMD && !elsewhere) here++;
    if (!other ? elsewhere || t.state == DONE : elsewhere && other->state == DONE) other = &t;
  }
  if (other) {
    bool done = other->state == DONE;
    report(done ? FINISHED_LANES : DIVERGENT_SIMD, 0, here, end - begin, false, first->id, first->site, other->id,
           done ? 0 : other->site);
    stopped = true;
    return false;
  }
  if (first->barrier) {
    if (first->flags & 2) simdgroup_barriers[IN_THREADGROUP][s]++;
    if (first->flags & 1) simdgroup_barriers[IN_DEVICE][s]++;
  } else {
    alignas(16) u8 all[32 * 16];
    u32 mask = 0, size = first->size;
    memset(all, 0xff, sizeof all);
    for (u32 i = begin; i < end; ++i) {
      memcpy(all + size * (i - begin), threads[i].value, size);
      mask |= 1u << (i - begin);
    }
    for (u32 i = begin; i < end; ++i) {
      memcpy(threads[i].all, all, 32 * size);
      threads[i].mask = mask;
    }
  }
  for (u32 i = begin; i < end; ++i) threads[i].state = READY;
  return true;
}

// Lets the threadgroup go on when all of it waits at one barrier. False when nobody waits, or when some never come.
static bool release_threadgroup() {
  Thread *first = nullptr, *other = nullptr;
  u32 waiting = 0;
  for (u32 i = 0; i < n_threads; ++i) {
    Thread &t = threads[i];
    if (t.state == AT_BARRIER) {
      waiting++;
      if (!first) first = &t;
    }
  }
  if (!first) return false;
  for (u32 i = 0; i < n_threads; ++i)
    if (threads[i].state == DONE || threads[i].site != first->site) other = &threads[i];
  if (other) {
    report(DIVERGENT_BARRIER, 0, waiting, n_threads, false, first->id, first->site, other->id,
           other->state == DONE ? 0 : other->site);
    stopped = true;
    return false;
  }
  if (first->flags & 2) group_barriers[IN_THREADGROUP]++;
  if (first->flags & 1) group_barriers[IN_DEVICE]++;
  for (u32 i = 0; i < n_threads; ++i) threads[i].state = READY;
  return true;
}

static u32 ready_threads(Thread **ready, u32 &ahead) {
  u32 n = 0;
  for (u32 i = 0; i < n_threads; ++i) {
    Thread &t = threads[launch->order == REVERSE ? n_threads - 1 - i : i];
    if (t.state == READY) ready[n++] = &t;
  }
  if (launch->order != RANDOM || !n) return n;
  shuffle(ready, n);
  // Seven times of eight one simdgroup runs ahead of the others, through functions of its own.
  if (random_below(8) == 0) return n;
  if (ahead >= n_simdgroups || random_below(8) == 0) ahead = random_below(n_simdgroups);
  bool can_run = false;
  for (u32 i = 0; i < n; ++i) can_run |= ready[i]->simdgroup == ahead;
  if (!can_run) ahead = ready[0]->simdgroup;
  u32 kept = 0;
  for (u32 i = 0; i < n; ++i)
    if (ready[i]->simdgroup == ahead) ready[kept++] = ready[i];
  return kept;
}

static void place_threads(const u32 *group, const u32 *groups) {
  u32 size[3], origin[3], full = 1;
  n_threads = 1;
  for (int d = 0; d < 3; ++d) {  // groups at the edge of the grid are smaller
    origin[d] = group[d] * launch->group[d];
    u32 left = launch->grid[d] - origin[d];
    size[d] = left < launch->group[d] ? left : launch->group[d];
    n_threads *= size[d];
    full *= launch->group[d];
  }
  n_simdgroups = (n_threads + 31) / 32;
  for (u32 i = 0; i < n_threads; ++i) {
    Thread &t = threads[i];
    Position &p = t.position;
    const u32 in_group[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int d = 0; d < 3; ++d) {
      p.in_group[d] = in_group[d];
      p.in_grid[d] = origin[d] + in_group[d];
      p.of_group[d] = group[d];
      p.grid_size[d] = launch->grid[d];
      p.groups[d] = groups[d];
      p.group_size[d] = size[d];
      p.full_group_size[d] = launch->group[d];
    }
    p.index = i;
    p.lane = t.lane = i & 31;
    p.simdgroup = t.simdgroup = i >> 5;
    p.simdgroups = n_simdgroups;
    p.full_simdgroups = (full + 31) / 32;
    t.id = 1 + (group_index << 10 | i);
    t.stack = stacks + i * STACK;
    start_thread(t);
  }
}

static void run_threadgroup(const u32 *group, const u32 *groups) {
  static Thread *ready[MAX_THREADS];
  place_threads(group, groups);
  memset(group_barriers, 0, sizeof group_barriers);
  memset(simdgroup_barriers, 0, sizeof simdgroup_barriers);
  for (u32 i = 0; i < n_variables; ++i) memset(threadgroup_memory[i].base, 0xff, threadgroup_memory[i].size);
  for (u32 ahead = ~0u;;) {
    u32 n = ready_threads(ready, ahead);
    for (u32 i = 0; i < n; ++i) {
      running = ready[i];
      msl_switch(&scheduler_stack_pointer, running->stack_pointer);
      running = nullptr;
      if (stopped) return;
    }
    bool moved = n != 0;
    if (launch->order == RANDOM && n) {
      release_simdgroup(ready[0]->simdgroup);
    } else {
      moved = false;
      for (u32 i = 0; i < n_threads; ++i) moved |= threads[i].state == READY;
      for (u32 s = 0; s < n_simdgroups && !moved && !stopped; ++s)
        moved |= release_simdgroup(launch->order == REVERSE ? n_simdgroups - 1 - s : s);
      if (!moved && !stopped) moved = release_threadgroup();
    }
    if (stopped || !moved) return;
  }
}
