// Both operations, written once for processors of any width. A processor is a class V that names its vectors of W
// floats or 32-bit integers and what they do; each is compiled in a file of its own, with the instructions it has.

#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace omega_qvla {
namespace {

constexpr int64_t ROWS_TOGETHER = 64;      // that are transformed together
constexpr int64_t LINE = 64;               // bytes of a cache line
constexpr int64_t TOKENS_TOGETHER = 96;    // of which the codes of
constexpr int64_t CHANNELS_TOGETHER = 1024;  // fit the second cache, and those of a tile's weights the first
constexpr int64_t MOST_FLOATS = 1 << 16;   // that lie between the stages of a transform

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Memory of one thread, aligned for any vector.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, rounded_up(larger(count, 1) * sizeof(T), 64)))) {
        if (!data_) std::abort();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() const { return data_; }

private:
    T* data_;
};

inline float widened(bfloat16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widened(float x) { return x; }

template <class T>
void gather_from(const T* row, const int32_t* order, int64_t first, int64_t count, float* to) {
    if (order)
        for (int64_t i = 0; i < count; ++i) to[i] = widened(row[order[first + i]]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = widened(row[first + i]);
}

// Of one row, the channels that take places first ... first + count - 1, times the factors of these places.
inline void gather(const QuantizeInput& in, int64_t row, int64_t first, int64_t count, float* to) {
    const int64_t start = row * in.channels;
    if (in.x_is_bfloat16)
        gather_from(static_cast<const bfloat16*>(in.x) + start, in.order, first, count, to);
    else
        gather_from(static_cast<const float*>(in.x) + start, in.order, first, count, to);
    if (in.before)
        for (int64_t i = 0; i < count; ++i) to[i] *= in.before[first + i];
}

inline float hadamard_norm(int64_t size) { return float(1 / std::sqrt(double(size))); }

// The same as below, of COUNT vectors that stay in registers.
template <class V, int COUNT>
void hadamard_in_registers(float* x) {
    typename V::Floats value[COUNT];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) value[i] = V::hadamard(V::load(x + i * V::W));
#pragma GCC unroll 3
    for (int half = 1; half < COUNT; half *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) {
            if (i & half) continue;
            const auto a = value[i], b = value[i + half];
            value[i] = V::add(a, b);
            value[i + half] = V::sub(a, b);
        }
    const auto norm = V::floats(hadamard_norm(COUNT * V::W));
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) V::store(x + i * V::W, V::multiply(value[i], norm));
}

// x [size] times the Hadamard matrix, in place: a sum and a difference of two values at each of log2(size) stages.
template <class V>
void hadamard(float* x, int64_t size) {
    if (V::W > 1 && size == 8 * V::W) return hadamard_in_registers<V, 8>(x);
    if (V::W > 1 && size == 4 * V::W) return hadamard_in_registers<V, 4>(x);
    int64_t half = 1;
    if (size >= V::W) {
        for (int64_t i = 0; i < size; i += V::W) V::store(x + i, V::hadamard(V::load(x + i)));
        half = V::W;
    }
    for (; half < size; half *= 2) {
        for (int64_t start = 0; start < size; start += 2 * half) {
            float *low = x + start, *high = low + half;
            int64_t i = 0;
            for (; i + V::W <= half; i += V::W) {
                const auto a = V::load(low + i), b = V::load(high + i);
                V::store(low + i, V::add(a, b));
                V::store(high + i, V::sub(a, b));
            }
            for (; i < half; ++i) {
                const float a = low[i], b = high[i];
                low[i] = a + b;
                high[i] = a - b;
            }
        }
    }
    const float norm = hadamard_norm(size);
    for (int64_t i = 0; i < size; ++i) x[i] *= norm;
}

