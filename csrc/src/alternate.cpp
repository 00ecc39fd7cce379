#include "pysolve/alternate.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "pysolve/fista.hpp"
#include "pysolve/prox.hpp"

namespace pysolve {
namespace {

// M = D^½ S⁻¹ D^½ C with D_g = u_g/(lam w_g) and S = I + D^½ R D^½, which stays well conditioned as u_g → 0.
class ScaledSolve {
  public:
    explicit ScaledSolve(const Problem& problem)
        : problem_(problem), root_(static_cast<std::size_t>(problem.inputs)) {}

    void operator()(double lam, const Vector& u, Vector& M) {
        const Problem& p = problem_;
        const auto n = static_cast<std::size_t>(p.inputs), columns = static_cast<std::size_t>(p.outputs);
        for (std::size_t i = 0; i < n; ++i) {
            const auto g = i / static_cast<std::size_t>(p.group_size);
            root_[i] = std::sqrt(u[g] / (lam * p.weights[g]));
        }
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j < columns; ++j) M[i * columns + j] = root_[i] * p.yx[i * columns + j];
        S_.resize(n * n);
        Index offset = 0;
        for (const Reader& reader : p.readers) {
            // Row-major: LAPACK's lower triangle is the upper one here.
            for (std::size_t i = 0; i < n; ++i) {
                for (std::size_t j = i; j < n; ++j) S_[i * n + j] = root_[i] * reader.xx[i * n + j] * root_[j];
                S_[i * n + i] += 1.0;
            }
            if (!cholesky({S_.data(), p.inputs, p.inputs, p.inputs}))
                throw std::invalid_argument("an input correlation matrix is not positive semi-definite");
            cholesky_solve({S_.data(), p.inputs, p.inputs, p.inputs},
                           {M.data() + offset, p.inputs, reader.outputs, p.outputs});
            offset += reader.outputs;
        }
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j < columns; ++j) M[i * columns + j] *= root_[i];
    }

  private:
    const Problem& problem_;
    Vector root_, S_;
};

}  // namespace

Result alternate_minimization(const Problem& problem, double lam, Vector M, const AlternateOptions& options,
                              const Stopping& stopping, const Monitor& monitor) {
    Recorder recorder(stopping, monitor);
    const DualBound bound(problem);
    ScaledSolve solve(problem);
    Vector u(static_cast<std::size_t>(problem.groups())), T;
    Product product(problem);
    product(M, T);
    Certificate certificate = bound(lam, M, T);
    const bool cold = std::ranges::all_of(M, [](double value) { return value == 0.0; });
    for (Index round = 0; round < options.rounds; ++round) {
        if (recorder(certificate)) return recorder.result(problem, lam, std::move(M), T, certificate);
        for (Index g = 0; g < problem.groups(); ++g) {
            const double length = norm(problem.group(std::as_const(M).data(), g));
            // From M = 0 the first scales are 1, as published; the smoothed zero would keep M near zero.
            u[static_cast<std::size_t>(g)] =
                cold && round == 0 ? 1.0 : std::sqrt(length * length + options.epsilon);
        }
        solve(lam, u, M);
        // R M = C − lam diag(w/u) M by construction: the product is free.
        for (Index g = 0; g < problem.groups(); ++g) {
            const double pull = lam * problem.weights[g] / u[static_cast<std::size_t>(g)];
            const auto m = problem.group(std::as_const(M).data(), g), c = problem.group(problem.yx, g);
            const auto t = problem.group(T.data(), g);
            for (std::size_t i = 0; i < m.size(); ++i) t[i] = c[i] - pull * m[i];
        }
        certificate = bound(lam, M, T);
    }
    return run_fista(problem, lam, std::move(M), {}, bound, recorder);
}

}  // namespace pysolve
