  // Threadgroups: (32 dimensions, heads, sequences), a thread for each dimension. The largest score was known before,
  // so that chunks are only added.
  const int dim = int(thread_position_in_grid.x);
  const int head = int(threadgroup_position_in_grid.y);
  const int sequence = int(threadgroup_position_in_grid.z);
  const int chunks = parts_shape[2];
  const int length = lengths[sequence];
  const int first = window > 0 ? max(length - window, 0) : 0;
  if (dim >= DH) return;
  const long slot = (long(sequence) * parts_shape[1] + head) * chunks;
  float total = 0.0f;
  float acc = 0.0f;
  for (int chunk = first / CHUNK; chunk * CHUNK < length; ++chunk) {
    acc += parts[(slot + chunk) * DH + dim];
    total += sums[slot + chunk];
  }
  out[(long(sequence) * parts_shape[1] + head) * DH + dim] = T(length > 0 ? acc / total : 0.0f);
