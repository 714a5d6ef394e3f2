// The matmuls of a LoRA adapter on a CPU. One side of each is the rank, so they are small, and a
// step has thousands of them: with a general matmul, the calls take longer than the arithmetic. Sums
// are in float32, in an order that depends on the sizes alone. `fused_cpu.py` compiles this file.

#include <algorithm>
#include <vector>

#include "bfloat16.h"

namespace {

// All sums of a tile stay in registers: 16 of the 32 with AVX-512, 8 of the 16 with AVX2.
#ifdef __AVX512F__
constexpr int64_t LANES = 16;  // floats in a register
constexpr int64_t HEIGHT = 8;  // rows of a tile
#else
constexpr int64_t LANES = 8;
constexpr int64_t HEIGHT = 4;
#endif
constexpr int64_t WIDTH = 2 * LANES;  // columns of a tile
constexpr int64_t DEPTH = 128;        // tokens that a thread takes at a time

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Copy from [rows, columns] to [rows, stride] in float32, with zeros where `from` ends.
template <typename T>
void to_float(int64_t rows, int64_t columns, const T *from, int64_t from_stride, float *to,
              int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) {
        const T *source = from + row * from_stride;
        float *target = to + row * stride;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            target[i] = load(source[i]);
        }
        std::fill(target + columns, target + stride, 0.0f);
    }
}

// The same, transposed: to [columns, stride].
template <typename T>
void to_float_transposed(int64_t rows, int64_t columns, const T *from, int64_t from_stride,
                         float *to, int64_t stride) {
    for (int64_t i = 0; i < columns; ++i) {
        for (int64_t row = 0; row < rows; ++row) {
            to[i * stride + row] = load(from[row * from_stride + i]);
        }
        std::fill(to + i * stride + rows, to + (i + 1) * stride, 0.0f);
    }
}

// tile [HEIGHT, WIDTH] = left @ right, summed over `depth`: left[row, k] is at
// `row * row_step + k * k_step`, right[k] at `k * right_stride`.
template <int VECTORS>
inline void multiply(int64_t depth, const float *left, int64_t row_step, int64_t k_step,
                     const float *right, int64_t right_stride, float *tile) {
    Vector sums[HEIGHT][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const float *at = left + k * k_step, *factors = right + k * right_stride;
#pragma GCC unroll 2
        for (int64_t n = 0; n < VECTORS; ++n) {
            Vector factor = *reinterpret_cast<const Vector *>(factors + n * LANES);
#pragma GCC unroll 8
            for (int64_t row = 0; row < HEIGHT; ++row) {
                sums[row][n] += at[row * row_step] * factor;
            }
        }
    }
    for (int64_t row = 0; row < HEIGHT; ++row) {
        for (int64_t n = 0; n < VECTORS; ++n) {
            *reinterpret_cast<Vector *>(tile + row * WIDTH + n * LANES) = sums[row][n];
        }
    }
}

// out [tokens, rank] = scale * x [tokens, inputs] @ weight. The weight is [inputs, rank], or
// [rank, inputs] if `transposed`.
template <typename T>
void project(int threads, int64_t tokens, int64_t inputs, int64_t rank, const T *x,
             int64_t x_stride, const T *weight, int transposed, float scale, T *out,
             int64_t out_stride) {
    int64_t padded_rank = padded(rank, LANES);
    std::vector<float> weight_f32(inputs * padded_rank);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> x_f32(HEIGHT * inputs);
        float tile[HEIGHT * WIDTH];
#pragma omp for
        for (int64_t begin = 0; begin < inputs; begin += LANES) {
            int64_t count = std::min(LANES, inputs - begin);
            float *to = weight_f32.data() + begin * padded_rank;
            if (transposed) {
                to_float_transposed(rank, count, weight + begin, inputs, to, padded_rank);
            } else {
                to_float(count, rank, weight + begin * rank, rank, to, padded_rank);
            }
        }
#pragma omp for
        for (int64_t begin = 0; begin < tokens; begin += HEIGHT) {
            int64_t rows = std::min(HEIGHT, tokens - begin);
            to_float(rows, inputs, x + begin * x_stride, x_stride, x_f32.data(), inputs);
            for (int64_t first = 0; first < rank; first += WIDTH) {
                // the last tile may be half as wide
                auto *product = padded_rank - first == LANES ? multiply<1> : multiply<2>;
                const float *right = weight_f32.data() + first;
                product(inputs, x_f32.data(), inputs, 1, right, padded_rank, tile);
                for (int64_t row = 0; row < rows; ++row) {
                    T *to = out + (begin + row) * out_stride + first;
                    for (int64_t i = 0; i < std::min(WIDTH, rank - first); ++i) {
                        to[i] = rounded<T>(scale * tile[row * WIDTH + i]);
                    }
                }
            }
        }
    }
}

