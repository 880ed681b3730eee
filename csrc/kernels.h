// What a quantized linear layer does while a policy runs, in two operations: an input is transformed and rounded,
// once for all linears that read it, and its codes are multiplied with those of the weights. And the two long loops of
// quantizing it: scales are searched, columns are rounded.
//
// Arrays are row-major and contiguous unless a stride is given. Channels come in groups that share a scale; codes are
// laid out group after group, each padded with zeros to a whole number of STEPs, [groups, rows, padded width]: those
// that are multiplied one after another lie together.

#pragma once

#include <cstdint>

namespace omega_qvla {

// Input channels that one instruction sums up.
constexpr int64_t STEP = 4;
// Outputs of a weight that lie together.
constexpr int64_t TILE = 16;
// To the upper four bits of a weight's code, so that it is stored unsigned.
constexpr int32_t ADDED = 8;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

using bfloat16 = uint16_t;

// X' = X[:, order] · before · diag(rotation) · after, and the codes of X'.
struct QuantizeInput {
    const void* x;  // [rows, channels], float or bfloat16
    bool x_is_bfloat16;
    int64_t rows, channels;

    const float* before;   // [channels], or none
    const int32_t* order;  // [channels], or none
    const float* after;    // [channels], or none

    // Of each block of channels, a power of two: the Hadamard matrix, or one that is given, or none.
    int64_t block;
    bool hadamard;
    const float* matrices;           // [channels / block, block, block]
    const bfloat16* short_matrices;  // the same in two bytes

    const float* fixed_scale;  // [1], or none: the scale that just reaches the peak of each group
    int64_t group;             // channels that share a scale
    int64_t flushed;           // channels after which accumulators are flushed: divides `group`
    int32_t lowest, highest;   // code

    int8_t* codes;  // [channels / flushed, rows, padded flushed], or none
    int32_t* sums;  // [channels / flushed, rows], of the codes
    float* scale;   // [rows, channels / group]; not written if fixed
    float* values;  // X' [rows, channels], or none
};

// Y[m, n] = Σ_g s_x[m, g] · s_w[n, g] · Σ_{k in g} x[m, k] · w[n, k].
struct GroupedMatmul {
    const int8_t* codes;   // [groups, rows, width]
    const int32_t* sums;   // [groups, rows]
    const float* scale;    // [rows, groups], [rows, 1], or [1]
    int64_t scale_row, scale_group;  // strides
    bool wide_codes;                 // more than four bits
    int64_t rows, groups, width;     // width: padded

    const uint8_t* weight;         // as pack_weight lays it out
    const bfloat16* weight_scale;  // [tiles, groups or 1, TILE]
    bool scale_per_group;
    int64_t tiles, planes;

    float* out;  // [rows, row], of which the first tiles · TILE columns are written
    int64_t row;
};

// Lays out codes [outputs, groups · width] of 4 or, in two planes, 8 bits as
// [tiles, groups, padded width / STEP, planes, 32 bytes]. A byte holds the same input channel of outputs n and n + 8.
// ADDED to the only plane, or to the upper one of two.
void pack_weight(const int8_t* codes, int64_t outputs, int64_t groups, int64_t width, int64_t planes, uint8_t* packed);

// The scale of each group of x [groups, size]: that fraction of its peak whose codes leave the smallest squared error,
// the first of equals.
template <class F>
struct SearchScale {
    const F* x;
    const F* peak;  // [groups]: the scale that just reaches the largest magnitude
    int64_t groups, size;
    const F* fraction;  // [fractions]
    int64_t fractions;
    int32_t lowest, highest;  // code
    F* scale;                 // [groups]
};

// Neighbouring columns of a weight, rounded one after another (numerics/gptq.py). An array [columns, outputs] has
// one row per column.
template <class F>
struct RoundColumns {
    const F* weight;  // [columns, outputs]
    const F* owed;    // [columns, outputs], rows `owed_row` apart: what the errors of earlier columns ask for
    int64_t owed_row;
    const F* factor;  // [columns, columns], rows `factor_row` apart: the columns' block of R
    int64_t factor_row;
    const F* scale;  // [outputs]
    int64_t columns, outputs;
    int32_t lowest, highest;  // code
    int8_t* codes;            // [columns, outputs]
    F* errors;                // [columns, outputs]
};

// What one kind of processor runs.
struct Kernels {
    const char* name;
    // Whether all of X' is finite.
    bool (*quantize_input)(const QuantizeInput&, int threads);
    void (*grouped_matmul)(const GroupedMatmul&, int threads);
    double (*products_per_second)(int threads);
    void (*search_scale)(const SearchScale<float>&, int threads);
    void (*search_scale_double)(const SearchScale<double>&, int threads);
    void (*round_columns)(const RoundColumns<float>&, int threads);
    void (*round_columns_double)(const RoundColumns<double>&, int threads);
};

extern const Kernels PORTABLE;
#ifdef OMEGA_QVLA_X86
extern const Kernels AVX2;
extern const Kernels AVX512_VNNI;
#endif

}  // namespace omega_qvla
