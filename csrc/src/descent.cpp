#include "pysolve/descent.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

namespace pysolve {
namespace {

// η_g ← η_g p_g = ‖M_g‖: never increases φ. Scales that are vanishing leave.
Scales fixed_point(const Scales& at, const Vector& ratios) {
    const double smallest = 1e-14 * *std::ranges::max_element(at.values);
    Scales next;
    for (std::size_t a = 0; a < ratios.size(); ++a) {
        if (ratios[a] < 1.0 && at.values[a] < smallest) continue;
        next.groups.push_back(at.groups[a]);
        next.values.push_back(at.values[a] * ratios[a]);
    }
    return next;
}

class Direction {
  public:
    Direction(const Problem& problem, double lam, const Scales& at, Variational& model)
        : problem_(problem), lam_(lam), at_(at), ratios_(model.ratios()) {
        model.hessian(hessian_);
    }

    // The point one projected Newton step away, nothing where the Hessian is not positive definite. The plain
    // right-hand side is the gradient of φ; the secular one is Newton on 1/p_g − 1 instead, exact for
    // uncorrelated groups and better from afar. Damping adds that much of a bound on the Hessian's diagonal.
    // A group leaves only where its own gradient agrees; others are shrunk.
    std::optional<Scales> step(bool secular, double damping) {
        damping_ = damping;
        const auto relative = solve(secular);
        if (!relative) return std::nullopt;
        Scales next;
        for (std::size_t a = 0; a < ratios_.size(); ++a) {
            const double moved = 1.0 + (*relative)[a];
            if (moved <= 0.0 && ratios_[a] < 1.0) continue;
            next.groups.push_back(at_.groups[a]);
            next.values.push_back(at_.values[a] * std::clamp(moved, 0.1, 1e3));
        }
        return next;
    }

    // The factored Hessian of all groups, where none of them was held.
    Chord chord(double error) && { return {at_, std::move(ratios_), std::move(factor_), error}; }

  private:
    // Relative changes Δη_g/η_g; those that would fall below −1 are held there while the rest is solved
    // again.
    std::optional<Vector> solve(bool secular) {
        const std::size_t n = ratios_.size();
        Vector change(n, 0.0), gradient(n);
        for (std::size_t a = 0; a < n; ++a) {
            const double p = ratios_[a];
            gradient[a] = size(a) * (secular ? p * p * (1.0 - p) : 0.5 * (1.0 - p * p));
        }
        std::vector<std::size_t> free(n);
        for (std::size_t a = 0; a < n; ++a) free[a] = a;
        for (int round = 0; round < 4 && !free.empty(); ++round) {
            Vector right(free.size());
            for (std::size_t i = 0; i < free.size(); ++i) {
                right[i] = -gradient[free[i]];
                for (std::size_t b = 0; b < n; ++b)
                    if (change[b] == -1.0) right[i] -= entry(free[i], b) * change[b];
            }
            if (!solve_free(free, right)) return std::nullopt;
            for (std::size_t i = 0; i < free.size(); ++i) change[free[i]] = right[i];
            const std::size_t before = free.size();
            std::erase_if(free, [&](std::size_t a) { return change[a] <= -1.0; });
            for (double& value : change) value = std::max(value, -1.0);
            if (free.size() == before) break;
        }
        return change;
    }

