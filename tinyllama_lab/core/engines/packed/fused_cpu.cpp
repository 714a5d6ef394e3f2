// Fused loops for CPUs, each of which replaces several passes of PyTorch operations over memory.
// `fused_cpu.py` compiles this file and declares the functions. All tensors are contiguous unless a
// stride is given; sums are in float32. A function exists for each dtype of the base: `_f32` and
// `_bf16`. Results are rounded where the PyTorch operations would round them.

#include <algorithm>
#include <cstring>

#include "bfloat16.h"

namespace {

constexpr int64_t LONGEST = 4096;  // keys of a row of attention scores
constexpr int64_t LANES = 16;      // floats in a vector register

// The value that PyTorch would keep between two operations.
template <typename T> float kept(float x);
template <> inline float kept<float>(float x) { return x; }
template <> inline float kept<Bf16>(float x) {
    return bits_of<float>(nearest(x) & 0xFFFF0000);
}

// e^x to about 2e-7 relative. A vectorised loop cannot call the library's.
inline float exponential(float x) {
    x = x < -80.0f ? -80.0f : x;  // no denormals, which are slow; NaN passes through
    x = x > 80.0f ? 80.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    float whole = x * 1.44269504f + shift;
    uint32_t power = (bits_of<uint32_t>(whole) << 23) + 0x3F800000;
    whole -= shift;
    float r = x - whole * 0.693359375f;
    r -= whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_of<float>(power);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// x [rows, size] -> out = x * rstd * weight; rstd [rows] is computed if `measure`, else read.
template <typename T>
void rms_norm(int threads, int64_t rows, int64_t size, const T *x, const T *weight, float eps,
              bool measure, float *rstd, T *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *from = x + row * size;
        T *to = out + row * size;
        if (measure) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < size; ++i) {
                sum += load(from[i]) * load(from[i]);
            }
            rstd[row] = 1.0f / __builtin_sqrtf(sum / size + eps);
        }
        float scale = rstd[row];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            to[i] = rounded<T>(kept<T>(load(from[i]) * scale) * load(weight[i]));
        }
    }
}

// The gradient of x. With dy = grad * weight: rstd * dy - x * rstd^3 * mean(dy * x).
template <typename T>
void rms_norm_backward(int threads, int64_t rows, int64_t size, const T *grad, const T *x,
                       const T *weight, const float *rstd, T *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *dy = grad + row * size, *from = x + row * size;
        T *to = out + row * size;
        float sum = 0, scale = rstd[row];
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            sum += kept<T>(load(dy[i]) * load(weight[i])) * load(from[i]);
        }
        float pull = sum / size * scale * scale * scale;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float scaled = kept<T>(load(dy[i]) * load(weight[i]));
            to[i] = rounded<T>(scaled * scale - load(from[i]) * pull);
        }
    }
}

// source [rows, 2 size] = [gate | up] -> out = silu(gate) * up.
template <typename T>
void swiglu(int threads, int64_t rows, int64_t size, const T *source, T *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = source + row * 2 * size, *up = gate + size;
        T *to = out + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float g = load(gate[i]);
            to[i] = rounded<T>(kept<T>(g * sigmoid(g)) * load(up[i]));
        }
    }
}

// The gradient of source.
template <typename T>
void swiglu_backward(int threads, int64_t rows, int64_t size, const T *grad, const T *source,
                     T *result) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = source + row * 2 * size, *up = gate + size, *dy = grad + row * size;
        T *for_gate = result + row * 2 * size, *for_up = for_gate + size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float g = load(gate[i]), d = load(dy[i]), s = sigmoid(g);
            for_up[i] = rounded<T>(kept<T>(g * s) * d);
            for_gate[i] = rounded<T>(kept<T>(d * load(up[i])) * s * (1.0f + g * (1.0f - s)));
        }
    }
}

// losses [rows]; logits [rows, size] become the gradient of the cross entropy if `wanted`.
template <typename T>
void cross_entropy(int threads, int64_t rows, int64_t size, T *logits, const int64_t *targets,
                   int wanted, float *losses) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        T *at = logits + row * size;
        float highest = load(at[0]), sum = 0;
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < size; ++i) {
            float x = load(at[i]);
            highest = x > highest ? x : highest;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            sum += exponential(load(at[i]) - highest);
        }
        float target = load(at[targets[row]]);
        losses[row] = __builtin_logf(sum) - (target - highest);  // rounded as in log_softmax
        if (!wanted) {
            continue;
        }
        float share = 1.0f / sum;
        float at_target = exponential(target - highest) * share - 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            at[i] = rounded<T>(exponential(load(at[i]) - highest) * share);
        }
        at[targets[row]] = rounded<T>(at_target);
    }
}

