  // Threadgroups: (SIMDGROUPS * ROWS list entries, TOKENS tokens). A simdgroup computes ROWS neurons of TOKENS tokens.
  const int lane = int(thread_index_in_simdgroup);
  const int sg = int(threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup);
  const int first = sg * ROWS;
  const int tile = int(threadgroup_position_in_grid.y);
  const int list = SHARED ? 0 : tile;
  const int units = indices_shape[1];
  const int count = min(counts[list], units) * BLOCK;
  if (first >= count) return;
  const int tokens = x_shape[0];
  const int width = x_shape[1];
  // Entries and tokens that are missing repeat the last one, which is in the cache; they are not stored.
  long rows[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    int entry = min(first + r, count - 1);
    rows[r] = long(indices[long(list) * units + entry / BLOCK]) * BLOCK + entry % BLOCK;
  }
  long inputs[TOKENS];
  for (int t = 0; t < TOKENS; ++t) inputs[t] = long(min(tile * TOKENS + t, tokens - 1)) * width;
  float g[TOKENS][ROWS];
  float u[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < ROWS; ++r) g[t][r] = u[t][r] = 0.0f;
  }
  add_products<BITS, GROUP, GATED, N>(
      gate, gate_scales, gate_biases, up, up_scales, up_biases, x, rows, inputs, width, lane, g, u);
  // Each lane finishes one neuron of one token.
  float mine_g = 0.0f;
  float mine_u = 0.0f;
  long row = 0;
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < ROWS; ++r) {
      if (lane == t * ROWS + r) {
        mine_g = g[t][r];
        mine_u = u[t][r];
        row = rows[r];
      }
    }
  }
  const int token = tile * TOKENS + lane / ROWS;
  const int entry = first + lane % ROWS;
  if (lane >= TOKENS * ROWS || token >= tokens || entry >= count) return;
  if (UP_BIAS) mine_u += float(up_bias[row]);
  if (GATED) {
    if (GATE_BIAS) mine_g += float(gate_bias[row]);
    mine_u *= activate<KIND>(mine_g);
  } else {
    mine_u = activate<KIND>(mine_u);
  }
  if (VALUED) mine_u *= float(values[long(token) * values_shape[1] + row]);
  h[long(token) * (long(units) * BLOCK) + entry] = mine_u;
