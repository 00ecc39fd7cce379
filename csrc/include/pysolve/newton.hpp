// Newton's method on the scales of the variational form (variational.hpp), with a working set.
#pragma once

#include "pysolve/problem.hpp"

namespace pysolve {

// Solves for one positive scale per active group, whatever the number of outputs: projected Newton with the
// exact Hessian on a working set that grows by the worst violations of the optimality conditions. Where
// Newton does not decrease φ, the fixed point η_g ← ‖M_g‖ does; where the working set ends without the
// precision asked for, FISTA takes over. Zeros are exact. One iteration is one round over all groups.
Result newton(const Problem& problem, double lam, Vector M, const Stopping& stopping, const Monitor& monitor);

}  // namespace pysolve
