// Proximal gradient and its accelerated form (FISTA).
#pragma once

#include "pysolve/problem.hpp"

namespace pysolve {

struct FistaOptions {
    bool momentum = true;  // false: plain proximal gradient
    bool restart = true;   // forget the momentum when it points uphill
    double q = 10.0;       // look-ahead (k − 1)/(k + q + 2); a larger q overshoots less and starts slower
};

// V = M + u_k (M − M_previous);  M ← prox(V − (R V − C)/L).  One product with R an iteration: R V is the same
// combination of the products at M, so the gap of every M costs no further one.
Result fista(const Problem& problem, double lam, Vector M, const FistaOptions& options,
             const Stopping& stopping, const Monitor& monitor);

// The loop itself, for solvers that polish with it: continues the recorder's history.
Result run_fista(const Problem& problem, double lam, Vector M, const FistaOptions& options,
                 const DualBound& bound, Recorder& recorder);

}  // namespace pysolve
