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
    for (double ridge = 1e-11 * mean; ridge <= mean; ridge *= 100.0) {
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
      target_(static_cast<std::size_t>(problem.size()), 0.0),
      residual_(static_cast<std::size_t>(problem.groups())),
      scales_(residual_.size()) {
    const Index n = problem.inputs;
    if (n == 0) return;
    const auto part = [&](Vector& matrix, const Reader& reader, Index offset) {
        return MatrixView<double>{matrix.data() + offset, n, reader.outputs, problem.outputs};
    };
    for (Index g = 0; g < problem.groups(); ++g) c_norms_.push_back(norm(problem.group(problem.yx, g)));
    std::vector<Vector> factors;
    for (const Reader& reader : problem.readers) factors.push_back(factor_with_ridge(reader.xx, n));

    // B ← B + (R + ridge)⁻¹ (C − R B): the first round leaves what the ridge and rounding do.
    Vector B(target_.size(), 0.0), step(problem.yx, problem.yx + problem.size());
    for (int round = 0; round < 3; ++round) {
        Index offset = 0;
        for (std::size_t r = 0; r < factors.size(); ++r) {
            const Reader& reader = problem.readers[r];
            cholesky_solve({factors[r].data(), n, n, n}, part(step, reader, offset));
            offset += reader.outputs;
        }
        for (std::size_t i = 0; i < B.size(); ++i) B[i] += step[i];
        offset = 0;
        for (const Reader& reader : problem.readers) {
            multiply_transposed({reader.xx, n, n, n}, part(B, reader, offset), part(target_, reader, offset));
            offset += reader.outputs;
        }
        for (std::size_t i = 0; i < step.size(); ++i) step[i] = problem.yx[i] - target_[i];
        bool small = true;
        for (Index g = 0; g < problem.groups(); ++g) {
            residual_[static_cast<std::size_t>(g)] = norm(problem.group(std::as_const(step).data(), g));
            small = small && residual_[static_cast<std::size_t>(g)] <= 1e-3 * lam * problem.weights[g];
        }
        if (small) break;
    }
    energy_ = dot(target_, B);
    for (Index g = 0; g < problem.groups(); ++g)
        scales_[static_cast<std::size_t>(g)] = norm(problem.group(std::as_const(B).data(), g));
}

Certificate DualBound::operator()(double lam, const Vector& M, const Vector& T) const {
    const Problem& p = problem_;
    double s = 1.0, noise = 0.0;
    double young = 0.0;  // Σ_g ⟨G_g, M_g⟩ + lam w_g ‖M_g‖
    double quadratic = 0.0, linear = 0.0, penalty = 0.0, target_M = 0.0;
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
        target_M += dot(p.group(target_.data(), g), m);
    }
    Certificate certificate;
    certificate.objective = 0.5 * quadratic - linear + penalty;
    const double scale = 0.5 * quadratic + std::abs(linear) + penalty;
    const double slope = target_M - quadratic;                                // ⟨R(B − M), M⟩
    const double bend = std::max(energy_ - 2.0 * target_M + quadratic, 0.0);  // ⟨R(B − M), B − M⟩
    certificate.floor = 4.0 * eps * scale + 2.0 * noise * std::abs(slope);
    if (s >= 0.0) {
        const double rest = 1.0 - s;
        certificate.gap = std::max(young + rest * slope + 0.5 * rest * rest * bend, 0.0);
    }
    return certificate;
}

}  // namespace pysolve