// y [ROWS, size] = x [ROWS, size] · matrix [size, size]; rows of y are `stride` apart. Sums go over ascending input
// channels, so that a row's values do not depend on the rows beside it.
template <class V, int ROWS>
void rotate(const float* x, const float* matrix, int64_t size, float* y, int64_t stride) {
    constexpr int AHEAD = 2;
    int64_t column = 0;
    for (; column + AHEAD * V::W <= size; column += AHEAD * V::W) {
        typename V::Floats sum[ROWS][AHEAD];
        for (int r = 0; r < ROWS; ++r)
            for (int a = 0; a < AHEAD; ++a) sum[r][a] = V::floats(0);
        for (int64_t k = 0; k < size; ++k) {
            typename V::Floats of_matrix[AHEAD];
            for (int a = 0; a < AHEAD; ++a) of_matrix[a] = V::load(matrix + k * size + column + a * V::W);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const auto of_row = V::floats(x[r * size + k]);
                for (int a = 0; a < AHEAD; ++a) sum[r][a] = V::multiply_add(of_row, of_matrix[a], sum[r][a]);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int a = 0; a < AHEAD; ++a) V::store(y + r * stride + column + a * V::W, sum[r][a]);
    }
    for (; column < size; ++column)
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0;
            for (int64_t k = 0; k < size; ++k) sum = V::multiply_add(x[r * size + k], matrix[k * size + column], sum);
            y[r * stride + column] = sum;
        }
}

template <class V>
void rotate_rows(const float* x, const float* matrix, int64_t size, int64_t rows, float* y, int64_t stride) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) rotate<V, 6>(x + row * size, matrix, size, y + row * stride, stride);
    for (; row + 2 <= rows; row += 2) rotate<V, 2>(x + row * size, matrix, size, y + row * stride, stride);
    for (; row < rows; ++row) rotate<V, 1>(x + row * size, matrix, size, y + row * stride, stride);
}

// The largest magnitude, as the bits of a float: those of NaN and infinity are the largest.
template <class V>
uint32_t peak_bits(const float* x, int64_t count) {
    uint32_t largest = 0;
    int64_t i = 0;
    if (count >= V::W) {
        auto peaks = V::magnitude_bits(V::load(x));
        for (i = V::W; i + V::W <= count; i += V::W) peaks = V::larger(peaks, V::magnitude_bits(V::load(x + i)));
        largest = V::largest(peaks);
    }
    for (; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        if (bits > largest) largest = bits;
    }
    return largest;
}

constexpr uint32_t INFINITE = 0x7f800000;

// The codes of values [count], and their sum.
template <class V>
int32_t round_codes(const float* x, int64_t count, float inverse, float lowest, float highest, int8_t* codes) {
    int64_t i = 0;
    int32_t sum = 0;
    if (count >= V::W) {
        const auto by = V::floats(inverse), low = V::floats(lowest), high = V::floats(highest);
        auto sums = V::integers(0);
        for (; i + V::W <= count; i += V::W) {
            const auto scaled = V::clamp(V::multiply(V::load(x + i), by), low, high);
            const auto rounded = V::rounded(scaled);
            sums = V::add(sums, rounded);
            V::store_bytes(codes + i, rounded);
        }
        sum = V::total(sums);
    }
    for (; i < count; ++i) {
        const float scaled = x[i] * inverse;
        const float bounded = scaled < lowest ? lowest : scaled > highest ? highest : scaled;
        const int32_t code = int32_t(std::nearbyint(bounded));
        codes[i] = int8_t(code);
        sum += code;
    }
    return sum;
}

