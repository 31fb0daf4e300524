// Rows of down, neuron-major: eight neighbouring outputs of each lane.
//
// Quantized rows are padded to whole eights of outputs; scales are [neurons / GROUP, outputs], padded alike. Products
// of a group are added before its scale is read, so that a list in order reads a scale once for all its neurons of the
// group.

template <int BITS>
struct Outputs {
  uint2 words;
};

template <>
struct Outputs<0> {
  float values[8];
};

template <typename P>
inline void read_outputs(thread Outputs<0>& held, P down, long row, int at, int out) {
  auto mine = down + row * out + at;
  for (int i = 0; i < 8; ++i) held.values[i] = at + i < out ? float(mine[i]) : 0.0f;
}

template <typename P>
inline void read_outputs(thread Outputs<4>& held, P down, long row, int at, int out) {
  held.words[0] = at < out ? down[row * ((out + 7) / 8) + at / 8] : 0u;
}

inline void read_outputs(thread Outputs<8>& held, const device uint* down, long row, int at, int out) {
  if (at < out) held.words = *reinterpret_cast<const device uint2*>(down + row * ((out + 7) / 8 * 2) + at / 4);
}

inline float code_of(thread const Outputs<0>& held, int i) {
  return held.values[i];
}

inline float code_of(thread const Outputs<4>& held, int i) {
  return float((held.words[0] >> (4 * i)) & 15u);
}

inline float code_of(thread const Outputs<8>& held, int i) {
  return float((held.words[i / 4] >> (8 * (i % 4))) & 255u);
}

// Sums of one lane: `done`, and the codes' and factors' of the group that is being added.
template <int TOKENS>
struct Sums {
  float done[TOKENS][8];
  float dots[TOKENS][8];
  float factors[TOKENS];
};

template <int TOKENS>
inline void clear(thread Sums<TOKENS>& sums) {
  for (int t = 0; t < TOKENS; ++t) {
    sums.factors[t] = 0.0f;
    for (int i = 0; i < 8; ++i) sums.done[t][i] = sums.dots[t][i] = 0.0f;
  }
}

template <int BITS, int TOKENS, typename S>
inline void finish_group(thread Sums<TOKENS>& sums, S scales, S biases, long group, int at, int out) {
  if (BITS != 0 && at >= out) return;
  long begin = group * ((out + 7) / 8 * 8) + at;
  for (int i = 0; i < 8; ++i) {
    float scale = BITS != 0 ? float(scales[begin + i]) : 1.0f;
    float bias = BITS != 0 ? float(biases[begin + i]) : 0.0f;
    for (int t = 0; t < TOKENS; ++t) {
      sums.done[t][i] += scale * sums.dots[t][i] + bias * sums.factors[t];
      sums.dots[t][i] = 0.0f;
    }
  }
  for (int t = 0; t < TOKENS; ++t) sums.factors[t] = 0.0f;
}

template <int TOKENS, int BITS>
inline void add_row(
    thread Sums<TOKENS>& sums, thread const Outputs<BITS>& held, thread const float (&factors)[TOKENS]) {
  for (int t = 0; t < TOKENS; ++t) sums.factors[t] += factors[t];
  for (int i = 0; i < 8; ++i) {
    float code = code_of(held, i);
    for (int t = 0; t < TOKENS; ++t) sums.dots[t][i] += factors[t] * code;
  }
}
