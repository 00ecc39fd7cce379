#include "pysolve/elimination.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "pysolve/schur.hpp"

namespace pysolve {
namespace {

std::size_t size(Index n) {
    return static_cast<std::size_t>(n);
}

Vector with_ridge(const Problem& problem, const Reader& reader, double ridge) {
    const Index n = problem.inputs;
    Vector S(reader.xx, reader.xx + n * n);
    for (Index i = 0; i < n; ++i) S[size(i * (n + 1))] += ridge;
    return S;
}

// The factors of all R_r + ridge I, with the first of `ridges` that rounding allows.
std::pair<double, std::vector<Vector>> factor_all(const Problem& problem, std::span<const double> ridges) {
    const Index n = problem.inputs;
    for (double ridge : ridges) {
        std::vector<Vector> factors;
        for (const Reader& reader : problem.readers) {
            factors.push_back(with_ridge(problem, reader, ridge));
            if (!cholesky({factors.back().data(), n, n, n})) break;
            if (factors.size() == problem.readers.size()) return {ridge, std::move(factors)};
        }
    }
    throw std::invalid_argument("r_xx is singular at the ridge asked for; use a larger one or \"auto\".");
}

// Chooses slots, and keeps every reader's Schur complements in step.
class Greedy {
  public:
    Greedy(std::vector<Schur> readers, Index groups, bool cheapest)
        : readers_(std::move(readers)),
          sign_(cheapest ? 1.0 : -1.0),
          in_slot_(size(groups)),
          alive_(size(groups), true) {
        std::iota(in_slot_.begin(), in_slot_.end(), 0);
    }

    Selection run(Index count, const Monitor& monitor) {
        Selection selection;
        for (Index step = 0; step < count; ++step) {
            costs_.assign(in_slot_.size(), 0.0);
            for (Schur& reader : readers_) reader.add_costs(costs_);
            const std::size_t slot = best();
            selection.order.push_back(in_slot_[slot]);
            selection.change.push_back(costs_[slot]);
            alive_[slot] = false;
            if (step + 1 == count) break;
            for (Schur& reader : readers_) reader.remove(static_cast<Index>(slot));
            if (readers_.front().full()) compact();
            if (monitor) monitor({step + 1, 0.0, selection.change.back(), 0.0});
        }
        return selection;
    }

  private:
    std::size_t best() const {
        std::size_t winner = alive_.size();
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t s = 0; s < alive_.size(); ++s) {
            const double cost = sign_ * costs_[s];
            // Equal costs are settled by the group's number, not by where it happens to lie.
            if (!alive_[s] || cost > least || (cost == least && winner < s && in_slot_[s] > in_slot_[winner]))
                continue;
            winner = s;
            least = cost;
        }
        return winner;
    }

    // The last living groups fill the holes.
    void compact() {
        std::vector<Schur::Move> moves;
        std::size_t last = alive_.size();
        for (std::size_t hole = 0; hole < last; ++hole) {
            if (alive_[hole]) continue;
            while (last > hole && !alive_[last - 1]) --last;
            if (last <= hole) break;
            --last;
            moves.push_back({static_cast<Index>(last), static_cast<Index>(hole)});
            in_slot_[hole] = in_slot_[last];
            alive_[hole] = true;
        }
        in_slot_.resize(last);
        alive_.assign(last, true);
        for (Schur& reader : readers_) reader.apply(moves, static_cast<Index>(last));
    }

    std::vector<Schur> readers_;
    double sign_;
    std::vector<Index> in_slot_;
    std::vector<bool> alive_;
    Vector costs_;
};

// Upper triangle of T Tᵀ
Vector gram(MatrixView<const double> T) {
    Vector P(size(T.rows * T.rows));
    multiply_self(T, {P.data(), T.rows, T.rows, T.rows});
    return P;
}

}  // namespace

Selection eliminate(const Problem& problem, std::span<const double> ridges, Index smallest,
                    const Monitor& monitor) {
    const Index n = problem.inputs;
    auto [ridge, factors] = factor_all(problem, ridges);
    std::vector<Schur> readers;
    double largest_inverse = 0.0;
    const double* yx = problem.yx;
    for (std::size_t r = 0; r < factors.size(); ++r) {
        const Index outputs = problem.readers[r].outputs;
        const MatrixView<const double> C{yx, n, outputs, problem.outputs};
        Vector weights(size(n * outputs));
        const MatrixView<double> S{factors[r].data(), n, n, n}, T{weights.data(), n, outputs, outputs};
        invert_from_cholesky(S);
        multiply_symmetric(S, C, T);
        for (Index i = 0; i < n; ++i) largest_inverse = std::max(largest_inverse, S.data[i * (n + 1)]);
        readers.emplace_back(std::move(factors[r]), gram(T), n, problem.group_size);
        yx += outputs;
    }
    Greedy greedy(std::move(readers), problem.groups(), true);
    Selection selection = greedy.run(problem.groups() - smallest, monitor);
    selection.ridge = ridge;
    selection.largest_inverse = largest_inverse;
    return selection;
}

Selection forward(const Problem& problem, double ridge, Index count, const Monitor& monitor) {
    std::vector<Schur> readers;
    const double* yx = problem.yx;
    for (const Reader& reader : problem.readers) {
        readers.emplace_back(with_ridge(problem, reader, ridge),
                             gram({yx, problem.inputs, reader.outputs, problem.outputs}), problem.inputs,
                             problem.group_size);
        yx += reader.outputs;
    }
    Selection selection = Greedy(std::move(readers), problem.groups(), false).run(count, monitor);
    selection.ridge = ridge;
    return selection;
}

}  // namespace pysolve