// X' of some rows and of channels [first, first + span), [rows, span].
template <class V>
void transform(const QuantizeInput& in, int64_t row, int64_t rows, int64_t first, int64_t span, float* gathered,
               float* matrix, float* to) {
    const bool matrices = in.matrices || in.short_matrices;
    if (!matrices) {
        for (int64_t r = 0; r < rows; ++r) {
            gather(in, row + r, first, span, to + r * span);
            if (in.hadamard)
                for (int64_t b = 0; b < span; b += in.block) hadamard<V>(to + r * span + b, in.block);
        }
    } else {
        const int64_t area = in.block * in.block;
        for (int64_t b = 0; b < span; b += in.block) {
            const int64_t which = (first + b) / in.block;
            const float* used = in.matrices + which * area;
            if (in.short_matrices) {
                for (int64_t i = 0; i < area; ++i) matrix[i] = widened(in.short_matrices[which * area + i]);
                used = matrix;
            }
            for (int64_t r = 0; r < rows; ++r) gather(in, row + r, first + b, in.block, gathered + r * in.block);
            rotate_rows<V>(gathered, used, in.block, rows, to + b, span);
        }
    }
    if (in.after)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < span; ++i) to[r * span + i] *= in.after[first + i];
}

// Codes, sums and scales of X' [span] of one row. Returns whether it is finite.
template <class V>
bool quantize(const QuantizeInput& in, int64_t row, int64_t first, int64_t span, const float* x) {
    const int64_t padded = rounded_up(in.flushed, STEP);
    const int64_t groups = in.channels / in.group;
    for (int64_t g = 0; g < span; g += in.group) {
        const uint32_t bits = peak_bits<V>(x + g, in.group);
        if (bits >= INFINITE) return false;
        float peak;
        std::memcpy(&peak, &bits, sizeof peak);
        if (!in.codes) continue;
        const float scale = in.fixed_scale ? *in.fixed_scale : peak / float(in.highest);
        if (!in.fixed_scale) in.scale[row * groups + (first + g) / in.group] = scale;
        const float inverse = scale > 0 ? 1 / scale : 0;
        for (int64_t f = 0; f < in.group; f += in.flushed) {
            const int64_t place = (first + g + f) / in.flushed * in.rows + row;
            int8_t* codes = in.codes + place * padded;
            in.sums[place] = round_codes<V>(x + g + f, in.flushed, inverse, float(in.lowest), float(in.highest), codes);
            for (int64_t i = in.flushed; i < padded; ++i) codes[i] = 0;
        }
    }
    return true;
}

// Channels that are transformed and rounded together.
inline int64_t span_of(const QuantizeInput& in) {
    const bool rotates = in.hadamard || in.matrices || in.short_matrices;
    if (!rotates || in.group % in.block == 0) return in.group;
    return in.block % in.group == 0 ? in.block : in.channels;
}

template <class V>
bool quantize_input(const QuantizeInput& in, int threads) {
    const int64_t span = span_of(in);
    const int64_t spans = in.channels / span;
    const int64_t share = (in.rows * spans + threads - 1) / threads;  // rows of spans
    const int64_t together = larger(1, smaller(smaller(share, ROWS_TOGETHER), MOST_FLOATS / span));
    const int64_t blocks = (in.rows + together - 1) / together;
    bool finite = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : finite)
    {
        Scratch<float> values(together * span), gathered(together * in.block), matrix(in.block * in.block);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < blocks * spans; ++task) {
            const int64_t row = task / spans * together, first = task % spans * span;
            const int64_t rows = smaller(together, in.rows - row);
            transform<V>(in, row, rows, first, span, gathered, matrix, values);
            for (int64_t r = 0; r < rows; ++r) {
                finite = quantize<V>(in, row + r, first, span, values + r * span) && finite;
                if (in.values)
                    std::memcpy(in.values + (row + r) * in.channels + first, values + r * span, span * sizeof(float));
            }
        }
    }
    return finite;
}

// What is multiplied while it is in the caches: some tokens, some groups, one tile after the other.
struct Block {
    int64_t row, rows;
    int64_t group, end;
};

