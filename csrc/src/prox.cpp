#include "pysolve/prox.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pysolve/blas.hpp"

namespace pysolve {

double norm(std::span<const double> v) {
    const double square = dot(v, v);
    constexpr double tiny = 1e-280, huge = 1e280;
    if (square > tiny && square < huge) return std::sqrt(square);
    double largest = 0.0;
    for (double value : v) largest = std::max(largest, std::abs(value));
    if (largest == 0.0 || !std::isfinite(largest)) return largest;
    double sum = 0.0;
    for (double value : v) sum += (value / largest) * (value / largest);
    return largest * std::sqrt(sum);
}

void shrink_group(std::span<double> V, double threshold) {
    if (threshold <= 0.0) return;
    const double length = norm(V);
    if (length <= threshold) {
        std::ranges::fill(V, 0.0);
        return;
    }
    const double factor = 1.0 - threshold / length;
    for (double& value : V) value *= factor;
}

}  // namespace pysolve
