// Optimal brain surgeon: weights of a matrix leave one at a time, row by row, and those that stay make up for
// it.
#pragma once

#include <cstdint>
#include <vector>

#include "pysolve/problem.hpp"

namespace pysolve {

struct RowPaths {
    std::vector<std::int32_t> order;  // rows × inputs: columns in the order in which they leave
    Vector change;                    // rows × inputs: rise of the row's error at each of them, at least 0
};

// For each row w of W: the error ½ (w − m) R (w − m)ᵀ, minimised over m that is zero outside the columns
// left, when always the column leaves that costs least. With S the inverse of R on the columns left, losing
// column p costs ½ m_p² / S_pp, and m and S of the others are Schur complements. S is that of all columns at
// first and shared by all rows; each row works on its own copy, inputs² numbers a thread.
//
// `inverse` is R⁻¹, inputs × inputs with both triangles. A third of inputs³ operations a row.
RowPaths eliminate_rows(MatrixView<const double> inverse, MatrixView<const double> W, const Monitor& monitor);

}  // namespace pysolve
