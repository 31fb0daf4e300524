  // A thread for each unit: the tokens' votes, in order.
  const int at = int(thread_position_in_grid.x);
  const int tokens = scores_shape[0];
  const int units = scores_shape[1];
  if (at >= units) return;
  float sum = 0.0f;
  for (int n = 0; n < tokens; ++n) {
    if (ACTIVE && !active[n]) continue;
    const float score = float(scores[long(n) * units + at]);
    // A NaN votes for nothing.
    sum += score > 0.0f ? score : 0.0f;
  }
  sums[at] = sum;
