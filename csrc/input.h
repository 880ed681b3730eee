// An input is transformed and rounded: written once for processors of any width. A processor is a class V that names
// its vectors of W floats or 32-bit integers and what they do; each is compiled in a file of its own, with the
// instructions it has.

#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace omega_qvla {
namespace {

constexpr int64_t CHANNELS_AT_ONCE = 512;  // that go through one stage after the other, unless blocks are larger
constexpr int64_t ROWS_AT_ONCE = 64;
constexpr int64_t MOST_FLOATS = 1 << 16;  // that lie between the stages

inline float widened(bfloat16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widened(float x) { return x; }

// Of one row, the channels that take places first ... first + count - 1.
template <class T>
void gather_from(const T* row, const int32_t* order, int64_t first, int64_t count, float* to) {
    if (!order) {
        for (int64_t i = 0; i < count; ++i) to[i] = widened(row[first + i]);
        return;
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) {
        int64_t from = order[first + i];
        asm("" : "+r"(from));  // one after another: instructions that gather are slower
        to[i] = widened(row[from]);
    }
}

template <class V>
void scale(float* x, const float* factors, int64_t count) {
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) V::store(x + i, V::multiply(V::load(x + i), V::load(factors + i)));
    for (; i < count; ++i) x[i] *= factors[i];
}

// Those channels, times the factors of these places.
template <class V>
void gather(const QuantizeInput& in, int64_t row, int64_t first, int64_t count, float* to) {
    const int64_t start = row * in.channels;
    if (in.x_is_bfloat16)
        gather_from(static_cast<const bfloat16*>(in.x) + start, in.order, first, count, to);
    else
        gather_from(static_cast<const float*>(in.x) + start, in.order, first, count, to);
    if (in.before) scale<V>(to, in.before + first, count);
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
    const auto by = V::floats(inverse), low = V::floats(lowest), high = V::floats(highest);
    const auto rounded = [&](const float* from) {
        return V::rounded(V::clamp(V::multiply(V::load(from), by), low, high));
    };
    int64_t i = 0;
    auto sums = V::integers(0);
    for (; i + 4 * V::W <= count; i += 4 * V::W) {
        const typename V::Integers four[4] = {rounded(x + i), rounded(x + i + V::W), rounded(x + i + 2 * V::W),
                                              rounded(x + i + 3 * V::W)};
        sums = V::add(sums, V::add(V::add(four[0], four[1]), V::add(four[2], four[3])));
        V::store_bytes(codes + i, four);
    }
    int32_t sum = V::total(sums);
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
            gather<V>(in, row + r, first, span, to + r * span);
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
            for (int64_t r = 0; r < rows; ++r) gather<V>(in, row + r, first + b, in.block, gathered + r * in.block);
            rotate_rows<V>(gathered, used, in.block, rows, to + b, span);
        }
    }
    if (in.after)
        for (int64_t r = 0; r < rows; ++r) scale<V>(to + r * span, in.after + first, span);
}

// Codes, sums and scales of X' [span] of one row. Returns whether it is finite. `inverse`: room for a number of each
// group: its peak, then what its values are multiplied with.
template <class V>
bool quantize(const QuantizeInput& in, int64_t row, int64_t first, int64_t span, const float* x, float* inverse) {
    const int64_t padded = rounded_up(in.flushed, STEP), groups = span / in.group;
    bool finite = true;
    // One loop after another: groups of one loop overlap in the processor.
    for (int64_t g = 0; g < groups; ++g) {
        const uint32_t bits = peak_bits<V>(x + g * in.group, in.group);
        std::memcpy(inverse + g, &bits, sizeof bits);
        finite = finite && bits < INFINITE;
    }
    if (!finite || !in.codes) return finite;
    float* scales = in.fixed_scale ? nullptr : in.scale + row * (in.channels / in.group) + first / in.group;
    for (int64_t g = 0; g < groups; ++g) {
        const float scale = in.fixed_scale ? *in.fixed_scale : inverse[g] / float(in.highest);
        if (scales) scales[g] = scale;
        inverse[g] = scale > 0 ? 1 / scale : 0;
    }
    for (int64_t at = 0; at < span; at += in.flushed) {
        const int64_t place = (first + at) / in.flushed * in.rows + row;
        int8_t* codes = in.codes + place * padded;
        in.sums[place] = round_codes<V>(x + at, in.flushed, inverse[at / in.group], float(in.lowest),
                                        float(in.highest), codes);
        for (int64_t i = in.flushed; i < padded; ++i) codes[i] = 0;
    }
    return true;
}

// Channels that are transformed and rounded together: whole groups and blocks, several if they are small.
inline int64_t span_of(const QuantizeInput& in) {
    const bool rotates = in.hadamard || in.matrices || in.short_matrices;
    int64_t least = in.group;
    if (rotates && in.group % in.block != 0) least = in.block % in.group == 0 ? in.block : in.channels;
    int64_t span = least;
    for (int64_t more = least; more <= smaller(CHANNELS_AT_ONCE, in.channels); more += least)
        if (in.channels % more == 0) span = more;
    return span;
}

template <class V>
bool quantize_input(const QuantizeInput& in, int threads) {
    const int64_t span = span_of(in);
    const int64_t spans = in.channels / span;
    const int64_t share = (in.rows * spans + threads - 1) / threads;  // rows of spans
    // Rows go together where they share matrices; else one after the other, each of which the first cache holds.
    const int64_t most = in.matrices || in.short_matrices ? smaller(ROWS_AT_ONCE, MOST_FLOATS / span) : 1;
    const int64_t together = larger(1, smaller(share, most));
    const int64_t blocks = (in.rows + together - 1) / together;
    bool finite = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : finite)
    {
        Scratch<float> values(together * span), gathered(together * in.block), matrix(in.block * in.block);
        Scratch<float> inverse(span / in.group);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < blocks * spans; ++task) {
            const int64_t row = task / spans * together, first = task % spans * span;
            const int64_t rows = smaller(together, in.rows - row);
            transform<V>(in, row, rows, first, span, gathered, matrix, values);
            for (int64_t r = 0; r < rows; ++r) {
                finite = quantize<V>(in, row + r, first, span, values + r * span, inverse) && finite;
                if (in.values)
                    std::memcpy(in.values + (row + r) * in.channels + first, values + r * span, span * sizeof(float));
            }
        }
    }
    return finite;
}

}  // namespace
}  // namespace omega_qvla
