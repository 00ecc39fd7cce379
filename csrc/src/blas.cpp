#include "pysolve/blas.hpp"

#include <stdexcept>

#include "pysolve/lanes.hpp"

namespace pysolve {
namespace {

Blas blas{};

int to_int(Index n) {
    return static_cast<int>(n);
}

}  // namespace

void set_blas(const Blas& routines) {
    blas = routines;
}

// Row-major matrices are the column-major transposes of themselves: outᵀ = Bᵀ A.
void multiply_transposed(MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out) {
    char no = 'N', yes = 'T';
    double one = 1.0, zero = 0.0;
    int m = to_int(B.cols), n = to_int(A.cols), k = to_int(A.rows);
    int lda = to_int(A.stride), ldb = to_int(B.stride), ldo = to_int(out.stride);
    blas.dgemm(&no, &yes, &m, &n, &k, &one, const_cast<double*>(B.data), &ldb, const_cast<double*>(A.data),
               &lda, &zero, out.data, &ldo);
}

void multiply_transposed(MatrixView<const float> A, MatrixView<const float> B, MatrixView<float> out) {
    char no = 'N', yes = 'T';
    int m = to_int(B.cols), n = to_int(A.cols), k = to_int(A.rows);
    int lda = to_int(A.stride), ldb = to_int(B.stride), ldo = to_int(out.stride);
    float one = 1.0F, zero = 0.0F;
    blas.sgemm(&no, &yes, &m, &n, &k, &one, const_cast<float*>(B.data), &ldb, const_cast<float*>(A.data),
               &lda, &zero, out.data, &ldo);
}

void multiply_self(MatrixView<const double> A, MatrixView<double> out) {
    char lower = 'L', yes = 'T';
    int n = to_int(A.rows), k = to_int(A.cols), lda = to_int(A.stride), ldo = to_int(out.stride);
    double one = 1.0, zero = 0.0;
    blas.dsyrk(&lower, &yes, &n, &k, &one, const_cast<double*>(A.data), &lda, &zero, out.data, &ldo);
}

void multiply_symmetric(MatrixView<const double> A, const double* x, double* y) {
    char lower = 'L';
    int n = to_int(A.rows), lda = to_int(A.stride), one_step = 1;
    double one = 1.0, zero = 0.0;
    blas.dsymv(&lower, &n, &one, const_cast<double*>(A.data), &lda, const_cast<double*>(x), &one_step, &zero,
               y, &one_step);
}

bool cholesky(MatrixView<double> A) {
    char lower = 'L';
    int n = to_int(A.rows), lda = to_int(A.stride), info = 0;
    blas.dpotrf(&lower, &n, A.data, &lda, &info);
    return info == 0;
}

void cholesky_solve(MatrixView<const double> factor, MatrixView<double> X) {
    char right = 'R', lower = 'L', no = 'N', yes = 'T';
    int m = to_int(X.cols), n = to_int(X.rows), lda = to_int(factor.stride), ldx = to_int(X.stride);
    double one = 1.0;
    double* L = const_cast<double*>(factor.data);
    blas.dtrsm(&right, &lower, &yes, &no, &m, &n, &one, L, &lda, X.data, &ldx);
    blas.dtrsm(&right, &lower, &no, &no, &m, &n, &one, L, &lda, X.data, &ldx);
}

void invert_from_cholesky(MatrixView<double> factor) {
    char lower = 'L';
    int n = to_int(factor.rows), ld = to_int(factor.stride), info = 0;
    blas.dpotri(&lower, &n, factor.data, &ld, &info);
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
