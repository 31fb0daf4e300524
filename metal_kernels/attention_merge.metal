  // Threadgroups: (32 dimensions, heads, sequences), a thread for each dimension. 0 where a head is not listed or sees
  // nothing.
  const uint lane = thread_index_in_simdgroup;
  const int dim = int(thread_position_in_grid.x);
  const int head = int(threadgroup_position_in_grid.y);
  const int sequence = int(threadgroup_position_in_grid.z);
  const int n_heads = parts_shape[1];
  const int chunks = parts_shape[2];
  const int length = lengths[sequence];
  const int first = window > 0 ? max(length - window, 0) : 0;
  bool run = length > 0;
  if (LISTED) {
    const int units = heads_shape[1];
    run = listed_heads<1, PER_UNIT>(heads + sequence * units, min(counts[sequence], units), head, lane) != 0 && run;
  }
  const long slot = (long(sequence) * n_heads + head) * chunks;
  float high = -INFINITY;
  float total = 0.0f;
  float acc = 0.0f;
  if (run && dim < DH) {
    for (int chunk = first / CHUNK; chunk * CHUNK < length; ++chunk) {
      const float theirs = largests[slot + chunk];
      const float now = max(high, theirs);
      const float shrink = high > -INFINITY ? exp2(high - now) : 0.0f;
      const float weight = exp2(theirs - now);
      total = total * shrink + sums[slot + chunk] * weight;
      acc = acc * shrink + parts[(slot + chunk) * DH + dim] * weight;
      high = now;
    }
  }
  if (dim < DH) out[(long(sequence) * n_heads + head) * DH + dim] = T(run ? acc / total : 0.0f);
