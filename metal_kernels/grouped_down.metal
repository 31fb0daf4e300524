  // Threadgroups: (256 outputs, TOKENS tokens). The simdgroups share the neurons of all experts that any of the tokens
  // asked for; what they found is added in order.
  threadgroup float found[SIMDGROUPS * 256];
  const int lane = int(thread_index_in_simdgroup);
  const int sg = int(simdgroup_index_in_threadgroup);
  const int at = int(threadgroup_position_in_grid.x) * 256 + lane * 8;
  const int tile = int(threadgroup_position_in_grid.y);
  const int tokens = h_shape[0];
  const int neurons = h_shape[1];
  const int experts = lists_shape[1];
  const int count = counts[tile] * BLOCK;
  const int share = ((count + SIMDGROUPS - 1) / SIMDGROUPS + 3) / 4 * 4;
  const int begin = sg * share;
  const int end = min(count, begin + share);
  Sums<TOKENS> sums;
  clear(sums);
  long group = -1;
  for (int entry = begin; entry < end; entry += 4) {
    // Four rows are asked for before the first is used.
    long rows[4];
    Outputs<BITS> held[4];
    for (int j = 0; j < 4; ++j) {
      const int own = min(entry + j, end - 1);
      rows[j] = long(lists[long(tile) * experts + own / BLOCK]) * BLOCK + own % BLOCK;
      read_outputs(held[j], down, rows[j], at, outputs);
    }
    for (int j = 0; j < 4 && entry + j < end; ++j) {
      if (BITS != 0 && rows[j] / GROUP != group) {
        if (group >= 0) finish_group<BITS>(sums, scales, biases, group, at, outputs);
        group = rows[j] / GROUP;
      }
      float factors[TOKENS];
      for (int t = 0; t < TOKENS; ++t) {
        const long token = tile * TOKENS + t;
        // h of experts that a token did not ask for was never written.
        const bool asked = token < tokens && mask[token * experts + rows[j] / BLOCK];
        factors[t] = asked ? float(h[token * neurons + rows[j]]) : 0.0f;
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
      const int output = int(threadgroup_position_in_grid.x) * 256 + i % 32 * 8 + i / 32;
      if (output < outputs) {
        const long place = long(tile * TOKENS + t) * outputs + output;
        if (BIAS) total += float(bias[output]);
        if (RESIDUAL) total += float(residual[place]);
        y[place] = T(total);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
