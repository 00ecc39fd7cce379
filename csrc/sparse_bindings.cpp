// Sparse matrices and threads for Python: shapes, dtypes, the lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>

#include "lock.hpp"
#include "pysolve/csr.hpp"
#include "pysolve/interrupt.hpp"
#include "pysolve/threads.hpp"

namespace py = pybind11;
using namespace pysolve;

namespace {

const std::map<std::string, Level> levels{
    {"plain", Level::plain}, {"avx2", Level::avx2}, {"avx512", Level::avx512}};

template <class T>
using Matrix = py::array_t<T, 0>;

template <class T>
std::string shape_of(const Matrix<T>& array) {
    std::string text;
    for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? " x " : "") + std::to_string(array.shape(i));
    return text;
}

// Rows may be apart, the numbers of one must not be.
template <class T>
Index row_stride(const char* name, const Matrix<T>& array, Index rows, Index columns) {
    if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != columns)
        throw py::value_error(std::string(name) + " must be " + std::to_string(rows) + " x " +
                              std::to_string(columns) + ", got " + shape_of(array));
    if (!array.size()) return columns;
    const auto size = static_cast<py::ssize_t>(sizeof(T));
    // NumPy leaves any number as the stride of a dimension of one.
    const py::ssize_t stride = rows > 1 ? array.strides(0) : columns * size;
    if ((columns > 1 && array.strides(1) != size) || stride % size || stride < 0)
        throw py::value_error(std::string(name) + " must have contiguous rows");
    return stride / size;
}

template <class T>
Dense<const T> input(const char* name, const Matrix<T>& array, bool batch_major, Index features,
                     Index batch) {
    const Index stride =
        row_stride(name, array, batch_major ? batch : features, batch_major ? features : batch);
    return {array.data(), stride, batch_major ? Layout::batch : Layout::feature};
}

template <class T, class I>
Sparse<T> from_arrays(Index rows, Index columns, const py::array& indptr, const py::array& indices,
                      const py::array_t<T, py::array::c_style>& values, Index block) {
    const auto starts = py::array_t<I, py::array::c_style>::ensure(indptr);
    const auto positions = py::array_t<I, py::array::c_style>::ensure(indices);
    if (!starts || !positions) throw py::type_error("indptr and indices must hold integers");
    const Unlocked unlock;
    const Interruptible listening(check_signals);
    return prepare(CsrView<T, I>{rows, columns, starts.data(), positions.data(), values.data()},
                   values.size(), block);
}

template <class T>
Sparse<T> prepared(Index rows, Index columns, const py::array& indptr, const py::array& indices,
                   const py::array_t<T, py::array::c_style>& values, Index block) {
    if (indptr.ndim() != 1 || indices.ndim() != 1 || values.ndim() != 1)
        throw py::value_error("indptr, indices and data must have one dimension each");
    if (indptr.size() != rows + 1)
        throw py::value_error("indptr must have rows + 1 = " + std::to_string(rows + 1) + " entries, got " +
                              std::to_string(indptr.size()));
    if (indices.size() != values.size())
        throw py::value_error("indices and data must be equally long, got " + std::to_string(indices.size()) +
                              " and " + std::to_string(values.size()));
    const bool narrow = py::isinstance<py::array_t<std::int32_t>>(indptr) &&
                        py::isinstance<py::array_t<std::int32_t>>(indices);
    return narrow ? from_arrays<T, std::int32_t>(rows, columns, indptr, indices, values, block)
                  : from_arrays<T, std::int64_t>(rows, columns, indptr, indices, values, block);
}

template <class T>
void multiply_into(const Sparse<T>& A, const Matrix<T>& x, bool batch_major, Matrix<T> out,
                   const std::optional<py::array_t<T, py::array::c_style>>& bias, bool relu, int threads) {
    if (x.ndim() != 2) throw py::value_error("the dense matrix must have two dimensions, got " + shape_of(x));
    const Index batch = x.shape(batch_major ? 0 : 1);
    const Dense<const T> X = input("the dense matrix", x, batch_major, A.columns, batch);
    const Dense<const T> Y = input<T>("out", out, batch_major, A.rows, batch);
    if (bias && (bias->ndim() != 1 || bias->size() != A.rows))
        throw py::value_error("bias must have " + std::to_string(A.rows) + " entries, got " +
                              std::to_string(bias->size()));
    const Dense<T> target{out.mutable_data(), Y.stride, Y.layout};
    const T* added = bias ? bias->data() : nullptr;
    const Unlocked unlock;
    const Interruptible listening(check_signals);
    multiply(A, X, batch, target, added, relu, threads);
}

