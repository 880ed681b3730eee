// Processors with AVX2 and FMA. Their 8-bit products are added in pairs in 16 bits: codes of four bits, unsigned weights
// times signed inputs, leave room for many of these sums before they have to be widened.

#include <immintrin.h>

#include "input.h"
#include "peak.h"
#include "product.h"
#include "rounding.h"

namespace omega_qvla {
namespace {

struct Avx2 {
    static constexpr int W = 8;
    static constexpr int TILES = 1;
    static constexpr int MOST_ROWS = 6;  // whose sums fit the registers
    using Floats = __m256;
    using Integers = __m256i;

    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
    static Floats floats(float x) { return _mm256_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    static Floats clamp(Floats x, Floats low, Floats high) { return _mm256_min_ps(_mm256_max_ps(x, low), high); }
    static Floats to_floats(Integers x) { return _mm256_cvtepi32_ps(x); }
    static Floats load_short(const bfloat16* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }

    static Integers integers(int32_t x) { return _mm256_set1_epi32(x); }
    static Integers add(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
    static Integers sub(Integers a, Integers b) { return _mm256_sub_epi32(a, b); }
    static Integers larger(Integers a, Integers b) { return _mm256_max_epi32(a, b); }
    static Integers rounded(Floats x) { return _mm256_cvtps_epi32(x); }
    static Integers magnitude_bits(Floats x) {
        return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    }
    static uint32_t largest(Integers x) {
        __m128i most = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0b01'00'11'10));
        most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0b10'11'00'01));
        return uint32_t(_mm_cvtsi128_si32(most));
    }
    static int32_t total(Integers x) {
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01'00'11'10));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10'11'00'01));
        return _mm_cvtsi128_si32(sum);
    }
    static void store_bytes(int8_t* p, const Integers (&x)[4]) {
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
        // Vectors are packed half by half.
        const __m256i in_order = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), in_order);
    }

    // The stages of a Hadamard transform within each eight values.
    static Floats hadamard(Floats x) {
        const __m256 odd = _mm256_castsi256_ps(_mm256_setr_epi32(0, SIGN, 0, SIGN, 0, SIGN, 0, SIGN));
        const __m256 upper = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, SIGN, SIGN, 0, 0, SIGN, SIGN));
        const __m256 last = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, 0, 0, SIGN, SIGN, SIGN, SIGN));
        x = _mm256_add_ps(_mm256_permute_ps(x, 0b10'11'00'01), _mm256_xor_ps(x, odd));
        x = _mm256_add_ps(_mm256_permute_ps(x, 0b01'00'11'10), _mm256_xor_ps(x, upper));
        return _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, last));
    }

    static void unpack(const uint8_t* stored, uint8_t* to) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(both, nibble));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to) + 1, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
    }

    // Σ w · x over the steps of one group, of ROWS tokens and the 16 outputs of a tile; `of_codes` are Σ x.
    template <int ROWS, int PLANES>
    static void accumulate(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t steps, bool wide,
                           const int32_t* of_codes, Integers (&sum)[ROWS][2]) {
        constexpr int64_t FAMILIAR = 64;  // channels in a group, usually: all places are known then
        if (!wide && stride == FAMILIAR)
            return accumulate_some<ROWS, PLANES, true>(weight, x, FAMILIAR, 0, FAMILIAR / STEP, of_codes, sum);
        // 16 bits hold 64 pairs of products below 2^8 and what they begin with, or 128 such pairs alone, or 8 below
        // 2^12.
        if (!wide && steps <= 64)
            return accumulate_some<ROWS, PLANES, true>(weight, x, stride, 0, steps, of_codes, sum);
        // Elsewhere, and of other variables: else compilers keep the sums above in memory, too.
        Integers all[ROWS][2];
        accumulate_many<ROWS, PLANES>(weight, x, stride, steps, wide ? 8 : 128, of_codes, all);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            sum[r][0] = all[r][0];
            sum[r][1] = all[r][1];
        }
    }

    static int64_t products_in_registers(int64_t rounds) {
        const __m256i weight = _mm256_set1_epi8(1), x = _mm256_set1_epi8(-1);
        __m256i a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{};  // an array would lie in memory
        const auto add_to = [&](__m256i& sum) {
            __m256i products;
            asm volatile("vpmaddubsw %[x], %[weight], %[products]\n\t"
                         "vpaddw %[products], %[sum], %[sum]"
                         : [sum] "+x"(sum), [products] "=&x"(products)
                         : [weight] "x"(weight), [x] "x"(x));
        };
        for (int64_t i = 0; i < rounds; ++i)
            add_to(a), add_to(b), add_to(c), add_to(d), add_to(e), add_to(f), add_to(g), add_to(h);
        return rounds * 8 * int64_t(sizeof(__m256i));
    }