// A tile of outputs of ROWS tokens. The order of operations is part of the definition: each
// group's sum is exact, then it is scaled by the input's and by the weight's scale, then added to those before.
template <class V, int ROWS, int PLANES>
void multiply(const GroupedMatmul& m, const Block& block, int64_t row, int64_t tile) {
    constexpr int PARTS = TILE / V::W;
    constexpr int32_t ADDED = PLANES == 1 ? 8 : 8 * 16;
    const int64_t steps = m.width / STEP, group_bytes = steps * PLANES * 32;
    const uint8_t* weight = m.weight + (tile * m.groups + block.group) * group_bytes;
    const bfloat16* scales = m.weight_scale + tile * (m.scale_per_group ? m.groups : 1) * TILE;
    float* out = m.out + row * m.row + tile * TILE;
    const bool last = row + ROWS == block.row + block.rows && tile + 1 < m.tiles;
    for (int64_t g = block.group; g < block.end; ++g, weight += group_bytes) {
        // The next tile is met for the first time, and far away.
        if (last)
            for (int64_t i = 0; i < group_bytes; i += LINE) __builtin_prefetch(weight + m.groups * group_bytes + i);
        typename V::Integers sum[ROWS][PARTS];
        V::template accumulate<ROWS, PLANES>(weight, m.codes + (g * m.rows + row) * m.width, m.width, steps,
                                             m.wide_codes, sum);
        typename V::Floats of_weight[PARTS];
        for (int p = 0; p < PARTS; ++p)
            of_weight[p] = V::load_short(scales + (m.scale_per_group ? g : 0) * TILE + p * V::W);
        const int32_t* sums = m.sums + g * m.rows + row;
        const float* of_rows = m.scale + row * m.scale_row + g * m.scale_group;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const auto added = V::integers(ADDED * sums[r]);
            const auto of_row = V::floats(of_rows[r * m.scale_row]);
            for (int p = 0; p < PARTS; ++p) {
                float* place = out + r * m.row + p * V::W;
                auto part = V::multiply(V::multiply(V::to_floats(V::sub(sum[r][p], added)), of_row), of_weight[p]);
                if (g > 0) part = V::add(V::load(place), part);
                V::store(place, part);
            }
        }
    }
}

template <class V, int PLANES>
void multiply_rows(const GroupedMatmul& m, const Block& block, int64_t tile) {
    constexpr int64_t MOST = PLANES == 1 ? V::MOST_ROWS : V::MOST_ROWS / 2;
    const int64_t turns = (block.rows + MOST - 1) / MOST;
    int64_t row = block.row;
    for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t end = block.row + block.rows * (turn + 1) / turns;
        switch (end - row) {
#define OMEGA_QVLA_ROWS(count)                                                    \
    case count:                                                                   \
        if constexpr (count <= MOST) multiply<V, count, PLANES>(m, block, row, tile); \
        break;
            OMEGA_QVLA_ROWS(1)
            OMEGA_QVLA_ROWS(2)
            OMEGA_QVLA_ROWS(3)
            OMEGA_QVLA_ROWS(4)
            OMEGA_QVLA_ROWS(5)
            OMEGA_QVLA_ROWS(6)
            OMEGA_QVLA_ROWS(7)
            OMEGA_QVLA_ROWS(8)
            OMEGA_QVLA_ROWS(9)
            OMEGA_QVLA_ROWS(10)
            OMEGA_QVLA_ROWS(11)
            OMEGA_QVLA_ROWS(12)
#undef OMEGA_QVLA_ROWS
        }
        row = end;
    }
}

// Each thread has tiles of its own.
template <class V>
void grouped_matmul(const GroupedMatmul& m, int threads) {
    const int64_t groups = larger(1, CHANNELS_TOGETHER / m.width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < m.rows; row += TOKENS_TOGETHER)
        for (int64_t g = 0; g < m.groups; g += groups) {
            const Block block{row, smaller(TOKENS_TOGETHER, m.rows - row), g, smaller(m.groups, g + groups)};
#pragma omp for schedule(static) nowait
            for (int64_t tile = 0; tile < m.tiles; ++tile) {
                if (m.planes == 1)
                    multiply_rows<V, 1>(m, block, tile);
                else
                    multiply_rows<V, 2>(m, block, tile);
            }
        }
}

}  // namespace
}  // namespace omega_qvla
