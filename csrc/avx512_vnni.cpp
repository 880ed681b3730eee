// Processors with AVX-512 and its instruction for four 8-bit products at a time.

#include <immintrin.h>

#include "input.h"
#include "peak.h"
#include "product.h"
#include "rounding.h"

namespace omega_qvla {
namespace {

struct Avx512Vnni {
    static constexpr int W = 16;
    static constexpr int TILES = 2;
    static constexpr int MOST_ROWS = 12;  // whose sums fit the registers
    using Floats = __m512;
    using Integers = __m512i;

    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    static Floats floats(float x) { return _mm512_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    static Floats clamp(Floats x, Floats low, Floats high) { return _mm512_min_ps(_mm512_max_ps(x, low), high); }
    static Floats to_floats(Integers x) { return _mm512_cvtepi32_ps(x); }
    static Floats load_short(const bfloat16* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }

    static Integers integers(int32_t x) { return _mm512_set1_epi32(x); }
    static Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
    static Integers sub(Integers a, Integers b) { return _mm512_sub_epi32(a, b); }
    static Integers larger(Integers a, Integers b) { return _mm512_max_epi32(a, b); }
    static Integers rounded(Floats x) { return _mm512_cvtps_epi32(x); }
    static Integers magnitude_bits(Floats x) {
        return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    }
    static uint32_t largest(Integers x) { return uint32_t(_mm512_reduce_max_epi32(x)); }
    static int32_t total(Integers x) { return _mm512_reduce_add_epi32(x); }
    static void store_bytes(int8_t* p, const Integers (&x)[4]) {
        for (int i = 0; i < 4; ++i)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * W), _mm512_cvtepi32_epi8(x[i]));
    }

    // The stages of a Hadamard transform within each sixteen values.
    static Floats hadamard(Floats x) {
        x = sum_and_difference(x, _mm512_permute_ps(x, 0b10'11'00'01), 0b10101010'10101010);
        x = sum_and_difference(x, _mm512_permute_ps(x, 0b01'00'11'10), 0b11001100'11001100);
        x = sum_and_difference(x, _mm512_shuffle_f32x4(x, x, 0b10'11'00'01), 0b11110000'11110000);
        return sum_and_difference(x, _mm512_shuffle_f32x4(x, x, 0b01'00'11'10), 0b11111111'00000000);
    }

    static void unpack(const uint8_t* stored, uint8_t* to) {
        const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored)));
        const __m512i apart = _mm512_mask_srli_epi16(twice, 0xffff0000, twice, 4);
        _mm512_store_si512(to, _mm512_and_si512(apart, _mm512_set1_epi8(15)));
    }

    // Σ w · x over the steps of one group, of ROWS tokens and the outputs of PARTS tiles; `of_codes` are Σ x.
    template <int ROWS, int PLANES, int PARTS>
    static void accumulate(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t steps, bool,
                           const int32_t* of_codes, Integers (&sum)[ROWS][PARTS]) {
        __m512i sums[ROWS][PLANES][PARTS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < PARTS; ++t) {
                for (int p = 0; p < PLANES; ++p) sums[r][p][t] = _mm512_setzero_si512();
                sums[r][PLANES - 1][t] = _mm512_set1_epi32(-ADDED * of_codes[r]);
            }
#pragma GCC unroll 1
        for (int64_t s = 0; s < steps; ++s) {
            __m512i of_weight[PLANES][PARTS];
            for (int p = 0; p < PLANES; ++p)
                for (int t = 0; t < PARTS; ++t) {
                    of_weight[p][t] = _mm512_load_si512(weight);
                    weight += sizeof(__m512i);
                }
            const int8_t* four = x + s * STEP;
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                asm("" : "+r"(four));  // else compilers keep an address for each token
                const __m512i of_row = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(four));
                for (int p = 0; p < PLANES; ++p)
                    for (int t = 0; t < PARTS; ++t) add_products(sums[r][p][t], of_weight[p][t], of_row);
                four += stride;
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < PARTS; ++t) {
                sum[r][t] = sums[r][0][t];
                if constexpr (PLANES == 2)
                    sum[r][t] = _mm512_add_epi32(sum[r][t], _mm512_slli_epi32(sums[r][PLANES - 1][t], 4));
            }
    }

    static int64_t products_in_registers(int64_t rounds) {
        const __m512i weight = _mm512_set1_epi8(1), x = _mm512_set1_epi8(-1);
        __m512i a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{};  // an array would lie in memory
        const auto add_to = [&](__m512i& sum) { asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x)); };
        for (int64_t round = 0; round < rounds; ++round) {
            add_to(a), add_to(b), add_to(c), add_to(d), add_to(e), add_to(f);
            add_to(g), add_to(h), add_to(i), add_to(j), add_to(k), add_to(l);
        }
        return rounds * 12 * int64_t(sizeof(__m512i));
    }

private:
    static Floats sum_and_difference(Floats x, Floats other, __mmask16 upper) {
        return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
    }

    // Compilers keep sums in registers here, which around the intrinsic they do not (gcc 12).
    static void add_products(__m512i& sum, __m512i weight, __m512i of_row) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(of_row));
    }
};

}  // namespace

const Kernels AVX512_VNNI = {"avx512-vnni",
                      quantize_input<Avx512Vnni>,
                      grouped_matmul<Avx512Vnni>,
                      products_per_second<Avx512Vnni>,
                      search_scale<float>,
                      search_scale<double>,
                      round_columns<float>,
                      round_columns<double>};

}  // namespace omega_qvla
