// What the parts of the runtime share. Freestanding: no headers, no C++ library; libc's functions are found when loading.
#pragma once
typedef __UINT8_TYPE__ u8;
typedef __UINT32_TYPE__ u32;
typedef __INT32_TYPE__ i32;
typedef __UINT64_TYPE__ u64;
typedef __INT64_TYPE__ i64;

extern "C" {
void *memcpy(void *, const void *, __SIZE_TYPE__);
void *memmove(void *, const void *, __SIZE_TYPE__);
void *memset(void *, int, __SIZE_TYPE__);
void *mmap(void *, __SIZE_TYPE__, int, int, int, long);
int munmap(void *, __SIZE_TYPE__);
int mprotect(void *, __SIZE_TYPE__, int);
}
enum { PROT_NONE = 0, PROT_READ_WRITE = 3, MAP_PRIVATE_ANONYMOUS_NORESERVE = 0x2 | 0x20 | 0x4000 };

// The structs that Python fills in or reads; `native.py` has the same.
enum Kind : u32 {
  OUT_OF_BOUNDS = 1, RACE_WRITES, RACE_READ, UNINITIALISED, WRITE_TO_INPUT, DIVERGENT_BARRIER, DIVERGENT_SIMD,
  FINISHED_LANES, INACTIVE_LANE, UNDEFINED, UNWRITTEN, ENDLESS,
};
enum { OUTSIDE_OF_ARRAY = 1, DIVISION, OVERFLOW, NOT_ALIGNED };  // of UNDEFINED
enum { FORWARD, REVERSE, RANDOM };
enum { WRITABLE = 1, INITIALISED = 2, THREADGROUP = 4 };
enum { UNKNOWN_REGION = 9999, FIRST_THREADGROUP_REGION = 1000, MAX_BUFFERS = 64, MAX_VARIABLES = 256 };

struct Who { u32 group, thread; };
struct Finding {
  u32 kind, region;
  i64 offset;
  u32 size, write;
  Who a, b;
  u32 site_a, site_b;
  u64 count;
};
struct Buffer { u8 *base; u64 size; u32 element, flags; };
struct Launch {
  u32 grid[3], group[3];
  u64 seed;
  u32 order, preempt, n_buffers, n_findings, max_findings, failed;
  Buffer *buffers;
  Finding *findings;
  u64 accesses, simd_operations, barriers, groups, max_steps;
};

// What a thread's attributes are read from; the compiled entry point has the same struct.
struct Position {
  u32 in_grid[3], in_group[3], of_group[3], grid_size[3], groups[3], group_size[3], full_group_size[3];
  u32 index, lane, simdgroup, simdgroups, full_simdgroups;
};
struct Variable { u8 *base; u64 size; u32 element, padding; const char *name; };
extern "C" {
__attribute__((visibility("hidden"))) void msl_entry(void **buffers, const Position *position);
__attribute__((visibility("hidden"))) extern Variable msl_variables[];
__attribute__((visibility("hidden"))) extern u32 msl_variable_count;
// The place in the source of the call that follows: the compiled code stores it before every call to the runtime.
__attribute__((visibility("hidden"))) u32 msl_site = 0;
}

static Launch *launch;
static bool stopped;
static u32 group_index;
static u64 random_state;

static u32 random_below(u32 n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (u32)(random_state >> 32) % n;
}

// A thread's number: 1 + group * 1024 + thread. 0 is nobody.
static Who who(u32 id) { return id ? Who{(id - 1) >> 10, (id - 1) & 1023} : Who{0, 0}; }
static u32 group_of(u32 id) { return (id - 1) >> 10; }
static u32 simdgroup_of(u32 id) { return (id - 1) >> 5; }

// One finding for each pair of places: later ones are counted.
static void report(Kind kind, u32 region, i64 offset, u32 size, bool write, u32 a, u32 site_a, u32 b = 0, u32 site_b = 0) {
  for (u32 i = 0; i < launch->n_findings; ++i) {
    Finding &f = launch->findings[i];
    if (f.kind == kind && f.region == region && f.site_a == site_a && f.site_b == site_b) {
      f.count++;
      return;
    }
  }
  if (launch->n_findings < launch->max_findings)
    launch->findings[launch->n_findings++] = {kind, region, offset, size, write, who(a), who(b), site_a, site_b, 1};
}
