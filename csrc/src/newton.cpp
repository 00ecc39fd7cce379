#include "pysolve/newton.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "pysolve/descent.hpp"
#include "pysolve/fista.hpp"
#include "pysolve/product.hpp"
#include "pysolve/prox.hpp"

namespace pysolve {
namespace {

constexpr double finest = 1e-15;  // no |p_g − 1| below this means anything
constexpr int patience = 8;       // rounds without a smaller gap before FISTA takes over

// The worst of the zero groups join, as many as keep the working set in proportion. Alone, a group of unit
// variance would end at its excess; the more come together, the more they share.
Scales join(const std::vector<std::pair<double, Index>>& found, const Scales& at, double share) {
    const std::size_t room = std::max<std::size_t>(64, 2 * at.groups.size());
    const std::size_t count = found.size() <= room + room / 2 ? found.size() : room;
    std::vector<std::pair<Index, double>> all;
    all.reserve(at.groups.size() + count);
    for (std::size_t a = 0; a < at.groups.size(); ++a) all.emplace_back(at.groups[a], at.values[a]);
    share /= std::max(1.0, 0.05 * static_cast<double>(count));
    for (std::size_t i = 0; i < count; ++i) all.emplace_back(found[i].second, share * found[i].first);
    std::ranges::sort(all);
    Scales next;
    for (const auto& [group, value] : all) {
        next.groups.push_back(group);
        next.values.push_back(value);
    }
    return next;
}

// Join without raising φ, which starting small enough never does: rounds that each lower φ cannot cycle.
bool enter(const std::vector<std::pair<double, Index>>& found, Scales& at, Variational& model) {
    const double phi = model.phi();
    Scales next;
    for (double share = 1.0; share > 1e-9; share *= 0.1) {
        next = join(found, at, share);
        if (!model.evaluate(next.groups, next.values)) return false;
        if (model.phi() <= phi) break;
    }
    at = std::move(next);
    return true;
}

// Zero groups that violate their optimality condition, worst first; the value is the start for their scale.
std::vector<std::pair<double, Index>> violations(const Problem& problem, double lam, const Vector& M,
                                                 const Vector& T, double tol) {
    std::vector<std::pair<double, Index>> found;
    Vector G(static_cast<std::size_t>(problem.block()));
    for (Index g = 0; g < problem.groups(); ++g) {
        const auto m = problem.group(M.data(), g), t = problem.group(T.data(), g),
                   c = problem.group(problem.yx, g);
        if (norm(m) > 0.0) continue;
        for (std::size_t i = 0; i < G.size(); ++i) G[i] = t[i] - c[i];
        const double threshold = lam * problem.weights[g], excess = norm(G) - threshold;
        if (excess > tol * threshold) found.emplace_back(excess, g);
    }
    std::ranges::sort(found, std::greater{});
    return found;
}

// All groups that one fixed point from the scales of the least squares fit does not shrink away.
bool ridge_start(const Vector& least_squares, Scales& at, Variational& model) {
    if (!model.evaluate_all(least_squares)) return false;
    at = {};
    for (std::size_t a = 0; a < model.groups().size(); ++a) {
        const double p = model.ratios()[a];
        if (p < 0.1) continue;
        at.groups.push_back(model.groups()[a]);
        at.values.push_back(p * least_squares[static_cast<std::size_t>(model.groups()[a])]);
    }
    return model.evaluate(at.groups, at.values);
}

}  // namespace

Result newton(const Problem& problem, double lam, Vector M, const Stopping& stopping,
              const Monitor& monitor) {
    Recorder recorder(stopping, monitor);
    const DualBound bound(problem, lam);
    Product product(problem);
    Variational model(problem, lam);
    Vector T;
    product.exact(M, T);
    Certificate certificate = bound(lam, M, T);
    Scales at;
    for (Index g = 0; g < problem.groups(); ++g) {
        const double length = norm(problem.group(std::as_const(M).data(), g));
        if (length == 0.0) continue;
        at.groups.push_back(g);
        at.values.push_back(length);
    }
    const bool cold = at.groups.empty();
    bool sound = model.evaluate(at.groups, at.values);
    double tol = 0.1;
    Index entered = 0;
    Chord chord;
    double best = std::numeric_limits<double>::infinity();
    for (int idle = 0; !recorder(certificate); ++idle) {
        if (certificate.gap < 0.9 * best) idle = 0;
        best = std::min(best, certificate.gap);
        const auto found = violations(problem, lam, M, T, 0.5 * stopping.tol);
        const Index round = recorder.iterations();
        if (found.empty()) {
            sound = sound && tol > finest;
            // The gap falls with the square of the errors p_g − 1: ask for what the precision wanted takes.
            const double wanted = 0.1 * stopping.tol * certificate.reference / certificate.gap;
            tol = std::clamp(std::min(0.5, std::sqrt(wanted)) * worst(model.ratios()), finest, 1e-2);
        } else {
            const auto& [excess, group] = found.front();
            tol = std::clamp(0.1 * excess / lam / problem.weights[group], finest, 1e-2);
            // All that came in stayed, and most others still want in: the solution is dense, close to a ridge
            // fit.
            const bool stayed = round == 1 && 10 * std::ssize(at.groups) >= 9 * entered;
            const bool dense = cold && stayed && 2 * std::ssize(found) > problem.groups();
            sound = sound && (dense ? ridge_start(bound.scales(), at, model) : enter(found, at, model));
        }
        entered = std::ssize(at.groups);
        sound = sound && minimise(problem, lam, at, tol, cold && round == 0 ? 2 : 0, model, chord, recorder);
        if (!sound || idle > patience) return run_fista(problem, lam, std::move(M), {}, bound, recorder);
        model.scatter(M);
        if (std::ssize(at.groups) == problem.groups()) {
            model.scatter_product(T);
            certificate = bound(lam, M, T);
            if (!recorder.would_stop(certificate)) continue;
        }
        product.exact(M, T);
        certificate = bound(lam, M, T);
    }
    return recorder.result(problem, lam, std::move(M), T, certificate);
}

}  // namespace pysolve
