#include "pysolve/fista.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pysolve/lanes.hpp"
#include "pysolve/product.hpp"
#include "pysolve/prox.hpp"
#include "pysolve/variational.hpp"

namespace pysolve {
namespace {

struct Iterate {
    Vector M, T, S;  // T = R M; S: the subgradient of lam Σ w ‖M_g‖ that the step to M has shown
};

struct Step {
    double uphill = 0.0;            // ⟨V − M_new, M_new − M⟩: positive when the momentum points uphill
    double turn = 0.0, move = 0.0;  // ⟨Δ(T + S), ΔM⟩ and ‖ΔM‖² of the two iterates it started from
};

// One proximal step from V = now + u (now − before), written over `before`.
PYSOLVE_CLONES Step step(const Problem& problem, double lam, double L, double u, const Iterate& now,
                         Iterate& before, Vector& V_block) {
    Step total;
    const auto n = static_cast<std::size_t>(problem.block());
    double* V = V_block.data();
    for (Index g = 0; g < problem.groups(); ++g) {
        const Index start = g * problem.block();
        const double *m = &now.M[start], *t = &now.T[start], *s = &now.S[start], *c = problem.yx + start;
        double *m_old = &before.M[start], *s_old = &before.S[start];
        const double* t_old = &before.T[start];
        total.move += sum(n, [=](std::size_t i) { return (m[i] - m_old[i]) * (m[i] - m_old[i]); });
        total.turn +=
            sum(n, [=](std::size_t i) { return (t[i] - t_old[i] + s[i] - s_old[i]) * (m[i] - m_old[i]); });
        for (std::size_t i = 0; i < n; ++i) {
            V[i] = m[i] + u * (m[i] - m_old[i]);
            s_old[i] = V[i] - (t[i] + u * (t[i] - t_old[i]) - c[i]) / L;
        }
        const double length = norm({s_old, n}), threshold = lam * problem.weights[g] / L;
        const double factor = length > threshold ? 1.0 - threshold / length : 0.0;
        for (std::size_t i = 0; i < n; ++i) {
            m_old[i] = factor * s_old[i];
            s_old[i] = L * (s_old[i] - m_old[i]);
        }
        total.uphill += sum(n, [=](std::size_t i) { return (V[i] - m_old[i]) * (m_old[i] - m[i]); });
    }
    return total;
}

// The momentum that suits curvatures between mu and L. Steps overestimate the smallest curvature while other
// directions still move; 0.6 of what they show was best or close to it on every problem of the benchmark.
double steady_momentum(const Step& last, double L) {
    if (last.move == 0.0) return 1.0;
    const double root = std::sqrt(std::clamp(0.6 * last.turn / last.move / L, 0.0, 1.0));
    return (1.0 - root) / (1.0 + root);
}

bool is_zero(const Vector& M) {
    return std::ranges::all_of(M, [](double value) { return value == 0.0; });
}

// Where there is no start: the solution for the scales of the least squares fit.
bool ridge_start(const Problem& problem, double lam, const Vector& scales, Vector& M) {
    Variational model(problem, lam);
    if (!model.evaluate_all(scales)) return false;
    model.scatter(M);
    return true;
}

}  // namespace

Result run_fista(const Problem& problem, double lam, Vector M, const FistaOptions& options,
                 const DualBound& bound, Recorder& recorder) {
    Product product(problem);
    Iterate now{std::move(M), {}, {}};
    product.exact(now.M, now.T);
    now.S.assign(now.M.size(), 0.0);
    Certificate certificate = bound(lam, now.M, now.T);
    bool done = recorder(certificate);
    if (!done && is_zero(now.M) && ridge_start(problem, lam, bound.scales(), now.M)) {
        product.exact(now.M, now.T);
        certificate = bound(lam, now.M, now.T);
        done = recorder(certificate);
    }
    Iterate before = now;
    Vector V(static_cast<std::size_t>(problem.block()));
    const double L = done ? 0.0 : lipschitz_bound(problem);
    double k = 1.0, steady = 1.0;
    while (!done && L > 0.0) {
        const double look_ahead = options.momentum ? (k - 1.0) / (k + options.q + 2.0) : 0.0;
        const Step last = step(problem, lam, L, std::min(look_ahead, steady), now, before, V);
        std::swap(now, before);
        k += 1.0;
        if (options.restart) {
            steady = steady_momentum(last, L);
            if (last.uphill > 0.0) k = 1.0;
        }
        product.update(now.M, now.T);
        certificate = bound(lam, now.M, now.T);
        if (recorder.would_stop(certificate) && !product.is_exact()) {
            product.exact(now.M, now.T);
            certificate = bound(lam, now.M, now.T);
        }
        done = recorder(certificate);
    }
    return recorder.result(problem, lam, std::move(now.M), now.T, certificate);
}

Result fista(const Problem& problem, double lam, Vector M, const FistaOptions& options,
             const Stopping& stopping, const Monitor& monitor) {
    Recorder recorder(stopping, monitor);
    return run_fista(problem, lam, std::move(M), options, DualBound(problem, lam), recorder);
}

}  // namespace pysolve
