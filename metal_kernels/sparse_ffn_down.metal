  // Threadgroups: (256 outputs, CHUNK list entries, TOKENS tokens). The simdgroups share the entries of a chunk
  // evenly; what they found is added in order.
  threadgroup float found[SIMDGROUPS * 256];
  const int lane = int(thread_index_in_simdgroup);
  const int sg = int(simdgroup_index_in_threadgroup);
  const int at = int(threadgroup_position_in_grid.x) * 256 + lane * 8;
  const int chunk = int(threadgroup_position_in_grid.y);
  const int tile = int(threadgroup_position_in_grid.z);
  const int list = SHARED ? 0 : tile;
  const int units = indices_shape[1];
  const int count = min(counts[list], units) * BLOCK;
  if (chunk * CHUNK >= count) return;
  const int end_of_chunk = min(count, (chunk + 1) * CHUNK);
  const int share = ((end_of_chunk - chunk * CHUNK + SIMDGROUPS - 1) / SIMDGROUPS + 3) / 4 * 4;
  const int begin = chunk * CHUNK + sg * share;
  const int end = min(end_of_chunk, begin + share);
  const int tokens = h_shape[0];
  Sums<TOKENS> sums;
  clear(sums);
  long group = -1;
  for (int entry = begin; entry < end; entry += 4) {
    // Four rows are asked for before the first is used.
    long rows[4];
    Outputs<BITS> held[4];
    for (int j = 0; j < 4; ++j) {
      int own = min(entry + j, end - 1);
      rows[j] = long(indices[long(list) * units + own / BLOCK]) * BLOCK + own % BLOCK;
      read_outputs(held[j], down, rows[j], at, outputs);
    }
    for (int j = 0; j < 4 && entry + j < end; ++j) {
      if (BITS != 0 && rows[j] / GROUP != group) {
        if (group >= 0) finish_group<BITS>(sums, scales, biases, group, at, outputs);
        group = rows[j] / GROUP;
      }
      float factors[TOKENS];
      for (int t = 0; t < TOKENS; ++t) {
        factors[t] = h[long(min(tile * TOKENS + t, tokens - 1)) * h_shape[1] + entry + j];
      }
      add_row<TOKENS, BITS>(sums, held[j], factors);
    }
  }
  if (BITS == 0 || group >= 0) finish_group<BITS>(sums, scales, biases, group, at, outputs);
  const int thread_index = int(thread_index_in_threadgroup);
  for (int t = 0; t < TOKENS && tile * TOKENS + t < tokens; ++t) {
    for (int i = 0; i < 8; ++i) found[sg * 256 + i * 32 + lane] = sums.done[t][i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < 256; i += SIMDGROUPS * 32) {
      float total = 0.0f;
      for (int s = 0; s < SIMDGROUPS; ++s) total += found[s * 256 + i];
      int output = int(threadgroup_position_in_grid.x) * 256 + i % 32 * 8 + i / 32;
      if (output < outputs) parts[(long(chunk) * tokens + tile * TOKENS + t) * outputs + output] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
