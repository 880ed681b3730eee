// Any processor, one value at a time.

#include "input.h"
#include "peak.h"
#include "product.h"
#include "rounding.h"

namespace omega_qvla {
namespace {

struct Portable {
    static constexpr int W = 1;
    static constexpr int TILES = 1;
    static constexpr int MOST_ROWS = 4;
    using Floats = float;
    using Integers = int32_t;

    static float load(const float* p) { return *p; }
    static void store(float* p, float x) { *p = x; }
    static float floats(float x) { return x; }
    static float add(float a, float b) { return a + b; }
    static float sub(float a, float b) { return a - b; }
    static float multiply(float a, float b) { return a * b; }
    static float multiply_add(float a, float b, float c) { return a * b + c; }
    static float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
    static float to_floats(int32_t x) { return float(x); }
    static float load_short(const bfloat16* p) { return widened(*p); }

    static int32_t integers(int32_t x) { return x; }
    static int32_t add(int32_t a, int32_t b) { return a + b; }
    static int32_t sub(int32_t a, int32_t b) { return a - b; }
    static int32_t larger(int32_t a, int32_t b) { return a < b ? b : a; }
    static int32_t rounded(float x) { return int32_t(std::nearbyint(x)); }
    static int32_t magnitude_bits(float x) {
        int32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return bits & 0x7fffffff;
    }
    static uint32_t largest(int32_t x) { return uint32_t(x); }
    static int32_t total(int32_t x) { return x; }
    static void store_bytes(int8_t* p, const int32_t (&x)[4]) {
        for (int i = 0; i < 4; ++i) p[i] = int8_t(x[i]);
    }
    static float hadamard(float x) { return x; }

    static void unpack(const uint8_t* stored, uint8_t* to) {
        for (int64_t i = 0; i < STORED; ++i) {
            to[i] = stored[i] & 15;
            to[STORED + i] = stored[i] >> 4;
        }
    }

    // Σ w · x over the steps of one group, of ROWS tokens and the 16 outputs of a tile; `of_codes` are Σ x.
    template <int ROWS, int PLANES>
    static void accumulate(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t steps, bool,
                           const int32_t* of_codes, int32_t (&sum)[ROWS][TILE]) {
        for (int r = 0; r < ROWS; ++r)
            for (int n = 0; n < TILE; ++n) sum[r][n] = -(ADDED << 4 * (PLANES - 1)) * of_codes[r];
        for (int64_t s = 0; s < steps; ++s)
            for (int p = 0; p < PLANES; ++p)
                for (int i = 0; i < TILE * STEP; ++i) {
                    const int32_t of_weight = weight[(s * PLANES + p) * TILE * STEP + i] << 4 * p;
                    for (int r = 0; r < ROWS; ++r)
                        sum[r][i / STEP] += of_weight * x[r * stride + s * STEP + i % STEP];
                }
    }

    static int64_t products_in_registers(int64_t rounds) {
        volatile int32_t keep = 0;
        int32_t sum = keep, x = keep + 3;
        for (int64_t i = 0; i < rounds; ++i) {
            sum += int32_t(uint8_t(i)) * x;
            asm volatile("" : "+r"(sum), "+r"(x));
        }
        keep = sum;
        return rounds;
    }
};

}  // namespace

const Kernels PORTABLE = {"portable",
                      quantize_input<Portable>,
                      grouped_matmul<Portable>,
                      products_per_second<Portable>,
                      search_scale<float>,
                      search_scale<double>,
                      round_columns<float>,
                      round_columns<double>};

}  // namespace omega_qvla
