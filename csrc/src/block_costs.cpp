#include "pysolve/block_costs.hpp"

#include <algorithm>
#include <cmath>

#include "pysolve/lanes.hpp"

namespace pysolve {
namespace {

constexpr Index lanes = 8;

PYSOLVE_CLONES void downdate_tile(Index size, const double* F, const double* Q, double* S, double* P) {
    for (Index i = 0; i < size; ++i)
        for (Index j = 0; j <= i; ++j) {
            double s[lanes] = {}, p[lanes] = {};
            for (Index c = 0; c < size; ++c) {
                const double *fi = F + (i * size + c) * lanes, *fj = F + (j * size + c) * lanes;
                const double *qi = Q + (i * size + c) * lanes, *qj = Q + (j * size + c) * lanes;
                for (Index l = 0; l < lanes; ++l) {
                    s[l] += fi[l] * fj[l];
                    p[l] += fi[l] * qj[l] + qi[l] * fj[l];
                }
            }
            double *s_out = S + (i * size + j) * lanes, *p_out = P + (i * size + j) * lanes;
            for (Index l = 0; l < lanes; ++l) {
                s_out[l] -= s[l];
                p_out[l] -= p[l];
            }
        }
}

// The same for blocks of a single number, which need no tiles.
PYSOLVE_CLONES void downdate_numbers(Index n, const double* F, const double* Q, double* S, double* P) {
    for (Index i = 0; i < n; ++i) {
        S[i] -= F[i] * F[i];
        P[i] -= 2.0 * F[i] * Q[i];
    }
}

// L ← L⁻¹ of the Cholesky factor of S. A pivot that rounding left at 0 or below is lifted to a tiny one.
PYSOLVE_CLONES void invert_factor(Index size, const double* S, double* L) {
    const auto at = [=](Index i, Index j) { return L + (i * size + j) * lanes; };
    for (Index j = 0; j < size; ++j) {
        double pivot[lanes] = {};  // 1/L_jj
        for (Index i = j; i < size; ++i) {
            double rest[lanes];
            for (Index l = 0; l < lanes; ++l) rest[l] = S[(i * size + j) * lanes + l];
            for (Index c = 0; c < j; ++c)
                for (Index l = 0; l < lanes; ++l) rest[l] -= at(i, c)[l] * at(j, c)[l];
            if (i > j) {
                for (Index l = 0; l < lanes; ++l) at(i, j)[l] = rest[l] * pivot[l];
                continue;
            }
            for (Index l = 0; l < lanes; ++l) {
                const double least = 1e-14 * std::abs(S[(j * size + j) * lanes + l]) + 1e-290;
                pivot[l] = 1.0 / std::sqrt(rest[l] > least ? rest[l] : least);
                at(j, j)[l] = pivot[l];
            }
        }
    }
    for (Index j = 0; j < size; ++j)
        for (Index i = j + 1; i < size; ++i) {
            double total[lanes] = {};
            for (Index c = j; c < i; ++c)
                for (Index l = 0; l < lanes; ++l) total[l] += at(i, c)[l] * at(c, j)[l];
            for (Index l = 0; l < lanes; ++l) at(i, j)[l] = -total[l] * at(i, i)[l];
        }
}

// ½ tr(L⁻ᵀ L⁻¹ P)
PYSOLVE_CLONES void half_trace(Index size, const double* inverse, const double* P, double* out) {
    for (Index l = 0; l < lanes; ++l) out[l] = 0.0;
    for (Index i = 0; i < size; ++i)
        for (Index j = 0; j <= i; ++j) {
            double entry[lanes] = {};
            for (Index r = i; r < size; ++r)
                for (Index l = 0; l < lanes; ++l)
                    entry[l] += inverse[(r * size + i) * lanes + l] * inverse[(r * size + j) * lanes + l];
            const double twice = i == j ? 0.5 : 1.0;
            for (Index l = 0; l < lanes; ++l) out[l] += twice * entry[l] * P[(i * size + j) * lanes + l];
        }
}

}  // namespace

void BlockCosts::load(MatrixView<const double> S, MatrixView<const double> P, std::span<const double> signs) {
    groups_ = S.rows / size_;
    tiles_ = (groups_ + lanes - 1) / lanes;
    const auto tile = static_cast<std::size_t>(size_ * size_ * lanes);
    S_.assign(static_cast<std::size_t>(tiles_) * tile, 0.0);
    P_.assign(S_.size(), 0.0);
    for (Index g = 0; g < tiles_ * lanes; ++g) {
        const Index first = g / lanes * size_ * size_ * lanes + g % lanes;
        const double sign = g < groups_ && !signs.empty() ? signs[static_cast<std::size_t>(g)] : 1.0;
        for (Index i = 0; i < size_; ++i)
            for (Index j = 0; j <= i; ++j) {
                const auto to = static_cast<std::size_t>(first + (i * size_ + j) * lanes);
                const Index from = (g * size_ + j) * S.stride + g * size_ + i;
                S_[to] = g < groups_ ? sign * S.data[from] : static_cast<double>(i == j);
                if (g < groups_) P_[to] = P.data[from];
            }
    }
}

void BlockCosts::to_lanes(MatrixView<const double> M, Index tile, Vector& out) const {
    out.assign(static_cast<std::size_t>(size_ * size_ * lanes), 0.0);
    const Index count = std::min(lanes, groups_ - tile * lanes);
    for (Index c = 0; c < size_; ++c) {
        const double* row = M.data + c * M.stride + tile * lanes * size_;
        for (Index l = 0; l < count; ++l)
            for (Index i = 0; i < size_; ++i)
                out[static_cast<std::size_t>((i * size_ + c) * lanes + l)] = row[l * size_ + i];
    }
}

void BlockCosts::downdate(MatrixView<const double> F, MatrixView<const double> Q) {
    if (size_ == 1) return downdate_numbers(groups_, F.data, Q.data, S_.data(), P_.data());
    const Index tile = size_ * size_ * lanes;
    for (Index t = 0; t < tiles_; ++t) {
        to_lanes(F, t, F_);
        to_lanes(Q, t, Q_);
        downdate_tile(size_, F_.data(), Q_.data(), S_.data() + t * tile, P_.data() + t * tile);
    }
}

void BlockCosts::add_to(std::span<double> out) {
    const Index tile = size_ * size_ * lanes;
    work_.resize(static_cast<std::size_t>(tile));
    for (Index t = 0; t < tiles_; ++t) {
        invert_factor(size_, S_.data() + t * tile, work_.data());
        double costs[lanes];
        half_trace(size_, work_.data(), P_.data() + t * tile, costs);
        for (Index l = 0; l < std::min(lanes, groups_ - t * lanes); ++l)
            out[static_cast<std::size_t>(t * lanes + l)] += std::max(costs[l], 0.0);
    }
}

}  // namespace pysolve
