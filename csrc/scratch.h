// Memory that a thread needs for a while.

#pragma once

#include <cstdlib>

#include "kernels.h"

namespace omega_qvla {
namespace {

// Memory of one thread, aligned for any vector.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, rounded_up(larger(count, 1) * sizeof(T), 64)))) {
        if (!data_) std::abort();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() const { return data_; }

private:
    T* data_;
};

}  // namespace
}  // namespace omega_qvla
