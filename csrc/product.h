// The product of codes: written once for processors of any width. A processor is a class V that names its vectors of
// W floats or 32-bit integers and what they do; each is compiled in a file of its own, with the instructions it has.
// It multiplies TILES tiles of outputs of at most MOST_ROWS tokens at a time.

#pragma once

#include "kernels.h"
#include "scratch.h"

namespace omega_qvla {
namespace {

constexpr int64_t LINE = 64;                 // bytes of a cache line
constexpr int64_t STORED = 32;               // bytes of a tile's step and plane: nibbles
constexpr int64_t UNPACKED = 64;             // bytes of the same: those of lower nibbles, those of upper ones
constexpr int64_t TOKENS_TOGETHER = 96;      // of which the codes of
constexpr int64_t CHANNELS_TOGETHER = 1024;  // fit the second cache

// What is multiplied while it is in the caches: some tokens, some groups, some tiles after the others.
struct Block {
    int64_t row, rows;
    int64_t group, end;
};

// One group of some tokens and of some tiles of outputs.
struct Group {
    const uint8_t* weight;         // [steps, planes, tiles, outputs, STEP]
    const bfloat16* weight_scale;  // of the first tile,
    int64_t scale_tile;            // so far from those of the next

    const int8_t* codes;      // [tokens, width]
    const int32_t* of_codes;  // [tokens]: their sums
    const float* scale;       // of the first token,
    int64_t scale_row;        // so far from that of the next
    int64_t width;
    bool wide_codes;

    float* total;  // [tokens, outputs]: of the groups before
};

// Multiplies the next ROWS tokens, so many times. The order of operations is part of the definition: each group's sum
// is exact, then it is scaled by the input's and by the weight's scale, then added to those before.
template <class V, int PLANES, int TILES, int ROWS>
void multiply(Group& group, int64_t times) {
    constexpr int PARTS = TILES * TILE / V::W;
    typename V::Floats of_weight[PARTS];
    for (int p = 0; p < PARTS; ++p)
        of_weight[p] = V::load_short(group.weight_scale + p * V::W / TILE * group.scale_tile + p * V::W % TILE);
    // Copies: stores might change the group, for all that compilers know.
    const uint8_t* weight = group.weight;
    const int64_t width = group.width, scale_row = group.scale_row;
    const bool wide_codes = group.wide_codes;
    const int8_t* codes = group.codes;
    const int32_t* of_codes = group.of_codes;
    const float* scale = group.scale;
    float* total = group.total;
    for (; times > 0; --times) {
        asm("" : "+r"(total), "+r"(codes) : : "memory");  // else compilers mix one round with the next, and spill
        typename V::Integers sum[ROWS][PARTS];
        V::template accumulate<ROWS, PLANES>(weight, codes, width, width / STEP, wide_codes, of_codes, sum);
        codes += ROWS * width;
        of_codes += ROWS;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r, scale += scale_row) {
            const auto of_row = V::floats(*scale);
            for (int p = 0; p < PARTS; ++p, total += V::W) {
                const auto part = V::multiply(V::multiply(V::to_floats(sum[r][p]), of_row), of_weight[p]);
                V::store(total, V::add(V::load(total), part));
            }
        }
    }
    group.codes = codes;
    group.of_codes = of_codes;
    group.scale = scale;
    group.total = total;
}

// The same of a number of tokens that is known when it runs, at most ROWS.
template <class V, int PLANES, int TILES, int ROWS>
void multiply_some(int64_t tokens, Group& group, int64_t times) {
    if (tokens == ROWS) return multiply<V, PLANES, TILES, ROWS>(group, times);
    if constexpr (ROWS > 1) multiply_some<V, PLANES, TILES, ROWS - 1>(tokens, group, times);
}

// All of a block and of some tiles. `room`: for a group's weights.
template <class V, int PLANES, int TILES>
void multiply_block(const GroupedMatmul& m, const Block& block, int64_t tile, uint8_t* room) {
    constexpr int64_t PARTS = TILES * TILE / V::W, MOST = V::MOST_ROWS / PLANES;
    const int64_t turns = (block.rows + MOST - 1) / MOST, fewer = block.rows / turns, with_more = block.rows % turns;
    const int64_t steps = m.width / STEP * PLANES, tile_bytes = m.groups * steps * STORED;
    const int64_t scale_group = m.scale_per_group ? TILE : 0;
    const int64_t scale_tile = m.scale_per_group ? m.groups * TILE : TILE;

    alignas(64) float total[TOKENS_TOGETHER][TILES * TILE];
    float* out = m.out + block.row * m.row + tile * TILE;
    for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t p = 0; p < PARTS; ++p)
            V::store(total[r] + p * V::W, block.group > 0 ? V::load(out + r * m.row + p * V::W) : V::floats(-0.0f));
    for (int64_t g = block.group; g < block.end; ++g) {
        const uint8_t* stored = m.weight + tile * tile_bytes + g * steps * STORED;
        // The next tiles are met for the first time, and far away.
        for (int64_t t = TILES; t < smaller(2 * TILES, m.tiles - tile); ++t)
            for (int64_t i = 0; i < steps * STORED; i += LINE) __builtin_prefetch(stored + t * tile_bytes + i);
        for (int64_t s = 0; s < steps; ++s)
            for (int64_t t = 0; t < TILES; ++t)
                V::unpack(stored + t * tile_bytes + s * STORED, room + (s * TILES + t) * UNPACKED);
        const int64_t place = g * m.rows + block.row;
        Group group{room,
                    m.weight_scale + tile * scale_tile + g * scale_group,
                    scale_tile,
                    m.codes + place * m.width,
                    m.sums + place,
                    m.scale + block.row * m.scale_row + g * m.scale_group,
                    m.scale_row,
                    m.width,
                    m.wide_codes,
                    total[0]};
        multiply_some<V, PLANES, TILES, MOST>(fewer, group, turns - with_more);
        if (with_more > 0) multiply_some<V, PLANES, TILES, MOST>(fewer + 1, group, with_more);
    }
    for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t p = 0; p < PARTS; ++p) V::store(out + r * m.row + p * V::W, V::load(total[r] + p * V::W));
}

template <class V, int PLANES>
void multiply_tiles(const GroupedMatmul& m, const Block& block, int64_t tile, uint8_t* room) {
    if (tile + V::TILES <= m.tiles) return multiply_block<V, PLANES, V::TILES>(m, block, tile, room);
    if constexpr (V::TILES > 1)
        for (; tile < m.tiles; ++tile) multiply_block<V, PLANES, 1>(m, block, tile, room);
}

// Each thread has tiles of its own.
template <class V>
void grouped_matmul(const GroupedMatmul& m, int threads) {
    const int64_t groups = larger(1, CHANNELS_TOGETHER / m.width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<uint8_t> room(m.width / STEP * m.planes * V::TILES * UNPACKED);
        for (int64_t row = 0; row < m.rows; row += TOKENS_TOGETHER)
            for (int64_t g = 0; g < m.groups; g += groups) {
                const Block block{row, smaller(TOKENS_TOGETHER, m.rows - row), g, smaller(m.groups, g + groups)};
#pragma omp for schedule(static) nowait
                for (int64_t tile = 0; tile < m.tiles; tile += V::TILES) {
                    if (m.planes == 1)
                        multiply_tiles<V, 1>(m, block, tile, room);
                    else
                        multiply_tiles<V, 2>(m, block, tile, room);
                }
            }
    }
}

}  // namespace
}  // namespace omega_qvla