// scores [matrices, rows, size] times `scale` become causal probabilities: the row of query q,
// which is its number modulo `size`, has the keys 0 to q. The size is at most LONGEST.
template <typename T>
void causal_softmax(int threads, int64_t matrices, int64_t rows, int64_t size, float scale,
                    T *scores) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < matrices * rows; ++row) {
        int64_t keys = row % rows % size + 1, whole = (keys + LANES - 1) / LANES * LANES;
        int64_t inside = std::min(whole, size);
        T *at = scores + row * size;
        float values[LONGEST + LANES], highest = -1e30f, sum = 0;
#pragma omp simd
        for (int64_t i = 0; i < inside; ++i) {
            values[i] = load(at[i]);
        }
        // whole vectors: short rows would spend most of their time in the rest of a loop
        std::fill(values + keys, values + whole, -1e30f);
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < whole; ++i) {
            highest = values[i] > highest ? values[i] : highest;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < whole; ++i) {
            values[i] = exponential((values[i] - highest) * scale);
            sum += values[i];
        }
        float share = 1.0f / sum;
#pragma omp simd
        for (int64_t i = 0; i < inside; ++i) {
            at[i] = rounded<T>(values[i] * share);
        }
        std::memset(at + keys, 0, (size - keys) * sizeof(T));
    }
}

// The gradient of probabilities becomes that of scores, times `scale`.
template <typename T>
void causal_softmax_backward(int threads, int64_t matrices, int64_t rows, int64_t size,
                             const T *probabilities, float scale, T *grad) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < matrices * rows; ++row) {
        int64_t keys = row % rows % size + 1;
        int64_t inside = std::min((keys + LANES - 1) / LANES * LANES, size);
        const T *p = probabilities + row * size;
        T *at = grad + row * size;
        float sum = 0;
        // later keys have probability zero, so whole vectors give the same
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < inside; ++i) {
            sum += load(at[i]) * load(p[i]);
        }
#pragma omp simd
        for (int64_t i = 0; i < inside; ++i) {
            at[i] = rounded<T>((load(at[i]) - sum) * load(p[i]) * scale);
        }
        std::memset(at + inside, 0, (size - inside) * sizeof(T));
    }
}

// One head: `turn` is 1 for rotary positions, -1 for their inverse, 0 for a copy.
template <typename T>
inline void turned(int64_t size, float turn, const T *x, const T *cos, const T *sin, T *out) {
    int64_t half = size / 2;
    if (turn == 0) {
        std::memcpy(out, x, size * sizeof(T));
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        float a = load(x[i]), b = load(x[i + half]), c = load(cos[i]), s = turn * load(sin[i]);
        out[i] = rounded<T>(kept<T>(a * c) - kept<T>(b * s));
        out[i + half] = rounded<T>(kept<T>(b * c) + kept<T>(a * s));
    }
}

// Heads of tokens [tokens, stride] -> [sequences, heads, longest, size], zero after the end of a
// sequence. Sequence n has `lengths[n]` tokens from `starts[n]` on.
template <typename T>
void gather(int threads, int64_t sequences, int64_t heads, int64_t longest, int64_t size,
            int64_t stride, const int64_t *starts, const int64_t *lengths, float turn,
            const T *cos, const T *sin, const T *tokens, T *out) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t n = 0; n < sequences; ++n) {
        for (int64_t p = 0; p < longest; ++p) {
            for (int64_t head = 0; head < heads; ++head) {
                T *to = out + ((n * heads + head) * longest + p) * size;
                if (p >= lengths[n]) {
                    std::memset(to, 0, size * sizeof(T));
                    continue;
                }
                const T *from = tokens + (starts[n] + p) * stride + head * size;
                turned(size, turn, from, cos + p * size, sin + p * size, to);
            }
        }
    }
}

// The inverse of `gather`.
template <typename T>
void scatter(int threads, int64_t sequences, int64_t heads, int64_t longest, int64_t size,
             int64_t stride, const int64_t *starts, const int64_t *lengths, float turn,
             const T *cos, const T *sin, T *tokens, const T *in) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t n = 0; n < sequences; ++n) {
        for (int64_t p = 0; p < longest; ++p) {
            for (int64_t head = 0; head < heads && p < lengths[n]; ++head) {
                const T *from = in + ((n * heads + head) * longest + p) * size;
                T *to = tokens + (starts[n] + p) * stride + head * size;
                turned(size, turn, from, cos + p * size, sin + p * size, to);
            }
        }
    }
}

// DoRA: rows [tokens, width] become `sums * gains + undropped`, where sums = rows - undropped, which
// are kept. `undropped` may be null, for zeros.
template <typename T>
void rescale(int threads, int64_t tokens, int64_t width, T *rows, int64_t stride,
             const float *gains, const T *undropped, int64_t undropped_stride, T *sums,
             int64_t sums_stride) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        T *at = rows + token * stride, *sum = sums + token * sums_stride;
        if (undropped == nullptr) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                sum[i] = at[i];
                at[i] = rounded<T>(load(at[i]) * gains[i]);
            }
            continue;
        }
        const T *past = undropped + token * undropped_stride;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float summed = kept<T>(load(at[i]) - load(past[i]));
            sum[i] = rounded<T>(summed);
            at[i] = rounded<T>(summed * gains[i] + load(past[i]));
        }
    }
}

