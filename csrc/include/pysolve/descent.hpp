// Newton's method on the variational form (variational.hpp) for given groups.
#pragma once

#include <vector>

#include "pysolve/variational.hpp"

namespace pysolve {

// Scales of the active groups; every other group is zero.
struct Scales {
    std::vector<Index> groups;  // ascending
    Vector values;              // η_g > 0
};

// A factored Hessian of an earlier point, its scales and ratios, and the largest |p_g − 1| there. A step with
// it is Newton's on 1/p_g − 1, which is close to linear in the scales: near that point each shrinks the error
// by at least as much as that error, for a third of the work of a new Hessian.
struct Chord {
    Scales at;
    Vector ratios, factor;
    double error = 1.0;

    bool suffices(const Scales& now, double error_now, double tol) const {
        return !factor.empty() && at.groups == now.groups && error_now * error * error <= tol;
    }
    Scales step(const Problem& problem, double lam, Scales now, const Vector& ratios_now) const;
};

// The largest |p_g − 1|: how far from stationary.
double worst(const Vector& ratios);

// Minimise φ over the groups, from where the model stands, until every |p_g − 1| ≤ tol, or until rounding
// stops it: projected Newton with the exact Hessian, and the fixed point η_g ← ‖M_g‖ far from the solution,
// for the first `fixed_points` steps, and where Newton does not decrease φ. `chord` carries over from call to
// call. False where the model became unusable.
bool minimise(const Problem& problem, double lam, Scales& at, double tol, int fixed_points,
              Variational& model, Chord& chord, const Recorder& recorder);

}  // namespace pysolve
