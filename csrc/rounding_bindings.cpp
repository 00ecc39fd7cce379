// Rounding for Python: shapes, the lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "lock.hpp"
#include "pysolve/rounding.hpp"

namespace py = pybind11;
using namespace pysolve;

namespace {

using Matrix = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Codes = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using Mask = py::array_t<bool, py::array::c_style | py::array::forcecast>;

MatrixView<const double> view(const Matrix& array, py::ssize_t rows, py::ssize_t columns, const char* name) {
    if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != columns)
        throw py::value_error(std::string(name) + " must be " + std::to_string(rows) + " x " +
                              std::to_string(columns));
    return {array.data(), rows, columns, columns};
}

void check(py::ssize_t found, py::ssize_t wanted, const char* name) {
    if (found != wanted)
        throw py::value_error(std::string(name) + " must have " + std::to_string(wanted) + " entries, got " +
                              std::to_string(found));
}

py::tuple rounded(const Levels& levels, const Matrix& base, const Matrix& slope, const Matrix& divisor,
                  const Matrix& power, const Matrix& outputs, const Matrix& coupling, const Codes& inputs,
                  const std::optional<Mask>& mask) {
    if (base.ndim() != 2) throw py::value_error("base must be inputs x outputs");
    const py::ssize_t n = base.shape(0), h = base.shape(1);
    Vector moving(view(slope, n, h, "slope").data, slope.data() + n * h);
    check(divisor.size(), n, "divisor");
    check(power.size(), n, "power");
    check(outputs.size(), h, "outputs");
    check(inputs.size(), n, "inputs");
    if (mask) check(mask->size(), n * h, "mask");
    Codes codes({n, h});
    Matrix change({n, h});
    const RoundingBlock block{view(base, n, h, "base"),
                              {moving.data(), n, h, h},
                              divisor.data(),
                              power.data(),
                              outputs.data(),
                              view(coupling, n, n, "coupling"),
                              inputs.data(),
                              mask ? mask->data() : nullptr,
                              codes.mutable_data(),
                              {change.mutable_data(), n, h, h}};
    {
        const Unlocked unlock;
        round_block(levels, block);
    }
    return py::make_tuple(std::move(codes), std::move(change));
}

}  // namespace

void register_rounding(py::module_& m) {
    py::class_<Levels>(m, "Levels")
        .def("round_block", &rounded, py::kw_only(), py::arg("base"), py::arg("slope"), py::arg("divisor"),
             py::arg("power"), py::arg("outputs"), py::arg("coupling"), py::arg("inputs"), py::arg("mask"));
    py::class_<GridLevels, Levels>(m, "GridLevels")
        .def(py::init([](const Matrix& scales, const Matrix& zeros, double low, double high, Index group) {
                 if (scales.ndim() != 2) throw py::value_error("scales must be rows x groups");
                 const auto rows = scales.shape(0), parts = scales.shape(1);
                 return GridLevels(view(scales, rows, parts, "scales"), view(zeros, rows, parts, "zeros"),
                                   low, high, group);
             }),
             py::kw_only(), py::arg("scales"), py::arg("zeros"), py::arg("low"), py::arg("high"),
             py::arg("group"));
    py::class_<SharedLevels, Levels>(m, "SharedLevels").def(py::init<Vector>(), py::arg("values"));
    py::class_<PricedLevels, Levels>(m, "PricedLevels")
        .def(py::init([](Vector values, Vector bits, double lam) {
                 check(std::ssize(bits), std::ssize(values), "bits");
                 return PricedLevels(std::move(values), std::move(bits), lam);
             }),
             py::kw_only(), py::arg("values"), py::arg("bits"), py::arg("lam"));
}
