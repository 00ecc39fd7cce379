#define PYSOLVE_LEVEL plain_level
#define PYSOLVE_VECTOR_BYTES 16
#include "csr_loops.hpp"

namespace pysolve {

const Kernels<float> plain_float = plain_level::table<float>;
const Kernels<double> plain_double = plain_level::table<double>;

}  // namespace pysolve
