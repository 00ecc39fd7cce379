// BLAS and LAPACK routines as function pointers, set once from outside (SciPy's own, in the Python package),
// and the few row-major operations that the solvers are written in.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace pysolve {

using Index = std::ptrdiff_t;
using Vector = std::vector<double>;

// Fortran interfaces, 32-bit integers, column-major.
struct Blas {
    void (*dgemm)(char*, char*, int*, int*, int*, double*, double*, int*, double*, int*, double*, double*,
                  int*);
    void (*sgemm)(char*, char*, int*, int*, int*, float*, float*, int*, float*, int*, float*, float*, int*);
    void (*dtrsm)(char*, char*, char*, char*, int*, int*, double*, double*, int*, double*, int*);
    void (*dtrmm)(char*, char*, char*, char*, int*, int*, double*, double*, int*, double*, int*);
    void (*dsyrk)(char*, char*, int*, int*, double*, double*, int*, double*, double*, int*);
    void (*dsymm)(char*, char*, int*, int*, double*, double*, int*, double*, int*, double*, double*, int*);
    void (*dsyr2k)(char*, char*, int*, int*, double*, double*, int*, double*, int*, double*, double*, int*);
    void (*dsymv)(char*, int*, double*, double*, int*, double*, int*, double*, double*, int*);
    void (*dpotrf)(char*, int*, double*, int*, int*);
    void (*dtrtri)(char*, char*, int*, double*, int*, int*);
    void (*dlauum)(char*, int*, double*, int*, int*);
    void (*dsterf)(int*, double*, double*, int*);
};

// The routines in use. Calling anything below before `set_blas` is undefined.
void set_blas(const Blas& routines);

// A view of a row-major matrix whose rows lie `stride` numbers apart.
template <class T>
struct MatrixView {
    T* data;
    Index rows, cols, stride;

    operator MatrixView<const T>() const { return {data, rows, cols, stride}; }
};

// out = Aᵀ B; a little faster where A is known to be symmetric.
void multiply_transposed(MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out,
                         bool symmetric = false);
void multiply_transposed(MatrixView<const float> A, MatrixView<const float> B, MatrixView<float> out,
                         bool symmetric = false);

// Upper triangle of out = A Aᵀ
void multiply_self(MatrixView<const double> A, MatrixView<double> out);

// out += factor · A Bᵀ. A few columns at a time go in pieces too short for BLAS to wake its threads: where
// hundreds of small products follow each other, waiting for a thread on a busy machine costs far more than it
// helps.
void add_product(double factor, MatrixView<const double> A, MatrixView<const double> B,
                 MatrixView<double> out);

// Upper triangle of out += factor · A Aᵀ, and of out += factor · (A Bᵀ + B Aᵀ)
void add_self(double factor, MatrixView<const double> A, MatrixView<double> out);
void add_cross(double factor, MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out);

// The same with Aᵀ A and Aᵀ B + Bᵀ A.
void add_self_transposed(double factor, MatrixView<const double> A, MatrixView<double> out);
void add_cross_transposed(double factor, MatrixView<const double> A, MatrixView<const double> B,
                          MatrixView<double> out);

// out = A B for a symmetric A given by its upper triangle.
void multiply_symmetric(MatrixView<const double> A, MatrixView<const double> B, MatrixView<double> out);

// y = A x for a symmetric A.
void multiply_symmetric(MatrixView<const double> A, const double* x, double* y);

// Factor the symmetric A in place; false where A is not positive definite (A is then spoilt).
[[nodiscard]] bool cholesky(MatrixView<double> A);

// X ← A⁻¹ X with the factor that `cholesky` left.
void cholesky_solve(MatrixView<const double> factor, MatrixView<double> X);

// out = L⁻¹ for A = L Lᵀ as `cholesky` left it; both triangles of out are written.
void invert_factor(MatrixView<const double> factor, MatrixView<double> out);

// Largest eigenvalue of the symmetric tridiagonal matrix with this diagonal and off-diagonal.
[[nodiscard]] double largest_tridiagonal_eigenvalue(Vector diagonal, Vector off_diagonal);

// Replaces the factor that `cholesky` left by the upper triangle of the inverse.
void invert_from_cholesky(MatrixView<double> factor);

[[nodiscard]] double dot(std::span<const double> a, std::span<const double> b);

}  // namespace pysolve
