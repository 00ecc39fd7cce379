// BLAS and LAPACK as SciPy's Cython interface offers them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "pysolve/blas.hpp"

namespace py = pybind11;
using namespace pysolve;

namespace {

// The routine behind a capsule of SciPy's Cython interface. Its name is its C signature: refuse any other
// kind.
template <class Function>
void load(Function*& routine, const py::dict& capsules, const char* name, const std::string& arguments) {
    const auto capsule = py::reinterpret_borrow<py::capsule>(capsules[name]);
    std::string letters;
    const std::string signature = capsule.name() ? capsule.name() : "";
    for (std::size_t i = signature.find('('); i != std::string::npos && i < signature.find(')');) {
        const std::size_t next = std::min(signature.find(',', i + 1), signature.find(')', i + 1));
        const std::string argument = signature.substr(i + 1, next - i - 1);
        const bool single =
            argument.find("_s *") != std::string::npos || argument.find("float *") != std::string::npos;
        if (single)
            letters += 's';
        else if (argument.find("char *") != std::string::npos)
            letters += 'c';
        else if (argument.find("int *") != std::string::npos)
            letters += 'i';
        else if (argument.find("_d *") != std::string::npos || argument.find("double *") != std::string::npos)
            letters += 'd';
        else
            letters += '?';
        i = next;
    }
    if (letters != arguments)
        throw py::import_error(std::string("SciPy's ") + name + " has the signature " + signature +
                               ", which pysolve does not know; install a SciPy with 32-bit BLAS integers");
    routine = reinterpret_cast<Function*>(capsule.get_pointer<void>());
}

}  // namespace

void load_blas() {
    const py::dict blas = py::module_::import("scipy.linalg.cython_blas").attr("__pyx_capi__");
    const py::dict lapack = py::module_::import("scipy.linalg.cython_lapack").attr("__pyx_capi__");
    Blas routines{};
    load(routines.dgemm, blas, "dgemm", "cciiiddididdi");
    load(routines.sgemm, blas, "sgemm", "cciiissisissi");
    load(routines.dtrsm, blas, "dtrsm", "cccciiddidi");
    load(routines.dtrmm, blas, "dtrmm", "cccciiddidi");
    load(routines.dsyrk, blas, "dsyrk", "cciiddiddi");
    load(routines.dsymm, blas, "dsymm", "cciiddididdi");
    load(routines.dsyr2k, blas, "dsyr2k", "cciiddididdi");
    load(routines.dsymv, blas, "dsymv", "ciddididdi");
    load(routines.dpotrf, lapack, "dpotrf", "cidii");
    load(routines.dtrtri, lapack, "dtrtri", "ccidii");
    load(routines.dlauum, lapack, "dlauum", "cidii");
    load(routines.dsterf, lapack, "dsterf", "iddi");
    set_blas(routines);
}
