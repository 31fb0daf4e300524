  // A threadgroup for each row of scores [rows, units * GROUP].
  threadgroup atomic_uint bins[256];
  threadgroup uint before[32];
  threadgroup uint choice[2];
  const long row = long(threadgroup_position_in_grid.x);
  const int units = scores_shape[1] / GROUP;
  const int threads = int(threads_per_threadgroup.x);
  const int me = int(thread_index_in_threadgroup);
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  auto mine = scores + row * (long(units) * GROUP);
  // The digits of the k-th largest key that are known, and its rank among the keys that begin with them.
  uint known = 0;
  uint rank = uint(k);
  for (int digit = 0; digit < 4; ++digit) {
    const uint shift = uint(24 - 8 * digit);
    for (int bin = me; bin < 256; bin += threads) atomic_store_explicit(&bins[bin], 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int at = me; at < units; at += threads) {
      const uint key = key_of<GROUP>(mine, at);
      if (digit == 0 || (key >> (shift + 8)) == known) {
        atomic_fetch_add_explicit(&bins[(key >> shift) & 255u], 1u, memory_order_relaxed);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // The first simdgroup finds the bin: a lane holds eight of them, the largest digits in lane 0.
    if (sg == 0) {
      uint counted[8];
      uint total = 0;
      for (int i = 0; i < 8; ++i) {
        counted[i] = atomic_load_explicit(&bins[255 - (int(lane) * 8 + i)], memory_order_relaxed);
        total += counted[i];
      }
      uint above = simd_prefix_exclusive_sum(total);
      for (int i = 0; i < 8; ++i) {
        if (above < rank && rank <= above + counted[i]) {
          choice[0] = 255u - (lane * 8u + uint(i));
          choice[1] = rank - above;
        }
        above += counted[i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    known = (known << 8) | choice[0];
    rank = choice[1];
  }
  uint listed = 0;
  uint equals = 0;
  for (int start = 0; start < units; start += threads) {
    const int at = start + me;
    const uint key = at < units ? key_of<GROUP>(mine, at) : 0u;
    const bool equal = at < units && key == known;
    // Of equal keys the first `rank` are taken.
    const uint order = places_of(equal, equals, before, sg, lane, simdgroups_per_threadgroup);
    const bool take = at < units && (key > known || (equal && order < rank));
    const uint place = places_of(take, listed, before, sg, lane, simdgroups_per_threadgroup);
    if (take) indices[row * k + place] = at;
  }
  if (me == 0) counts[row] = int(listed);
