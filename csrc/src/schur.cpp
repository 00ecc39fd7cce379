#include "pysolve/schur.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

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
      S_column_(size(inputs * group_size)),
      P_column_(S_column_.size()),
      pivot_(group_size),
      blocks_(group_size) {
    apply({}, inputs / group_size);
}

void Schur::remove(Index slot) {
    const Index k = group_size_, p = slot * k;
    const auto rows = [&](Vector& M) { return MatrixView<double>{M.data() + p * width_, k, used_, width_}; };
    const MatrixView<double> S{S_column_.data(), inputs_, k, k}, P{P_column_.data(), inputs_, k, k};
    gather(S_, slot, S);
    gather(P_, slot, P);
    if (used_ > 0) {
        const auto F = panel(F_, 0, used_), Q = panel(Q_, 0, used_);
        add_product(-1.0, F, rows(F_), S);
        add_product(-1.0, F, rows(Q_), P);
        add_product(-1.0, Q, rows(F_), P);
    }
    pivot_.factor({S.data + p * k, k, k, k}, {P.data + p * k, k, k, k});
    const auto F = panel(F_, used_, k), Q = panel(Q_, used_, k);
    multiply(S, pivot_.inverse(), F);
    multiply(P, pivot_.inverse(), Q);
    add_product(-0.5, F, pivot_.energy(), Q);
    blocks_.downdate(F, Q);
    used_ += k;
}

void Schur::apply(std::span<const Move> moves, Index slots) {
    for (const Move& step : moves) {
        move(S_, step);
        move(P_, step);
        for (Vector* M : {&F_, &Q_})
            std::copy_n(M->data() + step.from * group_size_ * width_, group_size_ * width_,
                        M->data() + step.to * group_size_ * width_);
    }
    inputs_ = slots * group_size_;
    const MatrixView<double> S{S_.data(), inputs_, inputs_, stride_}, P{P_.data(), inputs_, inputs_, stride_};
    if (used_ > 0 && inputs_ > 0) {
        add_self(-1.0, panel(F_, 0, used_), S);
        add_cross(-1.0, panel(F_, 0, used_), panel(Q_, 0, used_), P);
    }
    used_ = 0;
    blocks_.load(S, P);
}

// The columns of a group, of which the upper triangle holds a part as columns and a part as rows.
void Schur::gather(const Vector& M, Index slot, MatrixView<double> out) const {
    const Index k = group_size_, p = slot * k;
    for (Index i = 0; i < p; ++i) std::copy_n(&M[size(i * stride_ + p)], k, out.data + i * out.stride);
    for (Index c = 0; c < k; ++c) {
        const double* row = &M[size((p + c) * stride_)];
        for (Index i = p + c; i < inputs_; ++i) out.data[i * out.stride + c] = row[i];
        for (Index i = p; i < p + c; ++i) out.data[i * out.stride + c] = M[size(i * stride_ + p + c)];
    }
}

void Schur::move(Vector& M, const Move& move) {
    const Index k = group_size_, from = move.from * k, to = move.to * k;
    const MatrixView<double> column{S_column_.data(), inputs_, k, k};
    gather(M, move.from, column);
    std::copy_n(column.data + from * k, k * k, column.data + to * k);
    for (Index i = 0; i < to; ++i) std::copy_n(column.data + i * k, k, &M[size(i * stride_ + to)]);
    for (Index c = 0; c < k; ++c)
        for (Index i = to + c; i < from; ++i) M[size((to + c) * stride_ + i)] = column.data[i * k + c];
}

}  // namespace pysolve
