#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "pysolve/elimination.hpp"
#include "pysolve/schur.hpp"

namespace pysolve {
namespace {

std::size_t size(Index n) {
    return static_cast<std::size_t>(n);
}

// One reader's Schur complements with a set A of groups put in, in one symmetric matrix, and what they
// explain:
//
//     S = [ −H  H R_AB ; R_BA H  R_BB − R_BA H R_AB ],   H = R_AA⁻¹;      T = [ H C_A ; C_B − R_BA H C_A ],
//     P = T Tᵀ
//
// Putting p in (sign = 1) and taking it out (−1) are the same step: with sign S_pp = L Lᵀ and F = sign S_:p
// L⁻ᵀ, the other rows change as in schur.hpp, S by sign F Fᵀ; then
//
//     S_:p ← sign F L⁻¹,   S_pp ← −sign L⁻ᵀ L⁻¹,   P_:p ← (Q − ½ F E) L⁻¹,   P_pp ← L⁻ᵀ E L⁻¹.
class Tableau {
  public:
    Tableau(const Problem& problem, const Reader& reader, const double* yx, double ridge)
        : n_(problem.inputs),
          S_(reader.xx, reader.xx + n_ * n_),
          P_(S_.size(), 0.0),
          blocks_(problem.group_size) {
        for (Index i = 0; i < n_; ++i) S_[size(i * (n_ + 1))] += ridge;
        add_self(1.0, {yx, n_, reader.outputs, problem.outputs}, view(P_));
    }

    void add_costs(std::span<const double> signs, std::span<double> costs) {
        blocks_.load(view(S_), view(P_), signs);
        blocks_.add_to(costs);
    }

    void sweep(std::span<const Index> columns, double sign) {
        const Index m = std::ssize(columns);
        const auto S = matrix(S_p_, n_, m), P = matrix(P_p_, n_, m), F = matrix(F_, n_, m),
                   Q = matrix(Q_, n_, m);
        const auto block = matrix(block_, m, m), other = matrix(other_, m, m), root = matrix(root_, m, m);
        gather(S_, columns, sign, S);
        gather(P_, columns, 1.0, P);
        for (Index a = 0; a < m; ++a) {
            std::copy_n(S.data + columns[size(a)] * m, m, block.data + a * m);
            std::copy_n(P.data + columns[size(a)] * m, m, other.data + a * m);
        }
        Pivot pivot(m);
        pivot.factor(block, other);
        multiply(S, pivot.inverse(), F);
        multiply(P, pivot.inverse(), Q);
        add_product(-0.5, F, pivot.energy(), Q);
        add_self(-sign, F, view(S_));
        add_cross(-1.0, F, Q, view(P_));
        add_product(-0.5, F, pivot.energy(), Q);

        for (Index a = 0; a < m; ++a)
            for (Index b = 0; b < m; ++b) root.data[a * m + b] = pivot.inverse().data[b * m + a];  // L⁻ᵀ
        multiply(F, root, S);
        multiply(root, root, block);
        for (double& value : block_) value = -value;
        scatter(S, block, sign, columns, S_);
        multiply(Q, root, P);
        multiply(root, pivot.energy(), other);
        multiply(other, root, block);
        scatter(P, block, 1.0, columns, P_);
    }

  private:
    MatrixView<double> view(Vector& M) const { return {M.data(), n_, n_, n_}; }

    static MatrixView<double> matrix(Vector& M, Index rows, Index columns) {
        M.resize(size(rows * columns));
        return {M.data(), rows, columns, columns};
    }

    double& at(Vector& M, Index i, Index j) const { return M[size(std::min(i, j) * n_ + std::max(i, j))]; }

    void gather(Vector& M, std::span<const Index> columns, double sign, MatrixView<double> out) const {
        for (Index i = 0; i < n_; ++i)
            for (Index b = 0; b < out.cols; ++b)
                out.data[i * out.stride + b] = sign * at(M, i, columns[size(b)]);
    }

