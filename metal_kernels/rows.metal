// Products of listed rows of gate and up with tokens, and rows of down for outputs.
//
// BITS is 0 for floats, 4 or 8; GROUP the values of a scale. A lane reads 16 bytes of a row at a time: 32 codes of 4
// bits, 16 of 8, 8 of float16. Sums are taken in the same order however many rows and tokens a simdgroup has.

constexpr constant float FACTORS[4] = {1.0f, 0.0625f, 0.00390625f, 0.000244140625f};

template <int BITS>
struct Bits {};

template <int BITS, int N>
struct Held {
  uint4 words;
};

template <int N>
struct Held<0, N> {
  float values[N];
};

template <int N, typename P>
inline void read_piece(Bits<0>, thread Held<0, N>& held, P weight, long row, int k, int width) {
  auto at = weight + row * width + k;
  for (int i = 0; i < N; ++i) held.values[i] = k + i < width ? float(at[i]) : 0.0f;
}

template <int N, int BITS>
inline void read_piece(Bits<BITS>, thread Held<BITS, N>& held, const device uint* weight, long row, int k, int width) {
  // Rows are whole groups, so that they begin at whole 16 bytes.
  held.words = *reinterpret_cast<const device uint4*>(weight + row * (width * BITS / 32) + k * BITS / 32);
}

template <int N, int P>
inline void codes_of(Bits<0>, thread const Held<0, N>& held, int, thread float (&codes)[P]) {
  for (int i = 0; i < P; ++i) codes[i] = held.values[i];
}

// Nibbles stay where they are in 16 bits, which makes them 1, 16, 256 or 4096 times as large; inputs make up for it.
template <int N, int P>
inline void codes_of(Bits<4>, thread const Held<4, N>& held, int part, thread float (&codes)[P]) {
  for (int w = 0; w < 2; ++w) {
    uint word = held.words[2 * part + w];
    ushort2 halves = as_type<ushort2>(word);
    for (int i = 0; i < 4; ++i) {
      codes[8 * w + i] = float(halves[0] & ushort(15 << (4 * i)));
      codes[8 * w + 4 + i] = float(halves[1] & ushort(15 << (4 * i)));
    }
  }
}

template <int N, int P>
inline void codes_of(Bits<8>, thread const Held<8, N>& held, int, thread float (&codes)[P]) {
  for (int w = 0; w < 4; ++w) {
    uint word = held.words[w];
    for (int i = 0; i < 4; ++i) codes[4 * w + i] = float((word >> (8 * i)) & 255u);
  }
}

template <int GROUP, typename S>
inline float finished(Bits<0>, float dot, float, S, S, long, int, int) {
  return dot;
}

template <int GROUP, int BITS, typename S>
inline float finished(Bits<BITS>, float dot, float sum, S scales, S biases, long row, int k, int width) {
  long at = row * (width / GROUP) + k / GROUP;
  return float(scales[at]) * dot + float(biases[at]) * sum;
}

// Adds products of rows of gate (where GATED) and up with tokens. `inputs` is where each token's begin.
template <int BITS, int GROUP, bool GATED, int N, int TOKENS, int ROWS, typename W, typename S, typename X>
inline void add_products(
    W gate, S gate_scales, S gate_biases, W up, S up_scales, S up_biases, X x, thread const long (&rows)[ROWS],
    thread const long (&inputs)[TOKENS], int width, int lane, thread float (&g)[TOKENS][ROWS],
    thread float (&u)[TOKENS][ROWS]) {
  constexpr int P = N < 16 ? N : 16;
  for (int k = lane * N; k < width; k += 32 * N) {
    Held<BITS, N> ups[ROWS];
    Held<BITS, N> gates[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      read_piece<N>(Bits<BITS>(), ups[r], up, rows[r], k, width);
      if (GATED) read_piece<N>(Bits<BITS>(), gates[r], gate, rows[r], k, width);
    }
    float up_dots[TOKENS][ROWS];
    float gate_dots[TOKENS][ROWS];
    float sums[TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
      sums[t] = 0.0f;
      for (int r = 0; r < ROWS; ++r) up_dots[t][r] = gate_dots[t][r] = 0.0f;
    }
    for (int part = 0; part < N / P; ++part) {
      float values[TOKENS][P];
      for (int t = 0; t < TOKENS; ++t) {
        for (int i = 0; i < P; ++i) {
          int at = k + part * P + i;
          float value = BITS != 0 || at < width ? float(x[inputs[t] + at]) : 0.0f;
          sums[t] += value;
          values[t][i] = BITS == 4 ? value * FACTORS[i % 4] : value;
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        float codes[P];
        codes_of<N, P>(Bits<BITS>(), ups[r], part, codes);
        for (int t = 0; t < TOKENS; ++t) {
          for (int i = 0; i < P; ++i) up_dots[t][r] += codes[i] * values[t][i];
        }
        if (GATED) {
          codes_of<N, P>(Bits<BITS>(), gates[r], part, codes);
          for (int t = 0; t < TOKENS; ++t) {
            for (int i = 0; i < P; ++i) gate_dots[t][r] += codes[i] * values[t][i];
          }
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      for (int r = 0; r < ROWS; ++r) {
        u[t][r] += finished<GROUP>(Bits<BITS>(), up_dots[t][r], sums[t], up_scales, up_biases, rows[r], k, width);
        if (GATED) {
          g[t][r] +=
              finished<GROUP>(Bits<BITS>(), gate_dots[t][r], sums[t], gate_scales, gate_biases, rows[r], k, width);
        }
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < ROWS; ++r) {
      u[t][r] = simd_sum(u[t][r]);
      if (GATED) g[t][r] = simd_sum(g[t][r]);
    }
  }
}
