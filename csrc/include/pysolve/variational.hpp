// The solution for given scales of the variational form of the group norm.
#pragma once

#include "pysolve/problem.hpp"

namespace pysolve {

// ‖M_g‖ = min_{u>0} ‖M_g‖²/(2u) + u/2, so for fixed scales u the problem is a ridge regression:
//     (R + lam diag(w/u)) M = C.
// Solved as M = D^½ S⁻¹ D^½ C with D_g = u_g/(lam w_g) and S = I + D^½ R D^½, which stays well conditioned as
// scales go to 0 and where R is singular.
class VariationalSolve {
  public:
    explicit VariationalSolve(const Problem& problem) : problem_(problem) {}
    void operator()(double lam, const Vector& scales, Vector& M);

  private:
    const Problem& problem_;
    Vector root_, S_;
};

}  // namespace pysolve