    // The columns given from `in`, but where they cross from `block`.
    void scatter(MatrixView<const double> in, MatrixView<const double> block, double sign,
                 std::span<const Index> columns, Vector& M) const {
        for (Index i = 0; i < n_; ++i)
            for (Index b = 0; b < in.cols; ++b)
                at(M, i, columns[size(b)]) = sign * in.data[i * in.stride + b];
        for (Index a = 0; a < in.cols; ++a)
            for (Index b = a; b < in.cols; ++b)
                at(M, columns[size(a)], columns[size(b)]) = sign * block.data[a * block.stride + b];
    }

    Index n_;
    Vector S_, P_, S_p_, P_p_, F_, Q_, block_, other_, root_;
    BlockCosts blocks_;
};

class Swapper {
  public:
    Swapper(const Problem& problem, double ridge, const std::vector<Index>& keep, const Monitor& monitor)
        : group_size_(problem.group_size),
          signs_(size(problem.groups()), 1.0),
          costs_(signs_.size()),
          monitor_(monitor) {
        const double* yx = problem.yx;
        for (const Reader& reader : problem.readers) {
            readers_.emplace_back(problem, reader, yx, ridge);
            yx += reader.outputs;
        }
        update();
        negligible_ = 1e-11 * *std::ranges::max_element(costs_);
        sweep(keep);
    }

    std::vector<Index> keep() const {
        std::vector<Index> inside;
        for (std::size_t g = 0; g < signs_.size(); ++g)
            if (signs_[g] < 0.0) inside.push_back(static_cast<Index>(g));
        return inside;
    }

    // One exchange, where there is one that lowers the error.
    bool improve(Index depth) {
        const Index in = best_outside();
        const double gain = cost(in);
        sweep({in});
        const Index out = cheapest_inside().front();
        const double loss = cost(out);
        sweep({out != in && better(gain, loss) ? out : in});
        if (signs_[size(in)] < 0.0) return true;

        std::vector<Index> candidates = cheapest_inside();
        candidates.resize(std::min(candidates.size(), size(depth)));
        for (Index candidate : candidates) {
            const double price = cost(candidate);
            sweep({candidate});
            const Index next = best_outside();
            const bool improved = next != candidate && better(cost(next), price);
            sweep({improved ? next : candidate});
            if (improved) return true;
        }
        return false;
    }

  private:
    double cost(Index g) const { return costs_[size(g)]; }
    bool better(double gain, double loss) const { return gain > loss * (1.0 + 1e-7) + negligible_; }

    void update() {
        std::ranges::fill(costs_, 0.0);
        for (Tableau& reader : readers_) reader.add_costs(signs_, costs_);
    }

    // All groups given are on the same side; afterwards on the other.
    void sweep(const std::vector<Index>& groups) {
        std::vector<Index> columns;
        for (Index g : groups)
            for (Index i = 0; i < group_size_; ++i) columns.push_back(g * group_size_ + i);
        for (Tableau& reader : readers_) reader.sweep(columns, signs_[size(groups.front())]);
        for (Index g : groups) signs_[size(g)] = -signs_[size(g)];
        update();
        if (monitor_) monitor_({++sweeps_, 0.0, 0.0, 0.0});
    }

    Index best_outside() const {
        Index best = -1;
        for (Index g = 0; g < std::ssize(signs_); ++g)
            if (signs_[size(g)] > 0.0 && (best < 0 || cost(g) > cost(best))) best = g;
        return best;
    }

    std::vector<Index> cheapest_inside() const {
        std::vector<Index> inside = keep();
        std::ranges::stable_sort(inside, {}, [this](Index g) { return cost(g); });
        return inside;
    }

    Index group_size_;
    std::vector<Tableau> readers_;
    Vector signs_;  // 1: outside, −1: inside
    Vector costs_;  // what a group outside would gain, what one inside would cost
    double negligible_ = 0.0;
    const Monitor& monitor_;
    Index sweeps_ = 0;
};

}  // namespace

std::vector<Index> swap_groups(const Problem& problem, double ridge, std::vector<Index> keep,
                               const SwapOptions& options, const Monitor& monitor) {
    if (keep.empty() || std::ssize(keep) == problem.groups()) return keep;
    Swapper swapper(problem, ridge, keep, monitor);
    for (Index swap = 0; swap < options.max_swaps && swapper.improve(options.depth);) ++swap;
    return swapper.keep();
}

}  // namespace pysolve
