// What Python sees. Addresses come as integers: `omega_qvla.kernels.native` checks what lies there.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace omega_qvla {
namespace {

// Those that this processor can run, the fastest first.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found;
#ifdef OMEGA_QVLA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vnni"))
        found.push_back(&AVX512_VNNI);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&AVX2);
#endif
    found.push_back(&PORTABLE);
    return found;
}

const Kernels& kernels_called(const std::string& name) {
    for (const Kernels* kernels : available())
        if (kernels->name == name) return *kernels;
    throw std::invalid_argument("this processor runs no kernels called " + name);
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// An input whose transform and widths are known, and whose tokens come again and again.
class Input {
public:
    Input(const std::string& kernels, int64_t channels, uintptr_t before, uintptr_t order, uintptr_t after,
          int64_t block, bool hadamard, uintptr_t matrices, uintptr_t short_matrices, int64_t group, int64_t flushed,
          int32_t lowest, int32_t highest)
        : kernels_(kernels_called(kernels)), known_{} {
        known_.channels = channels;
        known_.before = at<float>(before);
        known_.order = at<int32_t>(order);
        known_.after = at<float>(after);
        known_.block = block;
        known_.hadamard = hadamard;
        known_.matrices = at<float>(matrices);
        known_.short_matrices = at<bfloat16>(short_matrices);
        known_.group = group;
        known_.flushed = flushed;
        known_.lowest = lowest;
        known_.highest = highest;
    }

    bool quantize(uintptr_t x, bool x_is_bfloat16, int64_t rows, uintptr_t fixed_scale, uintptr_t codes, uintptr_t sums,
                  uintptr_t scale, uintptr_t values, int threads) const {
        QuantizeInput in = known_;
        in.x = at<void>(x);
        in.x_is_bfloat16 = x_is_bfloat16;
        in.rows = rows;
        in.fixed_scale = at<float>(fixed_scale);
        in.codes = at<int8_t>(codes);
        in.sums = at<int32_t>(sums);
        in.scale = at<float>(scale);
        in.values = at<float>(values);
        return kernels_.quantize_input(in, threads);
    }

private:
    const Kernels& kernels_;
    QuantizeInput known_;
};

// A packed weight, of one linear or of several that read the same input.
class Weight {
public:
    Weight(const std::string& kernels, int64_t tiles, int64_t groups, int64_t width, int64_t planes, uintptr_t weight,
           uintptr_t scale, bool scale_per_group)
        : kernels_(kernels_called(kernels)), known_{} {
        known_.tiles = tiles;
        known_.groups = groups;
        known_.width = width;
        known_.planes = planes;
        known_.weight = at<uint8_t>(weight);
        known_.weight_scale = at<bfloat16>(scale);
        known_.scale_per_group = scale_per_group;
    }

    void multiply(uintptr_t codes, uintptr_t sums, uintptr_t scale, int64_t scale_row, int64_t scale_group,
                  bool wide_codes, int64_t rows, uintptr_t out, int64_t row, int threads) const {
        GroupedMatmul m = known_;
        m.codes = at<int8_t>(codes);
        m.sums = at<int32_t>(sums);
        m.scale = at<float>(scale);
        m.scale_row = scale_row;
        m.scale_group = scale_group;
        m.wide_codes = wide_codes;
        m.rows = rows;
        m.out = at<float>(out);
        m.row = row;
        kernels_.grouped_matmul(m, threads);
    }

private:
    const Kernels& kernels_;
    GroupedMatmul known_;
};

template <class F>
void search_scale(const std::string& kernels, uintptr_t x, uintptr_t peak, int64_t groups, int64_t size,
                  uintptr_t fraction, int64_t fractions, int32_t lowest, int32_t highest, uintptr_t scale,
                  int threads) {
    const SearchScale<F> search{at<F>(x), at<F>(peak), groups,  size,        at<F>(fraction),
                                fractions, lowest,      highest, at<F>(scale)};
    const Kernels& used = kernels_called(kernels);
    if constexpr (sizeof(F) == 4)
        used.search_scale(search, threads);
    else
        used.search_scale_double(search, threads);
}

template <class F>
void round_columns(const std::string& kernels, uintptr_t weight, uintptr_t owed, int64_t owed_row, uintptr_t factor,
                   int64_t factor_row, uintptr_t scale, int64_t columns, int64_t outputs, int32_t lowest,
                   int32_t highest, uintptr_t codes, uintptr_t errors, int threads) {
    const RoundColumns<F> round{at<F>(weight), at<F>(owed), owed_row, at<F>(factor), factor_row,       at<F>(scale),
                                columns,       outputs,     lowest,   highest,       at<int8_t>(codes), at<F>(errors)};
    const Kernels& used = kernels_called(kernels);
    if constexpr (sizeof(F) == 4)
        used.round_columns(round, threads);
    else
        used.round_columns_double(round, threads);
}

}  // namespace
}  // namespace omega_qvla

NB_MODULE(_native, module) {
    using namespace omega_qvla;
    module.attr("STEP") = STEP;
    module.attr("TILE") = TILE;
    module.def("available", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available()) names.push_back(kernels->name);
        return names;
    });
    module.def(
        "pack_weight",
        [](uintptr_t codes, int64_t outputs, int64_t groups, int64_t width, int64_t planes, uintptr_t packed) {
            pack_weight(at<int8_t>(codes), outputs, groups, width, planes, at<uint8_t>(packed));
        },
        nb::call_guard<nb::gil_scoped_release>());
    module.def(
        "products_per_second",
        [](const std::string& kernels, int threads) { return kernels_called(kernels).products_per_second(threads); },
        nb::call_guard<nb::gil_scoped_release>());
    module.def("search_scale", search_scale<float>, nb::call_guard<nb::gil_scoped_release>());
    module.def("search_scale_double", search_scale<double>, nb::call_guard<nb::gil_scoped_release>());
    module.def("round_columns", round_columns<float>, nb::call_guard<nb::gil_scoped_release>());
    module.def("round_columns_double", round_columns<double>, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Input>(module, "Input")
        .def(nb::init<const std::string&, int64_t, uintptr_t, uintptr_t, uintptr_t, int64_t, bool, uintptr_t, uintptr_t,
                      int64_t, int64_t, int32_t, int32_t>(),
             "kernels"_a, nb::kw_only(), "channels"_a, "before"_a, "order"_a, "after"_a, "block"_a, "hadamard"_a,
             "matrices"_a, "short_matrices"_a, "group"_a, "flushed"_a, "lowest"_a, "highest"_a)
        .def("quantize", &Input::quantize, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Weight>(module, "Weight")
        .def(nb::init<const std::string&, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, bool>(),
             "kernels"_a, nb::kw_only(), "tiles"_a, "groups"_a, "width"_a, "planes"_a, "weight"_a, "scale"_a,
             "scale_per_group"_a)
        .def("multiply", &Weight::multiply, nb::call_guard<nb::gil_scoped_release>());
}
