// Tiles: some samples of every feature of a dense matrix, packed for the kernels.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "csr_kernels.hpp"
#include "pysolve/csr.hpp"
#include "pysolve/threads.hpp"

namespace pysolve {

// Memory of a thread, aligned to cache lines, that is kept from call to call.
template <class T>
class Scratch {
  public:
    T* get(Index size) {
        if (size > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset(
                static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), alignment)));
            size_ = size;
        }
        return memory_.get();
    }

  private:
    static constexpr std::align_val_t alignment{64};
    struct Free {
        void operator()(T* p) const { ::operator delete(p, alignment); }
    };
    std::unique_ptr<T, Free> memory_;
    Index size_ = 0;
};

// Samples first … first + count − 1, in a tile of `width`.
struct Tile {
    Index first, count, width;
};

// Most bytes of one feature in a tile, and of all.
constexpr Index widest_tile = 256, largest_tile = 1 << 24;

// All samples, in tiles of so many features.
template <class T>
std::vector<Tile> tiles_of(Index features, Index batch) {
    const Kernels<T>& kernel = kernels<T>();
    const Index least = kernel.narrowest / Index{sizeof(T)};
    Index most = std::min(kernel.widest, widest_tile) / Index{sizeof(T)};
    while (most > least && features * most * Index{sizeof(T)} > largest_tile) most /= 2;
    std::vector<Tile> tiles;
    for (Index first = 0; first < batch;) {
        Index width = least;
        while (width < most && width < batch - first) width *= 2;
        tiles.push_back({first, std::min(width, batch - first), width});
        first += width;
    }
    return tiles;
}

// Features that are packed at once.
constexpr Index packed_at_once = 128;

// Features first … last − 1 of a tile, packed.
template <class T>
void pack(Dense<const T> X, const Tile& tile, Index first, Index last, T* packed) {
    for (Index i = first; i < last; ++i)
        std::fill(packed + i * tile.width + tile.count, packed + (i + 1) * tile.width, T(0));
    if (X.layout == Layout::batch) {
        for (Index i = first; i < last; i += packed_at_once)
            kernels<T>().transpose(X.data + tile.first * X.stride + i, X.stride, packed + i * tile.width,
                                   tile.width, tile.count, std::min(packed_at_once, last - i));
    } else {
        for (Index i = first; i < last; ++i)
            std::copy_n(X.data + i * X.stride + tile.first, tile.count, packed + i * tile.width);
    }
}

template <class T>
void pack_all(int threads, Dense<const T> X, const Tile& tile, Index features, T* packed) {
    const Index pieces = (features + packed_at_once - 1) / packed_at_once;
    parallel(threads, pieces, [&](Index piece) {
        pack(X, tile, piece * packed_at_once, std::min(features, (piece + 1) * packed_at_once), packed);
    });
}

// The tile as it lies, if it lies as packed; or null.
template <class T>
const T* in_place(Dense<const T> X, const Tile& tile) {
    const T* start = X.data + tile.first;
    const bool packed = X.layout == Layout::feature && X.stride == tile.width && tile.count == tile.width;
    return packed && reinterpret_cast<std::uintptr_t>(start) % 64 == 0 ? start : nullptr;
}

}  // namespace pysolve
