#include "pysolve/schur.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pysolve/lanes.hpp"

namespace pysolve {
namespace {

// Columns collected before they are applied: wide enough for full speed of the matrix products, narrow
// against the products that bring rows up to date.
constexpr Index panel_width = 96;

std::size_t size(Index n) {
    return static_cast<std::size_t>(n);
}

// `cholesky`; where rounding left A indefinite, with its diagonal raised by as small a share as will do.
void factor_always(MatrixView<double> A) {
    const Vector original(A.data, A.data + A.rows * A.stride);
    for (double share = 1e-14; !cholesky(A); share *= 100.0) {
        std::ranges::copy(original, A.data);
        for (Index i = 0; i < A.rows; ++i) {
            double& diagonal = A.data[i * (A.stride + 1)];
            diagonal = std::max(diagonal + share * std::abs(diagonal), 1e-290);
        }
    }
}

// s −= Σ_t a_t F_t and p −= Σ_t b_t F_t + a_t Q_t over n columns of `count` rows F_t and Q_t, where a and b
// are columns of F and Q. Every number is read once: it comes from memory, and nothing else here takes time.
PYSOLVE_CLONES void bring_up_to_date(Index count, Index stride, const double* F, const double* Q,
                                     const double* a, const double* b, Index n, double* s, double* p) {
    constexpr Index chunk = 512;
    double s_sum[chunk], p_sum[chunk];
    for (Index first = 0; first < n; first += chunk) {
        const Index m = std::min(chunk, n - first);
        for (Index i = 0; i < m; ++i) s_sum[i] = p_sum[i] = 0.0;
        Index t = 0;
        for (; t + 4 <= count; t += 4) {
            const Index r0 = t * stride, r1 = r0 + stride, r2 = r1 + stride, r3 = r2 + stride;
            const double *f0 = F + r0 + first, *f1 = F + r1 + first, *f2 = F + r2 + first,
                         *f3 = F + r3 + first;
            const double *q0 = Q + r0 + first, *q1 = Q + r1 + first, *q2 = Q + r2 + first,
                         *q3 = Q + r3 + first;
            const double a0 = a[r0], a1 = a[r1], a2 = a[r2], a3 = a[r3];
            const double b0 = b[r0], b1 = b[r1], b2 = b[r2], b3 = b[r3];
            for (Index i = 0; i < m; ++i) {
                s_sum[i] += a0 * f0[i] + a1 * f1[i] + a2 * f2[i] + a3 * f3[i];
                p_sum[i] += b0 * f0[i] + a0 * q0[i] + b1 * f1[i] + a1 * q1[i] + b2 * f2[i] + a2 * q2[i] +
                            b3 * f3[i] + a3 * q3[i];
            }
        }
        for (; t < count; ++t) {
            const double *f = F + t * stride + first, *q = Q + t * stride + first;
            const double at = a[t * stride], bt = b[t * stride];
            for (Index i = 0; i < m; ++i) {
                s_sum[i] += at * f[i];
                p_sum[i] += bt * f[i] + at * q[i];
            }
        }
        for (Index i = 0; i < m; ++i) {
            s[first + i] -= s_sum[i];
            p[first + i] -= p_sum[i];
        }
    }
}

// out += factor · A B for a small square A.
PYSOLVE_CLONES void add_rows(double factor, MatrixView<const double> A, MatrixView<const double> B,
                             MatrixView<double> out) {
    for (Index c = 0; c < A.rows; ++c)
        for (Index e = 0; e < A.cols; ++e) {
            const double scale = factor * A.data[c * A.stride + e];
            if (scale == 0.0) continue;
            const double* in = B.data + e * B.stride;
            double* row = out.data + c * out.stride;
            for (Index i = 0; i < out.cols; ++i) row[i] += scale * in[i];
        }
}

}  // namespace

void multiply(MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out) {
    for (Index i = 0; i < out.rows; ++i) std::fill_n(out.data + i * out.stride, out.cols, 0.0);
    add_product(1.0, A, B, out);
}

void Pivot::factor(MatrixView<const double> S, MatrixView<const double> P) {
    for (Index i = 0; i < size_; ++i) std::copy_n(S.data + i * S.stride, size_, &factor_[size(i * size_)]);
    factor_always(view(factor_));
    invert_factor(view(factor_), view(inverse_));
    multiply(view(inverse_), P, view(work_));
    multiply(view(work_), view(inverse_), view(energy_));
}

Schur::Schur(Vector S, Vector P, Index inputs, Index group_size)
    : group_size_(group_size),
      stride_(inputs),
      inputs_(inputs),
      width_(std::max(panel_width / group_size, Index{1}) * group_size),
      S_(std::move(S)),
      P_(std::move(P)),
      F_(size(inputs * width_)),
      Q_(F_.size()),
      S_rows_(size(inputs * group_size)),
      P_rows_(S_rows_.size()),
      pivot_(group_size),
      blocks_(group_size) {
    apply({}, inputs / group_size);
}

void Schur::remove(Index slot) {
    const Index k = group_size_, p = slot * k;
    const MatrixView<double> S{S_rows_.data(), k, inputs_, stride_}, P{P_rows_.data(), k, inputs_, stride_};
    gather(S_, slot, S);
    gather(P_, slot, P);
    for (Index c = 0; c < k; ++c)
        bring_up_to_date(used_, stride_, F_.data(), Q_.data(), &F_[size(p + c)], &Q_[size(p + c)], inputs_,
                         S.data + c * stride_, P.data + c * stride_);
    pivot_.factor({S.data + p, k, k, stride_}, {P.data + p, k, k, stride_});
    const auto F = panel(F_, used_, k), Q = panel(Q_, used_, k);
    for (Vector* M : {&F_, &Q_}) std::fill_n(M->begin() + used_ * stride_, k * stride_, 0.0);
    add_rows(1.0, pivot_.inverse(), S, F);
    add_rows(1.0, pivot_.inverse(), P, Q);
    add_rows(-0.5, pivot_.energy(), F, Q);
    blocks_.downdate(F, Q);
    used_ += k;
}

void Schur::apply(std::span<const Move> moves, Index slots) {
    fill(S_, moves, slots);
    fill(P_, moves, slots);
    for (Vector* M : {&F_, &Q_})
        for (Index t = 0; t < used_; ++t)
            for (const Move& move : moves) {
                double* row = M->data() + t * stride_;
                std::copy_n(row + move.from * group_size_, group_size_, row + move.to * group_size_);
            }
    inputs_ = slots * group_size_;
    const MatrixView<double> S{S_.data(), inputs_, inputs_, stride_}, P{P_.data(), inputs_, inputs_, stride_};
    if (used_ > 0 && inputs_ > 0) {
        add_self_transposed(-1.0, panel(F_, 0, used_), S);
        add_cross_transposed(-1.0, panel(F_, 0, used_), panel(Q_, 0, used_), P);
    }
    used_ = 0;
    blocks_.load(S, P);
}

// The rows of a group, of which the upper triangle holds a part as columns and a part as rows.
void Schur::gather(const Vector& M, Index slot, MatrixView<double> out) const {
    const Index k = group_size_, p = slot * k;
    for (Index i = 0; i < p + k; ++i)
        for (Index c = std::max(i - p, Index{0}); c < k; ++c)
            out.data[c * out.stride + i] = M[size(i * stride_ + p + c)];
    for (Index c = 0; c < k; ++c) {
        const double* row = &M[size((p + c) * stride_)];
        std::copy(row + p + c, row + inputs_, out.data + c * out.stride + p + c);
    }
}

// Row by row, since a column of the whole matrix is a cache line for each number. Slots that move away lie
// behind `slots`, so that what is read is never overwritten before.
void Schur::fill(Vector& M, std::span<const Move> moves, Index slots) const {
    const Index k = group_size_;
    const auto at = [&](Index i, Index j) -> double& {
        return M[size(std::min(i, j) * stride_ + std::max(i, j))];
    };
    std::vector<bool> hole(size(slots));
    for (const Move& move : moves) hole[size(move.to)] = true;
    for (Index i = 0; i < slots * k; ++i) {
        if (hole[size(i / k)]) continue;
        for (const Move& move : moves)
            for (Index c = 0; c < k; ++c) at(i, move.to * k + c) = at(i, move.from * k + c);
    }
    for (const Move& one : moves)
        for (const Move& other : moves)
            for (Index a = 0; a < k; ++a)
                for (Index b = 0; b < k; ++b)
                    at(one.to * k + a, other.to * k + b) = at(one.from * k + a, other.from * k + b);
}

}  // namespace pysolve
