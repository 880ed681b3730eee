// How many products of bytes a processor does with its operands in registers: what no kernel can exceed.

#pragma once

#include <algorithm>
#include <chrono>

#include "kernels.h"

namespace omega_qvla {
namespace {

constexpr int64_t PEAK_ROUNDS = 1 << 20;

// Multiply-adds in a second, of all threads together.
template <class V>
double products_per_second(int threads) {
    int64_t products = 0;
    double longest = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : products) reduction(max : longest)
    {
        const auto before = std::chrono::steady_clock::now();
        products += V::products_in_registers(PEAK_ROUNDS);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - before;
        longest = std::max(longest, taken.count());
    }
    return double(products) / longest;
}

}  // namespace
}  // namespace omega_qvla
