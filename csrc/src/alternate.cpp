#include "pysolve/alternate.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pysolve/fista.hpp"
#include "pysolve/product.hpp"
#include "pysolve/prox.hpp"
#include "pysolve/variational.hpp"

namespace pysolve {
Result alternate_minimization(const Problem& problem, double lam, Vector M, const AlternateOptions& options,
                              const Stopping& stopping, const Monitor& monitor) {
    Recorder recorder(stopping, monitor);
    const DualBound bound(problem, lam);
    Variational model(problem, lam);
    Product product(problem);
    Vector scales = bound.scales(), T;
    product.exact(M, T);
    Certificate certificate = bound(lam, M, T);
    const bool cold = std::ranges::all_of(M, [](double value) { return value == 0.0; });
    for (Index round = 0; round < options.rounds; ++round) {
        if (recorder(certificate)) return recorder.result(problem, lam, std::move(M), T, certificate);
        for (Index g = 0; g < problem.groups(); ++g) {
            double& scale = scales[static_cast<std::size_t>(g)];
            if (!cold || round > 0) scale = norm(problem.group(std::as_const(M).data(), g));
            scale = std::sqrt(scale * scale + options.epsilon);
        }
        if (!model.evaluate_all(scales)) break;
        model.scatter(M);
        // R M = C − lam diag(w/u) M by construction: the product is free, until the answer depends on it.
        for (Index g = 0; g < problem.groups(); ++g) {
            const double pull = lam * problem.weights[g] / scales[static_cast<std::size_t>(g)];
            const auto m = problem.group(std::as_const(M).data(), g), c = problem.group(problem.yx, g);
            const auto t = problem.group(T.data(), g);
            for (std::size_t i = 0; i < m.size(); ++i) t[i] = c[i] - pull * m[i];
        }
        certificate = bound(lam, M, T);
        if (recorder.would_stop(certificate)) {
            product.exact(M, T);
            certificate = bound(lam, M, T);
        }
    }
    return run_fista(problem, lam, std::move(M), {}, bound, recorder);
}

}  // namespace pysolve
