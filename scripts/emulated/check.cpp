// Random products and inputs of the AVX-512 VNNI kernels: the product must be that of 64-bit integers, everything must
// be what the portable kernels make of it, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "runtime.h"

using namespace omega_qvla;

namespace {

constexpr int TIMES = 300;

struct Random {
    using result_type = uint32_t;
    static constexpr uint32_t min() { return 0; }
    static constexpr uint32_t max() { return (1 << 24) - 1; }
    uint32_t operator()() {
        state_ = state_ * 1664525u + 1013904223u;
        return state_ >> 8;
    }
    int within(int least, int most) { return least + int((*this)() % uint32_t(most - least + 1)); }
    bool coin() { return within(0, 1); }
    float fraction() { return float((*this)()) / float(max()); }
    template <class T, size_t N>
    T of(const T (&values)[N]) {
        return values[within(0, N - 1)];
    }

private:
    uint32_t state_ = 1;
};

Random draw;

bfloat16 shortened(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bfloat16(bits >> 16);
}

float widened(bfloat16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
std::vector<T> fractions(int64_t count) {
    std::vector<T> found(count);
    for (T& x : found) x = T(draw.fraction()) + T(0.01);
    return found;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Widths {
    int weight, input;
};

bool product() {
    const Widths bits = draw.of<Widths>({{4, 4}, {4, 8}, {8, 4}, {8, 8}, {2, 4}, {3, 8}, {8, 5}});
    const int size = draw.of({1, 5, 64, 64, 100, 128, 252, 256, 260, 512, 516, 2050});
    const int groups = draw.within(1, size > 300 ? 2 : 5), rows = draw.within(0, 30), outputs = draw.within(1, 70);
    const bool extreme = draw.coin(), per_group = draw.coin(), per_row = draw.coin();
    const int64_t planes = bits.weight <= 4 ? 1 : 2, width = rounded_up(size, STEP);
    const int64_t tiles = rounded_up(outputs, TILE) / TILE;
    const auto code = [&](int of) {
        const int highest = (1 << (of - 1)) - 1;
        return int8_t(extreme ? (draw.coin() ? highest : -highest - 1) : draw.within(-highest - 1, highest));
    };
    std::vector<int8_t> weight(outputs * groups * size), codes(groups * rows * width, 0);
    std::vector<int32_t> sums(groups * rows, 0);
    for (int8_t& c : weight) c = code(bits.weight);
    for (int64_t place = 0; place < groups * rows; ++place)
        for (int i = 0; i < size; ++i) sums[place] += codes[place * width + i] = code(bits.input);
    std::vector<uint8_t> packed(tiles * groups * width * planes * TILE / 2);
    pack_weight(weight.data(), outputs, groups, size, planes, packed.data());
    const int64_t scales = per_group ? groups : 1;
    std::vector<bfloat16> of_weight(tiles * scales * TILE);
    for (bfloat16& scale : of_weight) scale = shortened(draw.fraction());
    const auto of_rows = fractions<float>(per_row ? rows * groups + 1 : 1);

    GroupedMatmul m{};
    m.codes = codes.data(), m.sums = sums.data(), m.scale = of_rows.data();
    m.scale_row = per_row ? groups : 0, m.scale_group = per_row ? 1 : 0;
    m.wide_codes = bits.input > 4, m.rows = rows, m.groups = groups, m.width = width;
    m.weight = packed.data(), m.weight_scale = of_weight.data(), m.scale_per_group = per_group;
    m.tiles = tiles, m.planes = planes, m.row = tiles * TILE;
    std::vector<float> found(rows * m.row, NAN), portable(rows * m.row, NAN);
    m.out = found.data();
    AVX512_VNNI.grouped_matmul(m, 1);
    m.out = portable.data();
    PORTABLE.grouped_matmul(m, 1);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = 0; n < outputs; ++n) {
            float expected = 0;
            for (int64_t g = 0; g < groups; ++g) {
                int64_t sum = 0;
                for (int64_t i = 0; i < size; ++i)
                    sum += int64_t(weight[(n * groups + g) * size + i]) * codes[(g * rows + r) * width + i];
                const float scale = widened(of_weight[(n / TILE * scales + (per_group ? g : 0)) * TILE + n % TILE]);
                expected += float(sum) * of_rows[per_row ? r * groups + g : 0] * scale;
            }
            if (found[r * m.row + n] != expected) return false;
        }
    return same(found, portable);
}

bool input() {
    enum Rotation { NONE, HADAMARD, MATRICES, SHORT_MATRICES };
    const Rotation rotation = draw.of({NONE, HADAMARD, MATRICES, SHORT_MATRICES});
    const int block = draw.of({1, 2, 8, 16, 32, 64, 128, 256});
    const int channels = block * draw.within(1, 6), rows = draw.within(0, 9);
    const auto divisor = [](int of) {
        int found;
        do found = draw.within(1, of);
        while (of % found);
        return found;
    };
    const int group = draw.coin() ? block : divisor(channels), flushed = draw.coin() ? group : divisor(group);
    auto x = fractions<float>(rows * channels);
    for (float& value : x) value = (value - 0.5f) * (draw.within(0, 19) ? 1 : 30);
    std::vector<bfloat16> short_x(x.size());
    std::transform(x.begin(), x.end(), short_x.begin(), shortened);
    const auto before = fractions<float>(channels), after = fractions<float>(channels);
    const auto matrices = fractions<float>(channels * block);
    std::vector<bfloat16> short_matrices(matrices.size());
    std::transform(matrices.begin(), matrices.end(), short_matrices.begin(), shortened);
    std::vector<int32_t> order(channels);
    for (int i = 0; i < channels; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), draw);
    const float fixed = 0.07f;

    QuantizeInput in{};
    in.x_is_bfloat16 = draw.coin();
    in.x = in.x_is_bfloat16 ? static_cast<const void*>(short_x.data()) : x.data();
    in.rows = rows, in.channels = channels, in.group = group, in.flushed = flushed;
    if (draw.coin()) in.before = before.data();
    if (draw.coin()) in.order = order.data();
    if (draw.coin()) in.after = after.data();
    in.block = rotation == NONE ? 1 : block;
    in.hadamard = rotation == HADAMARD;
    if (rotation == MATRICES) in.matrices = matrices.data();
    if (rotation == SHORT_MATRICES) in.short_matrices = short_matrices.data();
    if (draw.coin()) in.fixed_scale = &fixed;
    const bool wide = draw.coin();
    in.lowest = wide ? -128 : -7, in.highest = wide ? 127 : 7;

    struct Found {
        std::vector<int8_t> codes;
        std::vector<int32_t> sums;
        std::vector<float> scale, values;
        bool finite;
    };
    const auto by = [&](const Kernels& kernels) {
        const int64_t places = channels / flushed * rows;
        Found found{std::vector<int8_t>(places * rounded_up(flushed, STEP), 99), std::vector<int32_t>(places, 99),
                    std::vector<float>(rows * (channels / group), 99), std::vector<float>(rows * channels, 99), false};
        in.codes = found.codes.data(), in.sums = found.sums.data();
        in.scale = found.scale.data(), in.values = found.values.data();
        found.finite = kernels.quantize_input(in, 1);
        return found;
    };
    const Found found = by(AVX512_VNNI), portable = by(PORTABLE);
    if (found.finite != portable.finite) return false;
    if (rotation == NONE || rotation == HADAMARD)
        return same(found.values, portable.values) && same(found.codes, portable.codes) &&
               same(found.sums, portable.sums) && same(found.scale, portable.scale);
    // Products with matrices are fused with their additions where processors can.
    for (size_t i = 0; i < found.values.size(); ++i)
        if (std::fabs(found.values[i] - portable.values[i]) > 1e-3f * (1 + std::fabs(portable.values[i]))) return false;
    return true;
}

bool scales() {
    const int groups = draw.within(1, 9), size = draw.within(1, 100), steps = draw.within(1, 30);
    auto x = fractions<float>(groups * size);
    for (float& value : x) value -= 0.5f;
    const auto peak = fractions<float>(groups), fraction = fractions<float>(steps);
    std::vector<float> found(groups), portable(groups);
    SearchScale<float> search{x.data(), peak.data(), groups, size, fraction.data(), steps, -7, 7, found.data()};
    AVX512_VNNI.search_scale(search, 1);
    search.scale = portable.data();
    PORTABLE.search_scale(search, 1);
    return same(found, portable);
}

bool columns() {
    const int64_t columns = draw.within(1, 20), outputs = draw.within(1, 70);
    const auto weight = fractions<double>(columns * outputs), owed = fractions<double>(columns * outputs);
    const auto factor = fractions<double>(columns * columns), scale = fractions<double>(outputs);
    std::vector<int8_t> found(columns * outputs), portable(columns * outputs);
    std::vector<double> errors(columns * outputs), portable_errors(columns * outputs);
    RoundColumns<double> round{weight.data(), owed.data(), outputs, factor.data(), columns,     scale.data(),
                               columns,       outputs,     -7,      7,             found.data(), errors.data()};
    AVX512_VNNI.round_columns_double(round, 1);
    round.codes = portable.data(), round.errors = portable_errors.data();
    PORTABLE.round_columns_double(round, 1);
    return same(found, portable) && same(errors, portable_errors);
}

}  // namespace

extern "C" void check() {
    struct {
        const char* name;
        bool (*holds)();
    } const checks[] = {
        {"product", product}, {"input", input}, {"search of scales", scales}, {"rounding of columns", columns}};
    for (const auto& each : checks) {
        long wrong = 0;
        for (int i = 0; i < TIMES; ++i) {
            forget_all();
            wrong += !each.holds();
        }
        say(each.name), say(": "), say(wrong), say(" of "), say(TIMES), say(" wrong\n");
    }
    say("end\n");
}
