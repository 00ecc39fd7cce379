#define PYSOLVE_LEVEL avx2_level
#define PYSOLVE_VECTOR_BYTES 32
#include "csr_loops.hpp"

namespace pysolve {

const Kernels<float> avx2_float = avx2_level::table<float>;
const Kernels<double> avx2_double = avx2_level::table<double>;

}  // namespace pysolve
