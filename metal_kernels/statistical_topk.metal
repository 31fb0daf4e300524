  // A threadgroup for each row of scores [rows, units].
  threadgroup float found[32];
  threadgroup uint before[32];
  const long row = long(threadgroup_position_in_grid.x);
  const int units = scores_shape[1];
  const int threads = int(threads_per_threadgroup.x);
  const int me = int(thread_index_in_threadgroup);
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  auto mine = scores + row * units;
  float sum = 0.0f;
  for (int at = me; at < units; at += threads) sum += float(mine[at]);
  const float mean = sum_of_all(sum, found, sg, lane, simdgroups_per_threadgroup) / float(units);
  float squares = 0.0f;
  for (int at = me; at < units; at += threads) {
    const float away = float(mine[at]) - mean;
    squares += away * away;
  }
  const float variance = sum_of_all(squares, found, sg, lane, simdgroups_per_threadgroup) / float(units);
  const float border = mean + c * sqrt(variance);
  uint listed = 0;
  for (int start = 0; start < units; start += threads) {
    const int at = start + me;
    bool take = false;
    if (at < units) {
      const float score = float(mine[at]);
      take = score > border;
      values[row * units + at] = max(score - border, 0.0f);
    }
    const uint place = places_of(take, listed, before, sg, lane, simdgroups_per_threadgroup);
    if (take) indices[row * units + place] = at;
  }
  if (me == 0) counts[row] = int(listed);
