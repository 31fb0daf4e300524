  // Threadgroups: (experts in pieces of SIMDGROUPS * ROWS neurons, TOKENS entries of the expert's list of tokens).
  const int lane = int(thread_index_in_simdgroup);
  const int pieces = (BLOCK + int(simdgroups_per_threadgroup) * ROWS - 1) / (int(simdgroups_per_threadgroup) * ROWS);
  const int expert = int(threadgroup_position_in_grid.x) / pieces;
  const int piece = int(threadgroup_position_in_grid.x) % pieces;
  const int first = (piece * int(simdgroups_per_threadgroup) + int(simdgroup_index_in_threadgroup)) * ROWS;
  const int begin = int(threadgroup_position_in_grid.y) * TOKENS;
  const int count = counts[expert];
  if (begin >= count || first >= BLOCK) return;
  const int tokens = x_shape[0];
  const int width = x_shape[1];
  // Neurons and tokens that are missing repeat the last one, which is in the cache; they are not stored.
  long rows[ROWS];
  for (int r = 0; r < ROWS; ++r) rows[r] = long(expert) * BLOCK + min(first + r, BLOCK - 1);
  int token[TOKENS];
  long inputs[TOKENS];
  for (int t = 0; t < TOKENS; ++t) {
    token[t] = lists[long(expert) * tokens + min(begin + t, count - 1)];
    inputs[t] = long(token[t]) * width;
  }
  float g[TOKENS][ROWS];
  float u[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < ROWS; ++r) g[t][r] = u[t][r] = 0.0f;
  }
  add_products<BITS, GROUP, GATED, N>(
      gate, gate_scales, gate_biases, up, up_scales, up_biases, x, rows, inputs, width, lane, g, u);
  float mine_g = 0.0f;
  float mine_u = 0.0f;
  long row = 0;
  int own = 0;
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < ROWS; ++r) {
      if (lane == t * ROWS + r) {
        mine_g = g[t][r];
        mine_u = u[t][r];
        row = rows[r];
        own = token[t];
      }
    }
  }
  if (lane >= TOKENS * ROWS || begin + lane / ROWS >= count || first + lane % ROWS >= BLOCK) return;
  if (UP_BIAS) mine_u += float(up_bias[row]);
  if (GATED) {
    if (GATE_BIAS) mine_g += float(gate_bias[row]);
    mine_u *= activate<KIND>(mine_g);
  } else {
    mine_u = activate<KIND>(mine_u);
  }
  h[long(own) * neurons + row] = T(mine_u);
