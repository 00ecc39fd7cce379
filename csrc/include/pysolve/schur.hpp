// Schur complements that remove one group of inputs after another, with the work done in matrix products.
#pragma once

#include <span>
#include <vector>

#include "pysolve/block_costs.hpp"

namespace pysolve {

// out = A Bᵀ
void multiply(MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out);

// The block that a Schur complement divides by: S_pp = L Lᵀ (raised by a tiny share of its diagonal where
// rounding left it indefinite).
class Pivot {
  public:
    explicit Pivot(Index size)
        : size_(size), factor_(count()), inverse_(count()), energy_(count()), work_(count()) {}
    void factor(MatrixView<const double> S, MatrixView<const double> P);
    MatrixView<const double> inverse() { return view(inverse_); }  // L⁻¹
    MatrixView<const double> energy() { return view(energy_); }    // E = L⁻¹ P_pp L⁻ᵀ

  private:
    std::size_t count() const { return static_cast<std::size_t>(size_ * size_); }
    MatrixView<double> view(Vector& M) const { return {M.data(), size_, size_, size_}; }

    Index size_;
    Vector factor_, inverse_, energy_, work_;
};

// One reader's S (inputs × inputs, positive definite) and P = T Tᵀ. Removing group p means
//
//     S ← S − S_:p S_pp⁻¹ S_p:        T ← T − S_:p S_pp⁻¹ T_p
//
// with S_pp = L Lᵀ, F = S_:p L⁻ᵀ, V = L⁻¹ T_p, E = V Vᵀ and Q = T Vᵀ − ½ F E:   S −= F Fᵀ,   P −= F Qᵀ + Q
// Fᵀ. T itself is never needed, so the cost does not depend on its width. F and Q of several removals are
// collected and applied at once; until then rows of S and P are brought up to date where they are looked at.
// Groups lie in slots: group g in slot g at first.
class Schur {
  public:
    // Takes S and P as row-major upper triangles.
    Schur(Vector S, Vector P, Index inputs, Index group_size);

    // costs_s += ½ tr(S_ss⁻¹ P_ss): what removing the group in slot s changes. Stale for removed slots.
    void add_costs(std::span<double> costs) { blocks_.add_to(costs); }
    void remove(Index slot);
    bool full() const { return used_ + group_size_ > width_; }

    struct Move {
        Index from, to;
    };
    // Apply what is collected, after filling the holes: the first `slots` slots then hold the groups that are
    // left.
    void apply(std::span<const Move> moves, Index slots);

  private:
    MatrixView<double> panel(Vector& M, Index first, Index count) const {
        return {M.data() + first * stride_, count, inputs_, stride_};
    }
    void gather(const Vector& M, Index slot, MatrixView<double> out) const;
    void fill(Vector& M, std::span<const Move> moves, Index slots) const;

    Index group_size_, stride_;  // stride of every matrix
    Index inputs_, width_;       // inputs still in use; columns that F and Q have room for
    Vector S_, P_;
    Vector F_, Q_;            // transposed: one row a column
    Vector S_rows_, P_rows_;  // of the group in question
    Pivot pivot_;
    Index used_ = 0;  // columns of F and Q that wait
    BlockCosts blocks_;
};

}  // namespace pysolve
