// Alternate minimisation over M and the scales of the variational form of the group norm.
#pragma once

#include "pysolve/problem.hpp"

namespace pysolve {

struct AlternateOptions {
    Index rounds = 50;
    double epsilon = 1e-10;  // smoothing: ‖M_g‖ is replaced by sqrt(‖M_g‖² + epsilon)
};

// ‖M_g‖ = min_{u>0} ‖M_g‖²/(2u) + u/2.  Alternates  u_g = sqrt(‖M_g‖² + epsilon)  and  (R + lam diag(w/u)) M
// = C, then polishes with FISTA: smoothing never gives exact zeros.
Result alternate_minimization(const Problem& problem, double lam, Vector M, const AlternateOptions& options,
                              const Stopping& stopping, const Monitor& monitor);

}  // namespace pysolve
