#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "pysolve/lanes.hpp"
#include "pysolve/problem.hpp"
#include "pysolve/prox.hpp"

namespace pysolve {
namespace {

constexpr double eps = std::numeric_limits<double>::epsilon();

// Factor R + ridge I with the smallest ridge of a geometric ladder that rounding allows.
Vector factor_with_ridge(const double* R, Index n) {
    Vector factor;
    double mean = 0.0;
    for (Index i = 0; i < n; ++i) mean += R[i * (n + 1)] / static_cast<double>(n);
    if (mean <= 0.0) mean = 1.0;
    for (double ridge = 1e-15 * static_cast<double>(n) * mean; ridge <= mean; ridge *= 100.0) {
        factor.assign(R, R + n * n);
        for (Index i = 0; i < n; ++i) factor[static_cast<std::size_t>(i * (n + 1))] += ridge;
        if (cholesky({factor.data(), n, n, n})) return factor;
    }
    throw std::invalid_argument("r_xx is not positive semi-definite.");
}

PYSOLVE_CLONES void subtract(std::span<const double> a, std::span<const double> b, std::span<double> out) {
    for (std::size_t i = 0; i < a.size(); ++i) out[i] = a[i] - b[i];
}

}  // namespace

DualBound::DualBound(const Problem& problem, double lam)
    : problem_(problem),
      residual_(static_cast<std::size_t>(problem.groups())),
      c_norms_(residual_.size()),
      scales_(residual_.size()) {
    const Index n = problem.inputs;
    if (n == 0) return;
    std::vector<Vector> factors;
    factors.reserve(problem.readers.size());
    for (const Reader& reader : problem.readers) factors.push_back(factor_with_ridge(reader.xx, n));

    // B ← B + (R + ridge)⁻¹ (C − R B): the first round leaves what the ridge and rounding do.
    Vector B(static_cast<std::size_t>(problem.size()), 0.0), RB(B.size());
    Vector step(problem.yx, problem.yx + problem.size());
    bool accurate = false;
    for (int round = 0; round < 3 && !accurate; ++round) {
        for (std::size_t r = 0; r < factors.size(); ++r)
            cholesky_solve({factors[r].data(), n, n, n}, problem.part(step.data(), n, r));
        for (std::size_t i = 0; i < B.size(); ++i) B[i] += step[i];
        for (std::size_t r = 0; r < factors.size(); ++r)
            multiply_transposed({problem.readers[r].xx, n, n, n}, problem.part(std::as_const(B).data(), n, r),
                                problem.part(RB.data(), n, r), true);
        subtract({problem.yx, RB.size()}, RB, step);
        accurate = true;
        for (Index g = 0; g < problem.groups(); ++g) {
            double& residual = residual_[static_cast<std::size_t>(g)];
            residual = norm(problem.group(std::as_const(step).data(), g));
            accurate = accurate && residual <= 0.1 * lam * problem.weights[g];
        }
    }
    energy_ = dot(RB, B);
    length_ = norm(B);
    for (Index g = 0; g < problem.groups(); ++g) {
        c_norms_[static_cast<std::size_t>(g)] = norm(problem.group(problem.yx, g));
        scales_[static_cast<std::size_t>(g)] = norm(problem.group(std::as_const(B).data(), g));
    }
}

Certificate DualBound::operator()(double lam, const Vector& M, const Vector& T) const {
    const Problem& p = problem_;
    double s = 1.0, noise = 0.0;
    double young = 0.0;  // Σ_g ⟨G_g, M_g⟩ + lam w_g ‖M_g‖
    double quadratic = 0.0, linear = 0.0, penalty = 0.0;
    double inexact = 0.0;  // ≥ |⟨E, M⟩|
    Vector G(static_cast<std::size_t>(p.block()));
    for (Index g = 0; g < p.groups(); ++g) {
        const auto m = p.group(M.data(), g), t = p.group(T.data(), g), c = p.group(p.yx, g);
        subtract(t, c, G);
        const double threshold = lam * p.weights[g], length = norm(G);
        const double error = residual_[static_cast<std::size_t>(g)];
        if (error > threshold) s = -std::numeric_limits<double>::infinity();
        if (length > threshold) s = std::min(s, (threshold - error) / (length - error));
        noise = std::max(noise, eps * (length + c_norms_[static_cast<std::size_t>(g)]) / threshold);
        const double m_norm = norm(m);
        if (m_norm == 0.0) continue;
        young += dot(G, m) + threshold * m_norm;
        penalty += threshold * m_norm;
        quadratic += dot(t, m);
        linear += dot(c, m);
        inexact += error * m_norm;
    }
    Certificate certificate;
    certificate.objective = 0.5 * quadratic - linear + penalty;
    certificate.reference = std::abs(certificate.objective + p.constant);
    const double scale = 0.5 * quadratic + std::abs(linear) + penalty;
    // ⟨R(B − M), M⟩ and ⟨R(B − M), B − M⟩, with ⟨R B, M⟩ = ⟨C, M⟩ + ⟨E, M⟩.
    const double slope = linear + inexact - quadratic;
    // R may be indefinite by rounding, which counts where B is large.
    const double reach = length_ + norm(M);
    const double bend = std::max(energy_ - 2.0 * (linear - inexact) + quadratic, 0.0) +
                        eps * static_cast<double>(p.inputs) * reach * reach;
    certificate.floor = 4.0 * eps * scale + 2.0 * noise * std::abs(slope);
    if (s >= 0.0) {
        const double rest = 1.0 - s;
        certificate.gap = std::max(young + rest * slope + 0.5 * rest * rest * bend, 0.0);
    }
    return certificate;
}

}  // namespace pysolve