private:
    template <int ROWS, int PLANES>
    [[gnu::noinline]] static void accumulate_many(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t steps,
                                                  int64_t most, const int32_t* of_codes, Integers (&sum)[ROWS][2]) {
        for (int r = 0; r < ROWS; ++r)
            sum[r][0] = sum[r][1] = _mm256_set1_epi32(-(ADDED << 4 * (PLANES - 1)) * of_codes[r]);
        for (int64_t start = 0; start < steps; start += most) {
            Integers more[ROWS][2];
            accumulate_some<ROWS, PLANES, false>(weight, x, stride, start, smaller(steps, start + most), of_codes,
                                                 more);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                sum[r][0] = _mm256_add_epi32(sum[r][0], more[r][0]);
                sum[r][1] = _mm256_add_epi32(sum[r][1], more[r][1]);
            }
        }
    }

    template <int ROWS, int PLANES, bool SIGNED>
    [[gnu::always_inline]] static void accumulate_some(const uint8_t* weight, const int8_t* x, int64_t stride,
                                                      int64_t start, int64_t end, const int32_t* of_codes,
                                                      Integers (&sum)[ROWS][2]) {
        __m256i low[ROWS][PLANES], high[ROWS][PLANES];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            for (int p = 0; p < PLANES; ++p) low[r][p] = high[r][p] = _mm256_setzero_si256();
            if constexpr (SIGNED)  // the first of each pair begins with -8 Σ x
                low[r][PLANES - 1] = high[r][PLANES - 1] =
                    _mm256_mullo_epi16(_mm256_set1_epi32(of_codes[r]), _mm256_set1_epi32(-ADDED & 0xffff));
        }
        for (int64_t s = start; s < end; ++s) {
            __m256i of_low[PLANES], of_high[PLANES];
            for (int p = 0; p < PLANES; ++p) {
                const auto* at = reinterpret_cast<const __m256i*>(weight + (s * PLANES + p) * 2 * sizeof(__m256i));
                of_low[p] = _mm256_load_si256(at);
                of_high[p] = _mm256_load_si256(at + 1);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                for (int p = 0; p < PLANES; ++p)
                    add_products(low[r][p], high[r][p], of_low[p], of_high[p], x + r * stride + s * STEP);
            }
        }
        const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            sum[r][0] = widened<PLANES>(low[r], ones);
            sum[r][1] = widened<PLANES>(high[r], ones);
        }
    }

    // In this order all sums stay in registers; compilers that are free to choose take more of them at a time.
    static void add_products(__m256i& low, __m256i& high, __m256i of_low, __m256i of_high, const int8_t* four) {
        __m256i of_row, products;
        asm("vpbroadcastd %[four], %[of_row]\n\t"
            "vpmaddubsw %[of_row], %[of_low], %[products]\n\t"
            "vpmaddubsw %[of_row], %[of_high], %[of_row]\n\t"
            "vpaddw %[products], %[low], %[low]\n\t"
            "vpaddw %[of_row], %[high], %[high]"
            : [low] "+x"(low), [high] "+x"(high), [of_row] "=&x"(of_row), [products] "=&x"(products)
            : [of_low] "x"(of_low), [of_high] "x"(of_high), [four] "m"(*reinterpret_cast<const int32_t(*)>(four)));
    }

    static constexpr int SIGN = int(0x80000000);

    template <int PLANES>
    static __m256i widened(const __m256i (&pairs)[PLANES], __m256i ones) {
        const __m256i lower = _mm256_madd_epi16(pairs[0], ones);
        if constexpr (PLANES == 1) return lower;
        else return _mm256_add_epi32(lower, _mm256_slli_epi32(_mm256_madd_epi16(pairs[PLANES - 1], ones), 4));
    }
};

}  // namespace

const Kernels AVX2 = {"avx2",
                      quantize_input<Avx2>,
                      grouped_matmul<Avx2>,
                      products_per_second<Avx2>,
                      search_scale<float>,
                      search_scale<double>,
                      round_columns<float>,
                      round_columns<double>};

}  // namespace omega_qvla
