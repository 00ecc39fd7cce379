// The variational form of the group norm: one smooth convex function of one number per group.
//
// ‖M_g‖ = min_{η>0} ‖M_g‖²/(2η) + η/2. For fixed scales η the problem is a ridge regression; minimising M out
// leaves, with D_g = η_g/(lam w_g) on the inputs of group g, S = I + D^½ R D^½ and Y = S⁻¹ D^½ C,
//
//     φ(η) = ½ Σ_g lam w_g η_g − ½ ⟨D^½ C, Y⟩          M = D^½ Y,   R M − C = −D^-½ Y
//     p_g = ‖(R M − C)_g‖/(lam w_g)                     ∂φ/∂η_g = ½ lam w_g (1 − p_g²)
//     η_g η_g' ∂²φ/∂η_g∂η_g' = Σ_{i∈g, j∈g'} (I − S⁻¹)_ij (Y Yᵀ)_ij
//
// which is φ, its gradient and its Hessian summed over the readers. S stays well conditioned as scales go to
// 0 and where R is singular: it is factored, never R.
#pragma once

#include "pysolve/problem.hpp"

namespace pysolve {

class Variational {
  public:
    Variational(const Problem& problem, double lam) : problem_(problem), lam_(lam) {}

    // Move to these scales (> 0) of these groups (ascending); all other groups are 0. False where S is not
    // positive definite to working precision, which leaves the state unusable.
    [[nodiscard]] bool evaluate(const std::vector<Index>& groups, const Vector& scales);

    // The same for all groups that have a positive scale, given one scale for every group of the problem.
    [[nodiscard]] bool evaluate_all(const Vector& scales);

    double phi() const { return phi_; }
    const std::vector<Index>& groups() const { return groups_; }
    const Vector& ratios() const { return ratios_; }  // p_g, in the order of the groups

    // The scaled Hessian above of the last point evaluated, groups × groups, upper triangle; once a point.
    void hessian(Vector& out);

    // Write M: zero outside the groups.
    void scatter(Vector& M) const;
    // Write the groups' rows of R M = C − D^-½ Y, which holds as exactly as Y solves its system.
    void scatter_product(Vector& T) const;

  private:
    Index inputs() const { return std::ssize(groups_) * problem_.group_size; }

    const Problem& problem_;
    double lam_, phi_ = 0.0;
    std::vector<Index> groups_;
    Vector ratios_;
    Vector root_;            // D^½, one per input of the groups
    std::vector<Vector> S_;  // per reader: the factor of S
    Vector gram_;            // Y Yᵀ
    Vector Y_;               // inputs of the groups × outputs
};

}  // namespace pysolve
