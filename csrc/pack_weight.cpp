#include <cstring>

#include "kernels.h"

namespace omega_qvla {

void pack_weight(const int8_t* codes, int64_t outputs, int64_t groups, int64_t width, int64_t planes, uint8_t* packed) {
    const int64_t tiles = rounded_up(outputs, TILE) / TILE, steps = rounded_up(width, STEP) / STEP;
    const int64_t tile_bytes = groups * steps * planes * 32;
    std::memset(packed, 0, tiles * tile_bytes);
    for (int64_t n = 0; n < tiles * TILE; ++n)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t k = 0; k < steps * STEP; ++k) {
                const bool stored = n < outputs && k < width;
                const int code = stored ? codes[(n * groups + g) * width + k] : 0;
                const int shift = n % TILE < TILE / 2 ? 0 : 4;
                uint8_t* at = packed + n / TILE * tile_bytes + (g * steps + k / STEP) * planes * 32 +
                              n % (TILE / 2) * STEP + k % STEP;
                if (planes == 1) {
                    at[0] |= uint8_t((code + ADDED) << shift);
                } else {
                    const int lower = code & 15;
                    at[0] |= uint8_t(lower << shift);
                    at[32] |= uint8_t(((code - lower) / 16 + ADDED) << shift);
                }
            }
}

}  // namespace omega_qvla
