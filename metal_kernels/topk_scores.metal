  // Threadgroups: (chunks of CHUNK keys, KV heads in TILES of HT query heads, sequences). Scores by the first R
  // dimensions, and of each chunk mean, squared deviations and largest.
  threadgroup float counted[SIMDGROUPS];
  threadgroup float own_means[SIMDGROUPS * HT];
  threadgroup float own_squares[SIMDGROUPS * HT];
  threadgroup float highs[SIMDGROUPS * HT];
  const uint lane = thread_index_in_simdgroup;
  const int sg = int(simdgroup_index_in_threadgroup);
  const int chunk = int(threadgroup_position_in_grid.x);
  const int kv = int(threadgroup_position_in_grid.y) / TILES;
  const int tile = int(threadgroup_position_in_grid.y) % TILES;
  const int sequence = int(threadgroup_position_in_grid.z);
  const int here = min(HT, QUERIES - tile * HT);
  const int head = kv * QUERIES + tile * HT;
  const int length = lengths[sequence];
  const int first = window > 0 ? max(length - window, 0) : 0;
  const int start = max(chunk * CHUNK, first);
  const int end = min(length, (chunk + 1) * CHUNK);
  if (start >= end) return;
  const uint run = (1u << here) - 1u;
  const int begin = int(lane) % LK * EL;
  T query[HT][EL];
  float mean[HT];
  float square[HT];
  float high[HT];
  for (int g = 0; g < HT; ++g) {
    mean[g] = square[g] = 0.0f;
    high[g] = -INFINITY;
    for (int i = 0; i < EL; ++i) {
      const bool inside = g < here && begin + i < R;
      query[g][i] =
          inside ? q[sequence * q_strides[0] + (head + g) * q_strides[1] + (begin + i) * q_strides[2]] : T(0);
    }
  }
  float before = 0.0f;
  for (int keys_at = chunk * CHUNK + sg * 32; keys_at < end; keys_at += SIMDGROUPS * 32) {
    if (keys_at + 32 <= start) continue;
    const int own = keys_at + int(lane);
    const bool seen = own >= start && own < end;
    const int own_page = page_of<PAGED, PAGE>(table, sequence, table_shape[1], own, seen);
    float score[HT];
    for (int g = 0; g < HT; ++g) score[g] = 0.0f;
    products_of_32<LK, R, PAGED, PAGE>(
        keys + kv * keys_strides[2], keys_strides, own_page, keys_at, start, end, run, lane, query, score);
    const float now = simd_sum(seen ? 1.0f : 0.0f);
    for (int g = 0; g < here; ++g) {
      const float s = score[g] * scale;
      if (seen) scores[(long(sequence) * (KV_HEADS * QUERIES) + head + g) * longest + own] = s;
      // Mean and squared deviations of the 32, merged with those before them.
      const float average = simd_sum(seen ? s : 0.0f) / now;
      const float away = seen ? s - average : 0.0f;
      const float apart = average - mean[g];
      square[g] += simd_sum(away * away) + apart * apart * (before * now / (before + now));
      mean[g] += apart * (now / (before + now));
      high[g] = max(high[g], simd_max(seen ? s : -INFINITY));
    }
    before += now;
  }
  if (lane == 0) {
    counted[sg] = before;
    for (int g = 0; g < HT; ++g) {
      own_means[sg * HT + g] = mean[g];
      own_squares[sg * HT + g] = square[g];
      highs[sg * HT + g] = high[g];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int g = int(thread_index_in_threadgroup);
  if (g >= here) return;
  float total = 0.0f;
  float all_mean = 0.0f;
  float all_square = 0.0f;
  float largest = -INFINITY;
  for (int s = 0; s < SIMDGROUPS; ++s) {
    const float now = counted[s];
    if (now == 0.0f) continue;
    const float apart = own_means[s * HT + g] - all_mean;
    all_square += own_squares[s * HT + g] + apart * apart * (total * now / (total + now));
    all_mean += apart * (now / (total + now));
    largest = max(largest, highs[s * HT + g]);
    total += now;
  }
  const long slot = (long(sequence) * (KV_HEADS * QUERIES) + head + g) * chunks + chunk;
  means[slot] = all_mean;
  squares[slot] = all_square;
  largests[slot] = largest;