template <class T>
py::array_t<T> gradient_by_values(const Sparse<T>& A, const Matrix<T>& g, const Matrix<T>& x,
                                  bool batch_major, int threads) {
    if (x.ndim() != 2) throw py::value_error("the inputs must have two dimensions, got " + shape_of(x));
    const Index batch = x.shape(batch_major ? 0 : 1);
    const Dense<const T> X = input("the inputs", x, batch_major, A.columns, batch);
    const Dense<const T> G = input("the gradient", g, batch_major, A.rows, batch);
    py::array_t<T> out(A.entries);
    T* target = out.mutable_data();
    {
        const Unlocked unlock;
        const Interruptible listening(check_signals);
        value_gradient(A, G, X, batch, target, threads);
    }
    return out;
}

template <class T>
void register_for(py::module_& m, const char* name) {
    using Self = Sparse<T>;
    py::class_<Self>(m, name)
        .def(py::init(&prepared<T>), py::arg("rows"), py::arg("columns"), py::arg("indptr"),
             py::arg("indices"), py::arg("values").noconvert(), py::kw_only(), py::arg("block") = 0)
        .def_readonly("rows", &Self::rows)
        .def_readonly("columns", &Self::columns)
        .def_readonly("block", &Self::block)
        .def_property_readonly(
            "nbytes",
            [](const Self& A) {
                return A.values.size() * sizeof(T) + A.indices.size() * sizeof(std::uint16_t) +
                       A.bounds.size() * sizeof(Index) + A.masks.size() * sizeof(std::uint64_t);
            })
        .def_property_readonly(
            "values",
            [](const py::object& self) {
                auto& A = self.cast<Self&>();
                return py::array_t<T>(A.entries, A.values.data(), self);
            },
            "The values themselves, row by row and in each by columns; what is written there counts.")
        .def("indptr",
             [](const Self& A) {
                 py::array_t<Index> out(A.rows + 1);
                 std::copy_n(A.bound(0), A.rows, out.mutable_data());
                 out.mutable_data()[A.rows] = A.entries;
                 return out;
             })
        .def("indices",
             [](const Self& A) {
                 py::array_t<std::int32_t> out(A.entries);
                 std::int32_t* column = out.mutable_data();
                 for (Index r = 0; r < A.rows; ++r)
                     for (Index b = 0; b < A.blocks(); ++b)
                         for (Index i = A.bound(b)[r]; i < A.bound(b + 1)[r]; ++i)
                             column[i] = static_cast<std::int32_t>(A.origin(b)) +
                                         A.indices[static_cast<std::size_t>(i)];
                 return out;
             })
        .def("multiply", &multiply_into<T>, py::arg("x").noconvert(), py::arg("batch_major"),
             py::arg("out").noconvert(), py::arg("bias").noconvert(), py::arg("relu"), py::arg("threads"))
        .def("value_gradient", &gradient_by_values<T>, py::arg("g").noconvert(), py::arg("x").noconvert(),
             py::arg("batch_major"), py::arg("threads"));
}

}  // namespace

void register_sparse(py::module_& m) {
    register_for<float>(m, "SparseFloat32");
    register_for<double>(m, "SparseFloat64");
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, py::arg("threads"));
    m.def("levels", [] {
        std::vector<std::string> names;
        for (const auto& [name, level] : levels)
            if (supported(level)) names.push_back(name);
        return names;
    });
    m.def("level", [] {
        for (const auto& [name, level] : levels)
            if (level == pysolve::level()) return name;
        return std::string();
    });
    m.def("set_level", [](const std::string& name) {
        const auto found = levels.find(name);
        if (found == levels.end() || !supported(found->second))
            throw py::value_error("this processor has no level " + name);
        set_level(found->second);
    });
}