// out [tokens, columns] += scale * h [tokens, rank] @ weight. The weight is [rank, columns], or
// [columns, rank] if `transposed`.
template <typename T>
void expand(int threads, int64_t tokens, int64_t rank, int64_t columns, const T *h,
            int64_t h_stride, const T *weight, int transposed, float scale, T *out,
            int64_t out_stride) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> right(rank * WIDTH), left(DEPTH * rank);
        float tile[HEIGHT * WIDTH];
#pragma omp for collapse(2)
        for (int64_t begin = 0; begin < tokens; begin += DEPTH) {
            for (int64_t first = 0; first < columns; first += WIDTH) {
                int64_t count = std::min(WIDTH, columns - first);
                int64_t end = std::min(DEPTH, tokens - begin);
                if (transposed) {
                    to_float_transposed(count, rank, weight + first * rank, rank, right.data(),
                                     WIDTH);
                } else {
                    to_float(rank, count, weight + first, columns, right.data(), WIDTH);
                }
                to_float(end, rank, h + begin * h_stride, h_stride, left.data(), rank);
                for (int64_t at = 0; at < end; at += HEIGHT) {
                    multiply<2>(rank, left.data() + at * rank, rank, 1, right.data(), WIDTH, tile);
                    for (int64_t row = 0; row < std::min(HEIGHT, end - at); ++row) {
                        T *to = out + (begin + at + row) * out_stride + first;
#pragma omp simd
                        for (int64_t i = 0; i < count; ++i) {
                            to[i] = rounded<T>(load(to[i]) + scale * tile[row * WIDTH + i]);
                        }
                    }
                }
            }
        }
    }
}

// total [rank, columns] += scale * h [tokens, rank].T @ x [tokens, columns]; the total is in
// float32, and [columns, rank] if `transposed`.
template <typename T>
void reduce(int threads, int64_t tokens, int64_t rank, int64_t columns, const T *h,
            int64_t h_stride, const T *x, int64_t x_stride, float scale, float *total,
            int transposed) {
    int64_t padded_rank = padded(rank, HEIGHT);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> right(DEPTH * WIDTH), left(DEPTH * padded_rank);
        float tile[HEIGHT * WIDTH];
#pragma omp for
        for (int64_t first = 0; first < columns; first += WIDTH) {
            int64_t count = std::min(WIDTH, columns - first);
            for (int64_t begin = 0; begin < tokens; begin += DEPTH) {
                int64_t depth = std::min(DEPTH, tokens - begin);
                to_float(depth, count, x + begin * x_stride + first, x_stride, right.data(), WIDTH);
                to_float(depth, rank, h + begin * h_stride, h_stride, left.data(), padded_rank);
                for (int64_t top = 0; top < rank; top += HEIGHT) {
                    multiply<2>(depth, left.data() + top, 1, padded_rank, right.data(), WIDTH,
                                tile);
                    int64_t rows = std::min(HEIGHT, rank - top);
                    for (int64_t row = 0; row < rows; ++row) {
                        int64_t step = transposed ? rank : 1;
                        float *to = total + (transposed ? first * rank + top + row
                                                        : (top + row) * columns + first);
                        for (int64_t i = 0; i < count; ++i) {
                            to[i * step] += scale * tile[row * WIDTH + i];
                        }
                    }
                }
            }
        }
    }
}

}  // namespace

#define FOR_DTYPE(T, NAME)                                                                         \
    void project_##NAME(int threads, int64_t tokens, int64_t inputs, int64_t rank, const T *x,     \
                        int64_t x_stride, const T *weight, int transposed, float scale, T *out,    \
                        int64_t out_stride) {                                                      \
        project(threads, tokens, inputs, rank, x, x_stride, weight, transposed, scale, out,        \
                out_stride);                                                                       \
    }                                                                                              \
    void expand_##NAME(int threads, int64_t tokens, int64_t rank, int64_t columns, const T *h,     \
                       int64_t h_stride, const T *weight, int transposed, float scale, T *out,     \
                       int64_t out_stride) {                                                       \
        expand(threads, tokens, rank, columns, h, h_stride, weight, transposed, scale, out,        \
               out_stride);                                                                        \
    }                                                                                              \
    void reduce_##NAME(int threads, int64_t tokens, int64_t rank, int64_t columns, const T *h,     \
                       int64_t h_stride, const T *x, int64_t x_stride, float scale, float *total,  \
                       int transposed) {                                                           \
        reduce(threads, tokens, rank, columns, h, h_stride, x, x_stride, scale, total,             \
               transposed);                                                                        \
    }

extern "C" {
FOR_DTYPE(float, f32)
FOR_DTYPE(Bf16, bf16)
}
