// Combinatorial selection: which groups to keep when those that stay are refitted by least squares.
//
//     error(A) = min_M Σ_r ½⟨(R_r + ridge I) M_r, M_r⟩ − ⟨C_r, M_r⟩   over M that is zero outside the groups
//     A
//
// Every method follows error(A) exactly as groups go or come: the change is ½ tr(S_pp⁻¹ P_pp) in the Schur
// complements of schur.hpp. The penalty weights of the problem play no part.
#pragma once

#include <span>
#include <vector>

#include "pysolve/problem.hpp"

namespace pysolve {

struct Selection {
    std::vector<Index> order;  // groups in the order of their choice
    Vector change;             // of the error, at each choice, at least 0
    double ridge = 0.0;
    double largest_inverse =
        0.0;  // diagonal entry of S in `eliminate`: rounding in the changes grows with it
};

// Take out the group whose loss costs least until `smallest` groups are left: S = (R + ridge I)⁻¹, T = S C.
// Uses the first of `ridges` with which every R can be factored; throws std::invalid_argument if there is
// none.
Selection eliminate(const Problem& problem, std::span<const double> ridges, Index smallest,
                    const Monitor& monitor);

// Put in the group that gains most until there are `count`: S = R + ridge I, T = C.
Selection forward(const Problem& problem, double ridge, Index count, const Monitor& monitor);

// Exchange one of the groups in `keep` for another while that lowers the error, at most `max_swaps` times.
// Candidates: the best one to put in against all that could leave then; each of the `depth` cheapest
// ones to take out against all that could follow it. Only steps well above rounding are taken.
struct SwapOptions {
    Index max_swaps = 1000, depth = 10;
};
std::vector<Index> swap_groups(const Problem& problem, double ridge, std::vector<Index> keep,
                               const SwapOptions& options, const Monitor& monitor);

}  // namespace pysolve
