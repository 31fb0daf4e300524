// Device and threadgroup memory: bounds, what was written, and who accessed an element without a barrier between.
//
// Every element has a cell: its last writer and three readers, each with the number of barriers passed by then. Device and
// threadgroup memory have barriers of their own, so one with the wrong mem_flags orders nothing.
#pragma once
#include "threads.h"

enum Space { IN_THREADGROUP, IN_DEVICE };
static u32 group_barriers[2], simdgroup_barriers[2][32];  // passed so far, by memory; by memory and simdgroup

struct Access { u32 id, site, group_barriers, simdgroup_barriers : 31, atomic : 1; };
struct Cell { Access writer, reader, reader_before, reader_elsewhere; };
struct Region {
  u8 *base;
  u64 size;
  u32 element, number, flags;
  Cell *cells;
};
static Region device_memory[MAX_BUFFERS], threadgroup_memory[MAX_VARIABLES];
static u32 n_device, n_variables;
static const u64 GUARD = 1ull << 32;  // between buffers: a wild index stays near the buffer that it missed
static const u64 RED_ZONE = 4096;     // behind every threadgroup variable

// Whether `before` is ordered before what thread `id` does now.
static bool ordered(const Access &before, u32 id, Space space) {
  if (before.id == id) return true;
  if (group_of(before.id) != group_index) return space == IN_THREADGROUP;  // else another threadgroup: never
  if (before.group_barriers < group_barriers[space]) return true;
  return simdgroup_of(before.id) == simdgroup_of(id) &&
         before.simdgroup_barriers < simdgroup_barriers[space][running->simdgroup];
}
static bool races(const Access &before, const Access &now, Space space) {
  return before.id && !(before.atomic && now.atomic) && !ordered(before, now.id, space);
}

static void read_cell(Region &r, Cell &c, i64 offset, u32 size, const Access &now, Space space) {
  // threadgroup memory holds nothing when a threadgroup starts
  bool written = c.writer.id && (space == IN_DEVICE || group_of(c.writer.id) == group_index);
  if (!written && !(r.flags & INITIALISED)) report(UNINITIALISED, r.number, offset, size, false, now.id, now.site);
  if (written && races(c.writer, now, space))
    report(RACE_READ, r.number, offset, size, false, now.id, now.site, c.writer.id, c.writer.site);
  if (c.reader.id != now.id) {
    if (c.reader.id && simdgroup_of(c.reader.id) != simdgroup_of(now.id)) c.reader_elsewhere = c.reader;
    c.reader_before = c.reader;
  }
  c.reader = now;
}
static void write_cell(Region &r, Cell &c, i64 offset, u32 size, const Access &now, Space space) {
  if (races(c.writer, now, space))
    report(RACE_WRITES, r.number, offset, size, true, now.id, now.site, c.writer.id, c.writer.site);
  const Access *readers[] = {&c.reader, &c.reader_before, &c.reader_elsewhere};
  for (const Access *reader : readers)
    if (races(*reader, now, space)) {
      report(RACE_READ, r.number, offset, size, true, now.id, now.site, reader->id, reader->site);
      break;
    }
  c.writer = now;
}
static void check(Region &r, u8 *p, u32 size, bool write, bool atomic, u32 align, u32 site) {
  i64 offset = p - r.base;
  step(launch->accesses);
  if (offset < 0 || offset + size > r.size) {
    report(OUT_OF_BOUNDS, r.number, offset, size, write, running->id, site);
    stop();
  }
  if ((u64)p % align) {
    report(UNDEFINED, NOT_ALIGNED, 0, size, write, running->id, site);
    stop();
  }
  if (!r.cells) {  // an input
    if (!write) return;
    report(WRITE_TO_INPUT, r.number, offset, size, write, running->id, site);
    stop();
  }
  Space space = r.flags & THREADGROUP ? IN_THREADGROUP : IN_DEVICE;
  Access now = {running->id, site, group_barriers[space], simdgroup_barriers[space][running->simdgroup], atomic};
  for (u64 i = offset / r.element; i <= (offset + size - 1) / r.element; ++i)
    (write ? write_cell : read_cell)(r, r.cells[i], i * r.element, size, now, space);
}

static void access(const void *address, u32 size, bool write, bool atomic = false, u32 align = 1) {
  u32 site = msl_site;
  u8 *p = (u8 *)address;
  if (!running || stopped || (p >= running->stack && p < running->stack + STACK)) return;
  if (launch->preempt && random_below(launch->preempt) == 0) to_scheduler();
  for (u32 i = 0; i < n_device; ++i) {
    Region &r = device_memory[i];
    if (p + GUARD >= r.base && p < r.base + r.size + GUARD) return check(r, p, size, write, atomic, align, site);
  }
  const u64 before_variable[] = {0, RED_ZONE};  // a variable's own red zone comes first
  for (u64 before : before_variable)
    for (u32 i = 0; i < n_variables; ++i) {
      Region &r = threadgroup_memory[i];
      if (p + before >= r.base && p < r.base + r.size + RED_ZONE) return check(r, p, size, write, atomic, align, site);
    }
  if (write || (u64)p < (1 << 20)) {  // reads elsewhere are of constants in the program
    report(OUT_OF_BOUNDS, UNKNOWN_REGION, (i64)p, size, write, running->id, site);
    stop();
  }
}

static struct { void *at; u64 size; } mappings[2 * MAX_BUFFERS + MAX_VARIABLES];
static u32 n_mappings;
static u8 *map(u64 size, u64 guard) {
  const u64 page = 4096, inner = (size + page - 1) / page * page + page, whole = inner + 2 * guard;
  u8 *m = (u8 *)mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0);
  if (m == (u8 *)-1 || mprotect(m + guard, inner, PROT_READ_WRITE)) return nullptr;
  mappings[n_mappings++] = {m, whole};
  return m + guard;
}
static bool map_memory(void **pointers) {
  n_device = n_variables = n_mappings = 0;
  for (u32 i = 0; i < launch->n_buffers; ++i) {
    Buffer &b = launch->buffers[i];
    Region r = {map(b.size, GUARD), b.size, b.element, i, b.flags, nullptr};
    if (b.flags & WRITABLE) r.cells = (Cell *)map((b.size / b.element + 1) * sizeof(Cell), 0);
    if (!r.base || ((b.flags & WRITABLE) && !r.cells)) return false;
    memcpy(r.base, b.base, b.size);
    pointers[i] = r.base;
    device_memory[n_device++] = r;
  }
  for (u32 i = 0; i < msl_variable_count; ++i) {
    Variable &v = msl_variables[i];
    Cell *cells = (Cell *)map((v.size / v.element + 1) * sizeof(Cell), 0);
    if (!cells) return false;
    threadgroup_memory[n_variables++] = {v.base, v.size, v.element, FIRST_THREADGROUP_REGION + i, THREADGROUP, cells};
  }
  return true;
}
static void unmap_memory() {
  for (u32 i = 0; i < n_device; ++i) {
    Region &r = device_memory[i];
    if (!(r.flags & WRITABLE)) continue;
    memcpy(launch->buffers[i].base, r.base, r.size);
    if (stopped || (r.flags & INITIALISED)) continue;
    for (u64 c = 0; c < r.size / r.element; ++c)
      if (!r.cells[c].writer.id) report(UNWRITTEN, r.number, c * r.element, r.element, false, 0, 0);
  }
  for (u32 i = 0; i < n_mappings; ++i) munmap(mappings[i].at, mappings[i].size);
}
