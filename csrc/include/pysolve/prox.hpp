// Group soft-thresholding.
#pragma once

#include <span>

namespace pysolve {

// V ← argmin_M ½‖M − V‖² + threshold ‖M‖ = (1 − threshold/‖V‖)₊ V.
void shrink_group(std::span<double> V, double threshold);

// 2-norm without overflow or underflow of the squares.
double norm(std::span<const double> v);

}  // namespace pysolve
