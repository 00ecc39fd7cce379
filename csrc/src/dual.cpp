#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "pysolve/problem.hpp"
#include "pysolve/prox.hpp"

namespace pysolve {
namespace {

constexpr double eps = std::numeric_limits<double>::epsilon();

// Factor R + ridge I with the smallest ridge of a geometric ladder that rounding allows.
void factor_with_ridge(const double* R, Index n, Vector& factor) {
    double mean = 0.0;
    for (Index i = 0; i < n; ++i) mean += R[i * (n + 1)] / static_cast<double>(n);
    if (mean <= 0.0) mean = 1.0;
    for (double ridge = 1e-11 * mean; ridge <= mean; ridge *= 100.0) {
        factor.assign(R, R + n * n);
        for (Index i = 0; i < n; ++i) factor[static_cast<std::size_t>(i * (n + 1))] += ridge;
        if (cholesky({factor.data(), n, n, n})) return;
    }
    throw std::invalid_argument("an input correlation matrix is not positive semi-definite");
}

}  // namespace

DualBound::DualBound(const Problem& problem) : problem_(problem) {
    const Index n = problem.inputs;
    if (n == 0) return;
    const std::size_t size = static_cast<std::size_t>(problem.size());
    Vector B(size, 0.0), step(size), factor;
    target_.assign(size, 0.0);
    Index offset = 0;
    for (const Reader& reader : problem.readers) {
        factor_with_ridge(reader.xx, n, factor);
        const auto part = [&](Vector& matrix) {
            return MatrixView<double>{matrix.data() + offset, n, reader.outputs, problem.outputs};
        };
        // B ← B + (R + ridge)⁻¹ (C − R B): two rounds remove what the ridge and rounding left.
        for (int round = 0; round < 2; ++round) {
            for (Index i = 0; i < n; ++i)
                for (Index j = offset; j < offset + reader.outputs; ++j) {
                    const std::size_t k = static_cast<std::size_t>(i * problem.outputs + j);
                    step[k] = problem.yx[k] - target_[k];
                }
            cholesky_solve({factor.data(), n, n, n}, part(step));
            for (Index i = 0; i < n; ++i)
                for (Index j = offset; j < offset + reader.outputs; ++j) {
                    const std::size_t k = static_cast<std::size_t>(i * problem.outputs + j);
                    B[k] += step[k];
                }
            const auto view = part(B);
            multiply_transposed({reader.xx, n, n, n}, {view.data, view.rows, view.cols, view.stride}, 1.0, 0.0,
                                part(target_));
        }
        offset += reader.outputs;
    }
    energy_ = dot(target_, B);
    Vector error(static_cast<std::size_t>(problem.block()));
    for (Index g = 0; g < problem.groups(); ++g) {
        const auto rb = problem.group(target_.data(), g);
        const auto c = problem.group(problem.yx, g);
        for (std::size_t i = 0; i < error.size(); ++i) error[i] = rb[i] - c[i];
        residual_.push_back(norm(error));
        c_norms_.push_back(norm(c));
    }
}

Certificate DualBound::operator()(double lam, const Vector& M, const Vector& T) const {
    const Problem& p = problem_;
    double s = 1.0, noise = 0.0;
    double young = 0.0;                        // Σ_g ⟨G_g, M_g⟩ + lam w_g ‖M_g‖
    double quadratic = 0.0, linear = 0.0, penalty = 0.0, target_M = 0.0;
    Vector G(static_cast<std::size_t>(p.block()));
    for (Index g = 0; g < p.groups(); ++g) {
        const auto m = p.group(M.data(), g), t = p.group(T.data(), g), c = p.group(p.yx, g);
        for (std::size_t i = 0; i < G.size(); ++i) G[i] = t[i] - c[i];
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
    const double slope = target_M - quadratic;                       // ⟨R(B − M), M⟩
    const double bend = std::max(energy_ - 2.0 * target_M + quadratic, 0.0);  // ⟨R(B − M), B − M⟩
    certificate.floor = 4.0 * eps * scale + 2.0 * noise * std::abs(slope);
    if (s >= 0.0) {
        const double rest = 1.0 - s;
        certificate.gap = std::max(young + rest * slope + 0.5 * rest * rest * bend, 0.0);
    }
    return certificate;
}

}  // namespace pysolve
