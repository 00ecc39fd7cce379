// The problem that every convex solver of the core solves, and how close an M is to its solution.
//
//     P(M) = Σ_r ( ½⟨R_r M_r, M_r⟩ − ⟨C_r, M_r⟩ ) + lam Σ_g w_g ‖M_g‖
//
// M has one row per input and one column per output, so that a group (consecutive inputs) is one contiguous
// block of numbers. Several readers stand side by side in its columns: reader r owns the columns of M_r and
// has its own R_r (inputs × inputs); the norm of a group runs over all of them.
#pragma once

#include <chrono>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "pysolve/blas.hpp"

namespace pysolve {

struct Reader {
    const double* xx;  // R_r, inputs × inputs, symmetric positive semi-definite
    Index outputs;     // columns of M that belong to it
};

struct Problem {
    Index inputs, group_size, outputs;  // outputs: of all readers together
    std::vector<Reader> readers;
    const double* yx;       // C, inputs × outputs
    const double* weights;  // w_g > 0, one per group
    double constant = 0.0;  // ½ E‖y‖² where it is known: precision is relative to P plus this

    Index groups() const { return inputs / group_size; }
    Index block() const { return group_size * outputs; }  // numbers in one group
    Index size() const { return inputs * outputs; }
    // The columns of reader r in a matrix of `rows` rows with all outputs side by side.
    template <class T>
    MatrixView<T> part(T* matrix, Index rows, std::size_t r) const {
        Index before = 0;
        for (std::size_t i = 0; i < r; ++i) before += readers[i].outputs;
        return {matrix + before, rows, readers[r].outputs, outputs};
    }
    std::span<const double> group(const double* matrix, Index g) const {
        return {matrix + g * block(), static_cast<std::size_t>(block())};
    }
    std::span<double> group(double* matrix, Index g) const {
        return {matrix + g * block(), static_cast<std::size_t>(block())};
    }
};

struct Certificate {
    double objective = 0.0;
    double gap = std::numeric_limits<double>::infinity();
    double floor = 0.0;      // what rounding alone can leave of the gap
    double reference = 0.0;  // |P + constant|

    bool within(double tol) const;
};

// Bounds P(M) − min P from above by a feasible point of the dual.
//
// For N with ‖(R N − C)_g‖ ≤ lam w_g, −½⟨R N, N⟩ ≤ min P. N = s M + (1 − s) B with R B = C + E, where B
// solves least squares up to a measured E, and the largest s that the triangle inequality shows to be
// feasible. B is refined until ‖E_g‖ is small against the given lam.
class DualBound {
  public:
    DualBound(const Problem& problem, double lam);
    const Vector& scales() const { return scales_; }  // ‖B_g‖: where solvers without a start begin
    Certificate operator()(double lam, const Vector& M, const Vector& T) const;  // T = R M

  private:
    const Problem& problem_;
    Vector residual_, c_norms_;  // ‖E_g‖, ‖C_g‖
    Vector scales_;
    double energy_ = 0.0;  // ⟨R B, B⟩
    double length_ = 0.0;  // ‖B‖
};

// Per group: ‖G_g + lam w_g M_g/‖M_g‖‖ where M_g ≠ 0, otherwise (‖G_g‖ − lam w_g)₊, with G = T − C.
Vector kkt_residuals(const Problem& problem, double lam, const Vector& M, const Vector& T);

// A bound L ≥ λ_max(R_r) of every reader, at most a few per cent too large; proven by a Cholesky
// factorisation.
double lipschitz_bound(const Problem& problem);

struct Progress {
    Index iteration;
    double seconds, objective, gap;
};

// Called once an iteration, and again with the same progress during long ones. It may throw to abandon the
// solve.
using Monitor = std::function<void(const Progress&)>;

struct Stopping {
    double tol;
    Index max_iter;
};

struct Result {
    Vector M;
    Certificate certificate;
    Vector kkt;
    Index iterations = 0;
    std::vector<Progress> history;
};

// Keeps the history of a solve and says when to stop.
class Recorder {
  public:
    Recorder(const Stopping& stopping, const Monitor& monitor) : stopping_(stopping), monitor_(monitor) {}
    // True when the precision asked for is reached or the iterations are spent.
    bool operator()(const Certificate& certificate);
    // Whether recording this next would return true.
    bool would_stop(const Certificate& certificate) const {
        return certificate.within(stopping_.tol) || std::ssize(history_) >= stopping_.max_iter;
    }
    void poll() const {
        if (monitor_ && !history_.empty()) monitor_(history_.back());
    }
    Index iterations() const { return std::ssize(history_) - 1; }
    Result result(const Problem& problem, double lam, Vector M, const Vector& T,
                  const Certificate& certificate);

  private:
    Stopping stopping_;
    const Monitor& monitor_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
    std::vector<Progress> history_;
};

}  // namespace pysolve
