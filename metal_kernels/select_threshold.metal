  // A threadgroup for each row of scores [rows, units].
  threadgroup uint before[32];
  threadgroup float found[32];
  const long row = long(threadgroup_position_in_grid.x);
  const int units = scores_shape[1];
  const int threads = int(threads_per_threadgroup.x);
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  float largest = -INFINITY;
  if (RELATIVE) {
    for (int at = int(thread_index_in_threadgroup); at < units; at += threads) {
      largest = max(largest, float(scores[row * units + at]));
    }
    largest = simd_max(largest);
    if (lane == 0) found[sg] = largest;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    largest = simd_max(lane < simdgroups_per_threadgroup ? found[lane] : -INFINITY);
  }
  uint listed = 0;
  for (int start = 0; start < units; start += threads) {
    const int at = start + int(thread_index_in_threadgroup);
    bool take = false;
    if (at < units) {
      const float score = float(scores[row * units + at]);
      take = RELATIVE ? score >= threshold * largest || score == largest : score > threshold;
    }
    const uint place = places_of(take, listed, before, sg, lane, simdgroups_per_threadgroup);
    if (take) indices[row * units + place] = at;
  }
  if (thread_index_in_threadgroup == 0) counts[row] = int(listed);
