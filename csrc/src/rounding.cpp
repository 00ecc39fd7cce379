#include "pysolve/rounding.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace pysolve {
namespace {

// Outputs that go through all inputs of a block together: what they need stays in the cache.
constexpr Index tile = 64;
// Curvature below which an input does not count.
constexpr double flat = 1e-300;

std::size_t size(Index n) {
    return static_cast<std::size_t>(n);
}

Vector transposed(MatrixView<const double> matrix) {
    Vector out(size(matrix.rows * matrix.cols));
    for (Index i = 0; i < matrix.rows; ++i)
        for (Index j = 0; j < matrix.cols; ++j)
            out[size(j * matrix.rows + i)] = matrix.data[i * matrix.stride + j];
    return out;
}

}  // namespace

GridLevels::GridLevels(MatrixView<const double> scales, MatrixView<const double> zeros, double low,
                       double high, Index group)
    : rows_(scales.rows),
      group_(group),
      low_(low),
      high_(high),
      scales_(transposed(scales)),
      zeros_(transposed(zeros)) {}

void GridLevels::nearest(const double* wanted, const double*, Index first, Index count, Index input,
                         std::int64_t* codes, double* values) const {
    const double* scale = scales_.data() + input / group_ * rows_ + first;
    const double* zero = zeros_.data() + input / group_ * rows_ + first;
    for (Index i = 0; i < count; ++i) {
        const double code = std::clamp(std::nearbyint(wanted[i] / scale[i]) + zero[i], low_, high_);
        codes[i] = static_cast<std::int64_t>(code);
        values[i] = (code - zero[i]) * scale[i];
    }
}

std::int64_t GridLevels::zero_code(Index row, Index input) const {
    return static_cast<std::int64_t>(zeros_[size(input / group_ * rows_ + row)]);
}

SharedLevels::SharedLevels(Vector values) : values_(std::move(values)), ascending_(values_.size()) {
    std::iota(ascending_.begin(), ascending_.end(), 0);
    std::ranges::stable_sort(ascending_, {}, [&](std::int64_t code) { return values_[size(code)]; });
    for (std::size_t k = 1; k < ascending_.size(); ++k)
        middles_.push_back(0.5 * (values_[size(ascending_[k])] + values_[size(ascending_[k - 1])]));
}

void SharedLevels::nearest(const double* wanted, const double*, Index, Index count, Index,
                           std::int64_t* codes, double* values) const {
    for (Index i = 0; i < count; ++i) {
        const auto place = std::ranges::lower_bound(middles_, wanted[i]) - middles_.begin();
        codes[i] = ascending_[size(place)];
        values[i] = values_[size(codes[i])];
    }
}

PricedLevels::PricedLevels(Vector values, Vector bits, double lam)
    : values_(std::move(values)), bits_(std::move(bits)), lam_(lam) {
    for (double value : values_) halves_.push_back(0.5 * value * value);
}

void PricedLevels::nearest(const double* wanted, const double* curvature, Index, Index count, Index,
                           std::int64_t* codes, double* values) const {
    std::array<double, tile> ratio, least, best;
    std::fill_n(least.begin(), count, std::numeric_limits<double>::infinity());
    std::fill_n(best.begin(), count, 0.0);
    for (Index i = 0; i < count; ++i) ratio[size(i)] = lam_ / std::max(curvature[i], flat);
    // Less what all values have in common, and by curvature.
    for (std::size_t k = 0; k < values_.size(); ++k) {
        const double value = values_[k], bits = bits_[k], half = halves_[k], code = static_cast<double>(k);
        for (std::size_t i = 0; i < size(count); ++i) {
            const double cost = ratio[i] * bits - wanted[i] * value + half;
            const bool better = cost < least[i];
            least[i] = better ? cost : least[i];
            best[i] = better ? code : best[i];
        }
    }
    for (Index i = 0; i < count; ++i) {
        codes[i] = static_cast<std::int64_t>(best[size(i)]);
        values[i] = values_[size(codes[i])];
    }
}

void round_block(const Levels& levels, const RoundingBlock& block) {
    const Index inputs = block.base.rows, outputs = block.base.cols;
    std::array<double, tile> wanted, curvature, values;
    for (Index first = 0; first < outputs; first += tile) {
        const Index count = std::min(tile, outputs - first);
        for (Index k = 0; k < inputs; ++k) {
            const double* base = block.base.data + k * block.base.stride + first;
            const double* slope = block.slope.data + k * block.slope.stride + first;
            double* change = block.change.data + k * block.change.stride + first;
            std::int64_t* codes = block.codes + k * outputs + first;
            const Index input = block.inputs[k];
            for (Index i = 0; i < count; ++i) {
                wanted[size(i)] = base[i] - slope[i] / block.divisor[k];
                curvature[size(i)] = block.outputs[first + i] * block.power[k];
            }
            levels.nearest(wanted.data(), curvature.data(), first, count, input, codes, values.data());
            if (block.mask)
                for (Index i = 0; i < count; ++i)
                    if (!block.mask[k * outputs + first + i]) {
                        codes[i] = levels.zero_code(first + i, input);
                        values[size(i)] = levels.zero();
                    }
            for (Index i = 0; i < count; ++i) change[i] = values[size(i)] - base[i];
            for (Index m = k + 1; m < inputs; ++m) {
                const double factor = block.coupling.data[k * block.coupling.stride + m];
                double* later = block.slope.data + m * block.slope.stride + first;
                for (Index i = 0; i < count; ++i) later[i] += factor * change[i];
            }
        }
    }
}

}  // namespace pysolve
