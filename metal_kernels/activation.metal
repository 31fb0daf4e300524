// Activations of float32 values. KIND is the place of a name in KINDS of launch.py.

// Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at most. Metal has no erf.
inline float error_function(float x) {
  float t = 1.0f / (1.0f + 0.3275911f * fabs(x));
  float sum = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  float y = 1.0f - sum * exp(-x * x);
  return x < 0.0f ? -y : y;
}

template <int KIND>
inline float activate(float x) {
  if (KIND == 0) return x / (1.0f + exp(-x));
  if (KIND == 1) return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
  // Not fast::tanh, which is NaN for large values.
  if (KIND == 2) return 0.5f * x * (1.0f + precise::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  if (KIND == 3) return max(x, 0.0f);
  if (KIND == 4) return fabs(x);
  return x;
}
