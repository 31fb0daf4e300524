  // A thread for each output of each token: the chunks that the token's list fills, in order, bias and residual.
  const int at = int(thread_position_in_grid.x);
  const int token = int(thread_position_in_grid.y);
  const int tokens = parts_shape[1];
  const int out = parts_shape[2];
  if (at >= out) return;
  const int filled = (counts[SHARED ? 0 : token] * BLOCK + CHUNK - 1) / CHUNK;
  float total = 0.0f;
  for (int chunk = 0; chunk < min(filled, chunks); ++chunk) {
    total += parts[(long(chunk) * tokens + token) * out + at];
  }
  if (BIAS) total += float(bias[at]);
  if (RESIDUAL) total += float(residual[long(token) * out + at]);
  y[long(token) * out + at] = T(total);
