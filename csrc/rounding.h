// The two loops of quantization that are long, written plainly: compilers make vectors of LANES values of them, in each
// file with the instructions it has. No sum depends on how wide those are: all processors give the same bits.

#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace omega_qvla {
namespace {

constexpr int64_t LANES = 16;

// To the nearest whole number, ties to even, of a value far below 2^22.
inline float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
inline double nearest(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// The nearest value that a scale stored in two bytes can have.
template <class F>
F storable(F scale) {
    const float single = float(scale);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    bits += 0x7fff + (bits >> 16 & 1);
    bits &= 0xffff0000;
    float stored;
    std::memcpy(&stored, &bits, sizeof stored);
    return F(stored);
}

// As a code, still a floating-point number.
template <class F>
F rounded(F scaled, F lowest, F highest) {
    return nearest(scaled < lowest ? lowest : scaled > highest ? highest : scaled);
}

template <class F>
F squared_error(const F* x, int64_t size, F scale, F lowest, F highest) {
    const F inverse = scale > 0 ? 1 / scale : 0;
    F sum[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int64_t l = 0; l < LANES; ++l) {
            const F missed = rounded(x[i + l] * inverse, lowest, highest) * scale - x[i + l];
            sum[l] += missed * missed;
        }
    for (; i < size; ++i) {
        const F missed = rounded(x[i] * inverse, lowest, highest) * scale - x[i];
        sum[i % LANES] += missed * missed;
    }
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) sum[l] += sum[l + half];
    return sum[0];
}

template <class F>
void search_scale(const SearchScale<F>& search, int threads) {
    const F lowest = F(search.lowest), highest = F(search.highest);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t g = 0; g < search.groups; ++g) {
        const F* x = search.x + g * search.size;
        F best = storable(search.peak[g]), least = std::numeric_limits<F>::infinity();
        for (int64_t f = 0; f < search.fractions; ++f) {
            const F scale = storable(search.peak[g] * search.fraction[f]);
            const F error = squared_error(x, search.size, scale, lowest, highest);
            if (error < least) {
                least = error;
                best = scale;
            }
        }
        search.scale[g] = best;
    }
}

// Of up to LANES neighbouring outputs. What they owe is copied: it is changed for every column.
template <class F>
void round_lanes(const RoundColumns<F>& round, int64_t first, F* owed) {
    const int64_t lanes = round.outputs - first < LANES ? round.outputs - first : LANES;
    const F lowest = F(round.lowest), highest = F(round.highest);
    F scale[LANES] = {}, inverse[LANES] = {};
    for (int64_t l = 0; l < lanes; ++l) {
        scale[l] = round.scale[first + l];
        inverse[l] = scale[l] > 0 ? 1 / scale[l] : 0;
    }
    for (int64_t j = 0; j < round.columns; ++j)
        for (int64_t l = 0; l < LANES; ++l) owed[j * LANES + l] = l < lanes ? round.owed[j * round.owed_row + first + l] : 0;
    for (int64_t j = 0; j < round.columns; ++j) {
        const F* of_factor = round.factor + j * round.factor_row;
        F column[LANES] = {}, code[LANES], error[LANES];
        for (int64_t l = 0; l < lanes; ++l) column[l] = round.weight[j * round.outputs + first + l];
        for (int64_t l = 0; l < LANES; ++l) {
            const F wanted = column[l] + owed[j * LANES + l] / of_factor[j];
            code[l] = rounded(wanted * inverse[l], lowest, highest);
            error[l] = column[l] - code[l] * scale[l];
        }
        for (int64_t k = j + 1; k < round.columns; ++k)
            for (int64_t l = 0; l < LANES; ++l) owed[k * LANES + l] += of_factor[k] * error[l];
        for (int64_t l = 0; l < lanes; ++l) {
            round.codes[j * round.outputs + first + l] = int8_t(code[l]);
            round.errors[j * round.outputs + first + l] = error[l];
        }
    }
}

template <class F>
void round_columns(const RoundColumns<F>& round, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<F> owed(round.columns * LANES);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < round.outputs; first += LANES) round_lanes(round, first, owed.data());
    }
}

}  // namespace
}  // namespace omega_qvla
