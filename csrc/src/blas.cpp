#include "pysolve/blas.hpp"

#include <algorithm>
#include <stdexcept>

#include "pysolve/interrupt.hpp"
#include "pysolve/lanes.hpp"

namespace pysolve {
namespace {

Blas blas{};

int to_int(Index n) {
    return static_cast<int>(n);
}

// Multiplications of one call, some 50 ms: an interrupt must not wait for longer work.
constexpr double longest = 1e9;

// Rows of a product with so many multiplications a row that go into one call.
Index piece_of(Index rows, Index per_row) {
    check_interrupt();
    const double fit = longest / static_cast<double>(std::max(per_row, Index{1}));
    return fit >= static_cast<double>(rows) ? rows : std::max(static_cast<Index>(fit), Index{64});
}

// Row-major matrices are the column-major transposes of themselves: outᵀ = Bᵀ A.
template <class T, class Routine>
void gemm(Routine* routine, MatrixView<const T> A, MatrixView<const T> B, MatrixView<T> out, bool symmetric) {
    char no = 'N', yes = 'T';
    T one = 1, zero = 0;
    int m = to_int(B.cols), k = to_int(A.rows);
    int lda = to_int(A.stride), ldb = to_int(B.stride), ldo = to_int(out.stride);
    const Index piece = piece_of(A.cols, B.cols * A.rows);
    for (Index i = 0; i < A.cols; i += piece) {
        int n = to_int(std::min(piece, A.cols - i));
        check_interrupt();
        routine(&no, symmetric ? &no : &yes, &m, &n, &k, &one, const_cast<T*>(B.data), &ldb,
                const_cast<T*>(A.data + (symmetric ? i * A.stride : i)), &lda, &zero,
                out.data + i * out.stride, &ldo);
    }
}

// out += factor · op(A) B
void add_gemm(double factor, bool transposed, MatrixView<const double> A, MatrixView<const double> B,
              MatrixView<double> out) {
    char no = 'N', yes = 'T';
    int m = to_int(out.cols), k = to_int(B.rows);
    int lda = to_int(A.stride), ldb = to_int(B.stride), ldo = to_int(out.stride);
    double one = 1.0;
    const Index piece = piece_of(out.rows, out.cols * B.rows);
    for (Index i = 0; i < out.rows; i += piece) {
        int n = to_int(std::min(piece, out.rows - i));
        check_interrupt();
        blas.dgemm(&no, transposed ? &yes : &no, &m, &n, &k, &factor, const_cast<double*>(B.data), &ldb,
                   const_cast<double*>(A.data + (transposed ? i : i * A.stride)), &lda, &one,
                   out.data + i * out.stride, &ldo);
    }
}

void syrk(char transposed, Index depth, double factor, MatrixView<const double> A, MatrixView<double> out) {
    check_interrupt();
    char lower = 'L';
    int n = to_int(out.rows), k = to_int(depth), lda = to_int(A.stride), ldo = to_int(out.stride);
    double one = 1.0;
    blas.dsyrk(&lower, &transposed, &n, &k, &factor, const_cast<double*>(A.data), &lda, &one, out.data, &ldo);
}

void syr2k(char transposed, Index depth, double factor, MatrixView<const double> A,
           MatrixView<const double> B, MatrixView<double> out) {
    char lower = 'L';
    int n = to_int(out.rows), k = to_int(depth);
    int lda = to_int(A.stride), ldb = to_int(B.stride), ldo = to_int(out.stride);
    double one = 1.0;
    blas.dsyr2k(&lower, &transposed, &n, &k, &factor, const_cast<double*>(A.data), &lda,
                const_cast<double*>(B.data), &ldb, &one, out.data, &ldo);
}

// Triangles up to this size go to BLAS.
constexpr Index leaf = 64;

// Whether the triangle of n × depth by depth × n takes longer than an interrupt should wait.
bool too_long(Index n, Index depth) {
    return n > 2 * leaf &&
           0.5 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(depth) > longest;
}

Index split(Index n) {
    return (n / 2 + leaf / 2 - 1) / (leaf / 2) * (leaf / 2);
}

// An upper triangle in halves.
template <class T>
struct Halves {
    explicit Halves(MatrixView<T> U)
        : at(split(U.rows)),
          first{U.data, at, at, U.stride},
          corner{U.data + at, at, U.rows - at, U.stride},
          second{U.data + at * (U.stride + 1), U.rows - at, U.rows - at, U.stride} {}
    Index at;
    MatrixView<T> first, corner, second;
};

template <class T>
MatrixView<T> rows(MatrixView<T> X, Index first, Index last) {
    return {X.data + first * X.stride, last - first, X.cols, X.stride};
}

MatrixView<double> columns(MatrixView<double> X, Index first, Index last) {
    return {X.data + first, X.rows, last - first, X.stride};
}

void leaf_solve(char side, char transposed, MatrixView<const double> U, MatrixView<double> X) {
    check_interrupt();
    char lower = 'L', no = 'N';
    int m = to_int(X.cols), n = to_int(X.rows), ldu = to_int(U.stride), ldx = to_int(X.stride);
    double one = 1.0;
    blas.dtrsm(&side, &lower, &transposed, &no, &m, &n, &one, const_cast<double*>(U.data), &ldu, X.data,
               &ldx);
}

// X ← U⁻ᵀ X
void solve_transposed(MatrixView<const double> U, MatrixView<double> X) {
    if (U.rows <= leaf) return leaf_solve('R', 'T', U, X);
    const Halves<const double> half(U);
    const auto above = rows(X, 0, half.at), below = rows(X, half.at, X.rows);
    solve_transposed(half.first, above);
    add_gemm(-1.0, true, half.corner, above, below);
    solve_transposed(half.second, below);
}

// X ← U⁻¹ X
void solve(MatrixView<const double> U, MatrixView<double> X) {
    if (U.rows <= leaf) return leaf_solve('R', 'N', U, X);
    const Halves<const double> half(U);
    const auto above = rows(X, 0, half.at), below = rows(X, half.at, X.rows);
    solve(half.second, below);
    add_gemm(-1.0, false, half.corner, below, above);
    solve(half.first, above);
}

// X ← X U⁻¹
void solve_right(MatrixView<const double> U, MatrixView<double> X) {
    if (U.rows <= leaf) return leaf_solve('L', 'N', U, X);
    const Halves<const double> half(U);
    const auto left = columns(X, 0, half.at), right = columns(X, half.at, X.cols);
    solve_right(half.first, left);
    add_gemm(-1.0, false, left, half.corner, right);
    solve_right(half.second, right);
}

// X ← factor · op(U) X, or X op(U) on the right
void multiply_triangle(double factor, bool right, bool transposed, MatrixView<const double> U,
                       MatrixView<double> X) {
    check_interrupt();
    char side = right ? 'L' : 'R', lower = 'L', trans = transposed ? 'T' : 'N', no = 'N';
    int m = to_int(X.cols), n = to_int(X.rows), ldu = to_int(U.stride), ldx = to_int(X.stride);
    blas.dtrmm(&side, &lower, &trans, &no, &m, &n, &factor, const_cast<double*>(U.data), &ldu, X.data, &ldx);
}

// U ← U⁻¹
void invert_triangle(MatrixView<double> U) {
    if (U.rows <= leaf) {
        char lower = 'L', no = 'N';
        int n = to_int(U.rows), ldu = to_int(U.stride), info = 0;
        blas.dtrtri(&lower, &no, &n, U.data, &ldu, &info);
        return;
    }
    const Halves<double> half(U);
    solve_right(half.second, half.corner);
    invert_triangle(half.first);
    multiply_triangle(-1.0, false, false, half.first, half.corner);
    invert_triangle(half.second);
}

// U ← upper triangle of U Uᵀ
void square_triangle(MatrixView<double> U) {
    char lower = 'L';
    int ldu = to_int(U.stride);
    if (U.rows <= leaf) {
        int n = to_int(U.rows), info = 0;
        blas.dlauum(&lower, &n, U.data, &ldu, &info);
        return;
    }
    const Halves<double> half(U);
    square_triangle(half.first);
    add_self(1.0, half.corner, half.first);
    multiply_triangle(1.0, true, true, half.second, half.corner);
    square_triangle(half.second);
}

}  // namespace

void set_blas(const Blas& routines) {
    blas = routines;
}

void multiply_transposed(MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out,
                         bool symmetric) {
    gemm(blas.dgemm, A, B, out, symmetric);
}

void multiply_transposed(MatrixView<const float> A, MatrixView<const float> B, MatrixView<float> out,
                         bool symmetric) {
    gemm(blas.sgemm, A, B, out, symmetric);
}

void multiply_self(MatrixView<const double> A, MatrixView<double> out) {
    if (too_long(A.rows, A.cols)) {
        for (Index i = 0; i < out.rows; ++i) std::fill_n(out.data + i * out.stride + i, out.rows - i, 0.0);
        return add_self(1.0, A, out);
    }
    check_interrupt();
    char lower = 'L', yes = 'T';
    int n = to_int(A.rows), k = to_int(A.cols), lda = to_int(A.stride), ldo = to_int(out.stride);
    double one = 1.0, zero = 0.0;
    blas.dsyrk(&lower, &yes, &n, &k, &one, const_cast<double*>(A.data), &lda, &zero, out.data, &ldo);
}

void add_product(double factor, MatrixView<const double> A, MatrixView<const double> B,
                 MatrixView<double> out) {
    char no = 'N', yes = 'T';
    int m = to_int(B.rows), k = to_int(A.cols);
    int lda = to_int(A.stride), ldb = to_int(B.stride), ldo = to_int(out.stride);
    double one = 1.0;
    constexpr Index one_thread = 250'000, least = 64;  // multiplications; rows below which pieces cost speed
    Index piece = one_thread / std::max(B.rows * A.cols, Index{1});
    if (piece < least) piece = piece_of(A.rows, B.rows * A.cols);
    for (Index i = 0; i < A.rows; i += piece) {
        int n = to_int(std::min(piece, A.rows - i));
        check_interrupt();
        blas.dgemm(&yes, &no, &m, &n, &k, &factor, const_cast<double*>(B.data), &ldb,
                   const_cast<double*>(A.data + i * A.stride), &lda, &one, out.data + i * out.stride, &ldo);
    }
}

void add_self(double factor, MatrixView<const double> A, MatrixView<double> out) {
    if (!too_long(out.rows, A.cols)) return syrk('T', A.cols, factor, A, out);
    const Halves<double> half(out);
    const auto above = rows(A, 0, half.at), below = rows(A, half.at, A.rows);
    add_self(factor, above, half.first);
    add_product(factor, above, below, half.corner);
    add_self(factor, below, half.second);
}

void add_self_transposed(double factor, MatrixView<const double> A, MatrixView<double> out) {
    if (!too_long(out.rows, A.rows)) return syrk('N', A.rows, factor, A, out);
    const Halves<double> half(out);
    const MatrixView<const double> left{A.data, A.rows, half.at, A.stride},
        right{A.data + half.at, A.rows, A.cols - half.at, A.stride};
    add_self_transposed(factor, left, half.first);
    add_gemm(factor, true, left, right, half.corner);
    add_self_transposed(factor, right, half.second);
}

void add_cross(double factor, MatrixView<const double> A, MatrixView<const double> B,
               MatrixView<double> out) {
    check_interrupt();
    syr2k('T', A.cols, factor, A, B, out);
}

void add_cross_transposed(double factor, MatrixView<const double> A, MatrixView<const double> B,
                          MatrixView<double> out) {
    check_interrupt();
    syr2k('N', A.rows, factor, A, B, out);
}

// The off-diagonal halves as products, which are faster than BLAS's own routine.
void multiply_symmetric(MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out) {
    if (A.rows <= 4 * leaf) {
        char right = 'R', lower = 'L';
        int m = to_int(B.cols), n = to_int(A.rows);
        int lda = to_int(A.stride), ldb = to_int(B.stride), ldo = to_int(out.stride);
        double one = 1.0, zero = 0.0;
        blas.dsymm(&right, &lower, &m, &n, &one, const_cast<double*>(A.data), &lda,
                   const_cast<double*>(B.data), &ldb, &zero, out.data, &ldo);
        return;
    }
    const Halves<const double> half(A);
    const auto above = rows(B, 0, half.at), below = rows(B, half.at, B.rows);
    const auto upper = rows(out, 0, half.at), under = rows(out, half.at, out.rows);
    multiply_symmetric(half.first, above, upper);
    multiply_symmetric(half.second, below, under);
    add_gemm(1.0, false, half.corner, below, upper);
    add_gemm(1.0, true, half.corner, above, under);
}

void multiply_symmetric(MatrixView<const double> A, const double* x, double* y) {
    char lower = 'L';
    int n = to_int(A.rows), lda = to_int(A.stride), one_step = 1;
    double one = 1.0, zero = 0.0;
    blas.dsymv(&lower, &n, &one, const_cast<double*>(A.data), &lda, const_cast<double*>(x), &one_step, &zero,
               y, &one_step);
}

// Factors and triangular systems are split in halves, so that products do most of the work: they are twice as
// fast as BLAS's own triangular routines. Below, U is the upper triangle with A = Uᵀ U (LAPACK's lower one).

bool cholesky(MatrixView<double> A) {
    if (A.rows == 0) return true;  // LAPACK refuses a stride of 0
    if (A.rows <= leaf) {
        char lower = 'L';
        int n = to_int(A.rows), lda = to_int(A.stride), info = 0;
        blas.dpotrf(&lower, &n, A.data, &lda, &info);
        return info == 0;
    }
    const Halves<double> half(A);
    if (!cholesky(half.first)) return false;
    solve_transposed(half.first, half.corner);
    add_self_transposed(-1.0, half.corner, half.second);
    return cholesky(half.second);
}

void cholesky_solve(MatrixView<const double> factor, MatrixView<double> X) {
    solve_transposed(factor, X);
    solve(factor, X);
}

void invert_factor(MatrixView<const double> factor, MatrixView<double> out) {
    for (Index i = 0; i < out.rows; ++i)
        for (Index j = 0; j < out.cols; ++j) out.data[i * out.stride + j] = i == j ? 1.0 : 0.0;
    char left = 'L', lower = 'L', no = 'N', yes = 'T';
    int n = to_int(out.rows), lda = to_int(factor.stride), ldo = to_int(out.stride);
    double one = 1.0;
    blas.dtrsm(&left, &lower, &yes, &no, &n, &n, &one, const_cast<double*>(factor.data), &lda, out.data,
               &ldo);
}

void invert_from_cholesky(MatrixView<double> factor) {
    invert_triangle(factor);
    square_triangle(factor);
}

double largest_tridiagonal_eigenvalue(Vector diagonal, Vector off_diagonal) {
    int n = to_int(std::ssize(diagonal)), info = 0;
    blas.dsterf(&n, diagonal.data(), off_diagonal.data(), &info);
    if (info != 0) throw std::runtime_error("the tridiagonal eigenvalue iteration did not converge");
    return diagonal.back();
}

PYSOLVE_CLONES double dot(std::span<const double> a, std::span<const double> b) {
    const double *x = a.data(), *y = b.data();
    return sum(a.size(), [=](std::size_t i) { return x[i] * y[i]; });
}

}  // namespace pysolve
