// What it costs to remove each group, from small diagonal blocks kept up to date on their own.
#pragma once

#include <span>
#include <vector>

#include "pysolve/blas.hpp"

namespace pysolve {

// Holds S_qq and P_qq of every group q and evaluates ½ tr(S_qq⁻¹ P_qq). Eight groups lie side by side, one to
// a lane, so that the loops over a small block of any size vectorise.
class BlockCosts {
  public:
    explicit BlockCosts(Index group_size) : size_(group_size) {}

    // Read the diagonal blocks, from upper triangles; S_qq is multiplied by signs[q] where given.
    void load(MatrixView<const double> S, MatrixView<const double> P, std::span<const double> signs = {});

    // S_qq −= F_q F_qᵀ and P_qq −= F_q Q_qᵀ + Q_q F_qᵀ; F and Q come transposed: group_size rows, one column
    // an input.
    void downdate(MatrixView<const double> F, MatrixView<const double> Q);

    // out_q += ½ tr(S_qq⁻¹ P_qq), at least 0
    void add_to(std::span<double> out);

  private:
    void to_lanes(MatrixView<const double> M, Index tile, Vector& out) const;

    Index size_, groups_ = 0, tiles_ = 0;
    Vector S_, P_;         // tiles × row × column × lane, lower triangles
    Vector F_, Q_, work_;  // one tile
};

}  // namespace pysolve
