  // A threadgroup for each row of a mask [rows, units].
  threadgroup uint before[32];
  const long row = long(threadgroup_position_in_grid.x);
  const int units = mask_shape[1];
  const int threads = int(threads_per_threadgroup.x);
  uint listed = 0;
  for (int start = 0; start < units; start += threads) {
    const int at = start + int(thread_index_in_threadgroup);
    const bool take = at < units && mask[row * units + at];
    const uint place = places_of(take, listed, before, simdgroup_index_in_threadgroup,
                                          thread_index_in_simdgroup, simdgroups_per_threadgroup);
    if (take) indices[row * units + place] = at;
  }
  if (thread_index_in_threadgroup == 0) counts[row] = int(listed);