    bool solve_free(const std::vector<std::size_t>& free, Vector& right) {
        const std::size_t n = free.size();
        const bool all = n == ratios_.size();
        Vector matrix = all ? hessian_ : Vector(n * n);
        for (std::size_t i = 0; i < n; ++i) {
            for (std::size_t j = i; j < n && !all; ++j) matrix[i * n + j] = entry(free[i], free[j]);
            // Repeated channels leave the Hessian singular: which of them carries the weight is free. And I −
            // S⁻¹ is known to a few ulp of 1 only, which is all of it where a scale is about to vanish.
            const double bound = size(free[i]) * ratios_[free[i]] * ratios_[free[i]];
            matrix[i * (n + 1)] = matrix[i * (n + 1)] * (1.0 + 1e-12) + (1e-13 + damping_) * bound;
        }
        const MatrixView<double> view{matrix.data(), std::ssize(free), std::ssize(free), std::ssize(free)};
        if (!cholesky(view)) return false;
        cholesky_solve(view, {right.data(), std::ssize(free), 1, 1});
        factor_ = all && damping_ == 0.0 ? std::move(matrix) : Vector{};
        return std::ranges::all_of(right, [](double value) { return std::isfinite(value); });
    }

    double size(std::size_t a) const { return lam_ * problem_.weights[at_.groups[a]] * at_.values[a]; }

    double entry(std::size_t a, std::size_t b) const {
        return hessian_[std::min(a, b) * ratios_.size() + std::max(a, b)];
    }

    const Problem& problem_;
    double lam_;
    const Scales& at_;
    Vector ratios_, hessian_, factor_;
    double damping_ = 0.0;
};

}  // namespace

double worst(const Vector& ratios) {
    double error = 0.0;
    for (double p : ratios) error = std::max(error, std::abs(p - 1.0));
    return error;
}

Scales Chord::step(const Problem& problem, double lam, Scales now, const Vector& ratios_now) const {
    const Index n = std::ssize(ratios);
    Vector change(ratios.size());
    for (std::size_t a = 0; a < change.size(); ++a) {
        const double p = ratios[a], weight = lam * problem.weights[at.groups[a]] * at.values[a];
        change[a] = weight * p * p * p * (1.0 - 1.0 / ratios_now[a]);
    }
    cholesky_solve({factor.data(), n, n, n}, {change.data(), n, 1, 1});
    for (std::size_t a = 0; a < change.size(); ++a)
        now.values[a] = std::max(now.values[a] + at.values[a] * change[a], 0.1 * now.values[a]);
    return now;
}

bool minimise(const Problem& problem, double lam, Scales& at, double tol, int fixed_points,
              Variational& model, Chord& chord, const Recorder& recorder) {
    for (int step = 0; step < 50 && worst(model.ratios()) > tol; ++step) {
        recorder.poll();
        const double phi = model.phi(), error = worst(model.ratios()), slack = 1e-14 * std::abs(phi);
        const Vector ratios = model.ratios();
        const auto better = [&](const Scales& next) {
            if (!model.evaluate(next.groups, next.values)) return false;
            const bool rounding = std::abs(model.phi() - phi) <= slack;
            return rounding ? worst(model.ratios()) < error : model.phi() < phi;
        };
        if (chord.suffices(at, error, tol)) {
            Scales next = chord.step(problem, lam, at, ratios);
            if (better(next)) {
                at = std::move(next);
                continue;
            }
            chord = {};
            if (!model.evaluate(at.groups, at.values)) return false;
        }
        Scales next = fixed_point(at, ratios);
        const bool far = step < fixed_points || std::ranges::max(ratios) > 4.0;
        bool moved = far && better(next);
        if (!far) {
            Direction direction(problem, lam, at, model);
            using Attempt = std::pair<bool, double>;  // secular, damping
            for (const auto& [secular, damping] : {Attempt{true, 0.0},
                                                   {false, 0.0},
                                                   {false, 1e-4},
                                                   {false, 1e-2},
                                                   {false, 1.0},
                                                   {false, 100.0}}) {
                if (moved || (secular && error < 1e-3)) continue;
                const auto found = direction.step(secular, damping);
                moved = found && better(*found);
                if (moved) next = *found;
            }
            if (moved) chord = std::move(direction).chord(error);
            if (!moved) {
                next = fixed_point(at, ratios);
                moved = better(next);
            }
        }
        if (!moved) return model.evaluate(at.groups, at.values);
        at = std::move(next);
    }
    return true;
}

}  // namespace pysolve
