// The product of codes: written once for processors of any width. A processor is a class V that names its vectors of
// W floats or 32-bit integers and what they do; each is compiled in a file of its own, with the instructions it has.

#pragma once

#include "kernels.h"

namespace omega_qvla {
namespace {

constexpr int64_t LINE = 64;                 // bytes of a cache line
constexpr int64_t TOKENS_TOGETHER = 96;      // of which the codes of
constexpr int64_t CHANNELS_TOGETHER = 1024;  // fit the second cache, and those of a tile's weights the first

// What is multiplied while it is in the caches: some tokens, some groups, one tile after the other.
struct Block {
    int64_t row, rows;
    int64_t group, end;
};

// A tile of outputs of ROWS tokens. The order of operations is part of the definition: each group's sum is exact, then
// it is scaled by the input's and by the weight's scale, then added to those before.
template <class V, int ROWS, int PLANES>
void multiply(const GroupedMatmul& m, const Block& block, int64_t row, int64_t tile) {
    constexpr int PARTS = TILE / V::W;
    const int64_t steps = m.width / STEP, group_bytes = steps * PLANES * 32, tile_bytes = m.groups * group_bytes;
    const bool last = row + ROWS == block.row + block.rows && tile + 1 < m.tiles;
    float* out = m.out + row * m.row + tile * TILE;

    // Of the group that is multiplied. All of `m` that the loop needs is copied: stores might change it, for all that
    // compilers know.
    const uint8_t* weight = m.weight + tile * tile_bytes + block.group * group_bytes;
    const int64_t next_scale = m.scale_per_group ? TILE : 0;
    const int64_t tile_scales = m.scale_per_group ? m.groups * TILE : TILE;
    const bfloat16* of_tile = m.weight_scale + tile * tile_scales + block.group * next_scale;
    const int64_t rows = m.rows, width = m.width;
    const int8_t* codes = m.codes + (block.group * rows + row) * width;
    const int32_t* of_codes = m.sums + block.group * rows + row;
    const int64_t scale_row = m.scale_row, scale_group = m.scale_group;
    const float* of_rows = m.scale + row * scale_row + block.group * scale_group;
    const bool wide = m.wide_codes;

    alignas(64) float memory[ROWS][TILE];
    float(*total)[TILE] = memory;
    asm("" : "+r"(total) : : "memory");  // else compilers keep it in two places
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PARTS; ++p)
            V::store(total[r] + p * V::W, block.group > 0 ? V::load(out + r * m.row + p * V::W) : V::floats(-0.0f));
    for (int64_t g = block.group; g < block.end; ++g) {
        // The next tile is met for the first time, and far away.
        if (last)
            for (int64_t i = 0; i < group_bytes; i += LINE) __builtin_prefetch(weight + tile_bytes + i);
        typename V::Integers sum[ROWS][PARTS];
        V::template accumulate<ROWS, PLANES>(weight, codes, width, steps, wide, of_codes, sum);
        typename V::Floats of_weight[PARTS];
        for (int p = 0; p < PARTS; ++p) of_weight[p] = V::load_short(of_tile + p * V::W);
        const float* of_row = of_rows;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r, of_row += scale_row) {
            const auto scale = V::floats(*of_row);
            for (int p = 0; p < PARTS; ++p) {
                float* place = total[r] + p * V::W;
                const auto part = V::multiply(V::multiply(V::to_floats(sum[r][p]), scale), of_weight[p]);
                V::store(place, V::add(V::load(place), part));
            }
        }
        weight += group_bytes;
        of_tile += next_scale;
        codes += rows * width;
        of_codes += rows;
        of_rows += scale_group;
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PARTS; ++p) V::store(out + r * m.row + p * V::W, V::load(total[r] + p * V::W));
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