// The backward of `rescale`: out = grad * gains, and products [width] = sum of grad * sums over the
// tokens. A thread has columns of its own, so that the order of a sum depends on no number of them.
template <typename T>
void rescale_backward(int threads, int64_t tokens, int64_t width, const T *grad,
                      int64_t grad_stride, const T *sums, int64_t sums_stride, const float *gains,
                      float *products, T *out, int64_t out_stride) {
    constexpr int64_t BLOCK = 128;
#pragma omp parallel for num_threads(threads)
    for (int64_t begin = 0; begin < width; begin += BLOCK) {
        int64_t size = std::min(BLOCK, width - begin);
        float totals[BLOCK] = {};
        for (int64_t token = 0; token < tokens; ++token) {
            const T *dy = grad + token * grad_stride + begin;
            const T *sum = sums + token * sums_stride + begin;
            T *to = out + token * out_stride + begin;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                totals[i] += load(dy[i]) * load(sum[i]);
                to[i] = rounded<T>(load(dy[i]) * gains[begin + i]);
            }
        }
        std::memcpy(products + begin, totals, size * sizeof(float));
    }
}

}  // namespace

#define FOR_DTYPE(T, NAME)                                                                         \
    void rms_norm_##NAME(int threads, int64_t rows, int64_t size, const T *x, const T *weight,     \
                         float eps, int measure, float *rstd, T *out) {                            \
        rms_norm(threads, rows, size, x, weight, eps, measure, rstd, out);                         \
    }                                                                                              \
    void rms_norm_backward_##NAME(int threads, int64_t rows, int64_t size, const T *grad,          \
                                  const T *x, const T *weight, const float *rstd, T *out) {        \
        rms_norm_backward(threads, rows, size, grad, x, weight, rstd, out);                        \
    }                                                                                              \
    void swiglu_##NAME(int threads, int64_t rows, int64_t size, const T *source, T *out) {         \
        swiglu(threads, rows, size, source, out);                                                  \
    }                                                                                              \
    void swiglu_backward_##NAME(int threads, int64_t rows, int64_t size, const T *grad,            \
                                const T *source, T *result) {                                      \
        swiglu_backward(threads, rows, size, grad, source, result);                                \
    }                                                                                              \
    void cross_entropy_##NAME(int threads, int64_t rows, int64_t size, T *logits,                  \
                              const int64_t *targets, int wanted, float *losses) {                 \
        cross_entropy(threads, rows, size, logits, targets, wanted, losses);                       \
    }                                                                                              \
    void causal_softmax_##NAME(int threads, int64_t matrices, int64_t rows, int64_t size,          \
                               float scale, T *scores) {                                           \
        causal_softmax(threads, matrices, rows, size, scale, scores);                              \
    }                                                                                              \
    void causal_softmax_backward_##NAME(int threads, int64_t matrices, int64_t rows, int64_t size, \
                                        const T *probabilities, float scale, T *grad) {            \
        causal_softmax_backward(threads, matrices, rows, size, probabilities, scale, grad);        \
    }                                                                                              \
    void gather_##NAME(int threads, int64_t sequences, int64_t heads, int64_t longest,             \
                       int64_t size, int64_t stride, const int64_t *starts,                        \
                       const int64_t *lengths, float turn, const T *cos, const T *sin,             \
                       const T *tokens, T *out) {                                                  \
        gather(threads, sequences, heads, longest, size, stride, starts, lengths, turn, cos, sin,  \
               tokens, out);                                                                       \
    }                                                                                              \
    void scatter_##NAME(int threads, int64_t sequences, int64_t heads, int64_t longest,            \
                        int64_t size, int64_t stride, const int64_t *starts,                       \
                        const int64_t *lengths, float turn, const T *cos, const T *sin, T *tokens, \
                        const T *in) {                                                             \
        scatter(threads, sequences, heads, longest, size, stride, starts, lengths, turn, cos, sin, \
                tokens, in);                                                                       \
    }                                                                                              \
    void rescale_##NAME(int threads, int64_t tokens, int64_t width, T *rows, int64_t stride,       \
                        const float *gains, const T *undropped, int64_t undropped_stride,          \
                        T *sums, int64_t sums_stride) {                                            \
        rescale(threads, tokens, width, rows, stride, gains, undropped, undropped_stride, sums,    \
                sums_stride);                                                                      \
    }                                                                                              \
    void rescale_backward_##NAME(int threads, int64_t tokens, int64_t width, const T *grad,        \
                                 int64_t grad_stride, const T *sums, int64_t sums_stride,          \
                                 const float *gains, float *products, T *out,                      \
                                 int64_t out_stride) {                                             \
        rescale_backward(threads, tokens, width, grad, grad_stride, sums, sums_stride, gains,      \
                         products, out, out_stride);                                               \
    }

extern "C" {
FOR_DTYPE(float, f32)
FOR_DTYPE(Bf16, bf16)
}
