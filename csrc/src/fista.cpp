#include "pysolve/fista.hpp"

#include <utility>

#include "pysolve/prox.hpp"

namespace pysolve {
namespace {

struct Iterate {
    Vector M, T;  // T = R M
};

// One proximal step from V = now + u (now − before), written into `before.M`. Returns ⟨V − M_new, M_new − M⟩:
// positive when the momentum points uphill.
double step(const Problem& problem, double lam, double L, double u, const Iterate& now, Iterate& before,
            Vector& V) {
    double uphill = 0.0;
    for (Index g = 0; g < problem.groups(); ++g) {
        const auto m = problem.group(now.M.data(), g), t = problem.group(now.T.data(), g);
        const auto t_before = problem.group(std::as_const(before).T.data(), g);
        const auto c = problem.group(problem.yx, g);
        const auto next = problem.group(before.M.data(), g);
        for (std::size_t i = 0; i < m.size(); ++i) {
            V[i] = m[i] + u * (m[i] - next[i]);
            next[i] = V[i] - (t[i] + u * (t[i] - t_before[i]) - c[i]) / L;
        }
        shrink_group(next, lam * problem.weights[g] / L);
        double sum = 0.0;
        for (std::size_t i = 0; i < m.size(); ++i) sum += (V[i] - next[i]) * (next[i] - m[i]);
        uphill += sum;
    }
    return uphill;
}

}  // namespace

Result run_fista(const Problem& problem, double lam, Vector M, const FistaOptions& options,
                 const DualBound& bound, Recorder& recorder) {
    Product product(problem);
    Iterate now{std::move(M), {}};
    product(now.M, now.T);
    Iterate before = now;
    Vector V(static_cast<std::size_t>(problem.block()));
    Certificate certificate = bound(lam, now.M, now.T);
    bool done = recorder(certificate);
    const double L = done ? 0.0 : lipschitz_bound(problem);
    double k = 1.0;
    while (!done && L > 0.0) {
        const double u = options.momentum ? (k - 1.0) / (k + options.q + 2.0) : 0.0;
        const double uphill = step(problem, lam, L, u, now, before, V);
        std::swap(now, before);
        product(now.M, now.T);
        certificate = bound(lam, now.M, now.T);
        done = recorder(certificate);
        k = options.restart && uphill > 0.0 ? 1.0 : k + 1.0;
    }
    return recorder.result(problem, lam, std::move(now.M), now.T, certificate);
}

Result fista(const Problem& problem, double lam, Vector M, const FistaOptions& options, const Stopping& stopping,
             const Monitor& monitor) {
    Recorder recorder(stopping, monitor);
    return run_fista(problem, lam, std::move(M), options, DualBound(problem), recorder);
}

}  // namespace pysolve
