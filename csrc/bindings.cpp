// With blas_bindings.cpp, lock_bindings.cpp and sparse_bindings.cpp the only file that knows Python: shapes,
// dtypes, the lock, signals.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "lock.hpp"
#include "pysolve/alternate.hpp"
#include "pysolve/elimination.hpp"
#include "pysolve/fista.hpp"
#include "pysolve/interrupt.hpp"
#include "pysolve/newton.hpp"
#include "pysolve/obs.hpp"
#include "pysolve/problem.hpp"
#include "pysolve/prox.hpp"
#include "pysolve/variational.hpp"

namespace py = pybind11;
using namespace pysolve;

void load_blas();
void register_rounding(py::module_& m);
void register_sparse(py::module_& m);

namespace {

using Array = py::array_t<double, py::array::c_style>;

std::string shape_of(const Array& array) {
    std::string text;
    for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? " x " : "") + std::to_string(array.shape(i));
    return text;
}

void expect_shape(const char* name, const Array& array, std::initializer_list<Index> shape) {
    std::string wanted;
    for (Index n : shape) wanted += (wanted.empty() ? "" : " x ") + std::to_string(n);
    if (shape_of(array) != wanted)
        throw py::value_error(std::string(name) + " must be " + wanted + ", got " + shape_of(array));
}

// Owns references to the arrays that a core Problem points into.
struct BoundProblem {
    std::vector<Array> xx;
    Array yx, weights;
    Problem problem;

    BoundProblem(std::vector<Array> xx_, const std::vector<Index>& outputs, Array yx_, Index group_size,
                 Array weights_, double constant)
        : xx(std::move(xx_)), yx(std::move(yx_)), weights(std::move(weights_)) {
        if (yx.ndim() != 2) throw py::value_error("yx must be a matrix (inputs x outputs)");
        const Index inputs = yx.shape(0);
        if (group_size < 1 || inputs % group_size)
            throw py::value_error("group_size " + std::to_string(group_size) + " does not divide " +
                                  std::to_string(inputs) + " inputs");
        if (outputs.size() != xx.size()) throw py::value_error("one number of outputs a reader is needed");
        expect_shape("weights", weights, {inputs / group_size});
        problem = {inputs, group_size, yx.shape(1), {}, yx.data(), weights.data(), constant};
        Index total = 0;
        for (std::size_t r = 0; r < xx.size(); ++r) {
            expect_shape("xx", xx[r], {inputs, inputs});
            if (outputs[r] < 0) throw py::value_error("outputs must not be negative");
            problem.readers.push_back({xx[r].data(), outputs[r]});
            total += outputs[r];
        }
        if (total != problem.outputs)
            throw py::value_error("readers have " + std::to_string(total) + " outputs but yx has " +
                                  std::to_string(problem.outputs));
    }
};

Vector to_vector(const BoundProblem& bound, const Array& M) {
    expect_shape("M", M, {bound.problem.inputs, bound.problem.outputs});
    return Vector(M.data(), M.data() + M.size());
}

template <class... Shape>
Array to_array(const Vector& values, Shape... shape) {
    return Array({static_cast<py::ssize_t>(shape)...}, values.data());
}

// Runs `solve` without the lock; asks for Ctrl-C at most every 20 ms, so that the lock is rarely needed.
template <class Solve>
auto run(const py::object& callback, const Solve& solve) {
    Index reported = -1;
    const Monitor monitor = [&](const Progress& progress) {
        check_interrupt();
        if (callback.is_none() || progress.iteration <= reported) return;
        const Locked lock;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        callback(progress.iteration, progress.objective, progress.gap);
        reported = progress.iteration;
    };
    const Unlocked unlock;
    const Interruptible listening(check_signals);
    return solve(monitor);
}

void register_problem(py::module_& m) {
    py::class_<BoundProblem>(m, "Problem")
        .def(py::init<std::vector<Array>, std::vector<Index>, Array, Index, Array, double>(), py::kw_only(),
             py::arg("xx").noconvert(), py::arg("outputs"), py::arg("yx").noconvert(), py::arg("group_size"),
             py::arg("weights").noconvert(), py::arg("constant") = 0.0);

    py::class_<Result>(m, "Result")
        .def_property_readonly("kkt", [](const Result& r) { return to_array(r.kkt, r.kkt.size()); })
        .def_property_readonly("M", [](const Result& r) { return to_array(r.M, r.M.size()); })
        .def_property_readonly("objective", [](const Result& r) { return r.certificate.objective; })
        .def_property_readonly("gap", [](const Result& r) { return r.certificate.gap; })
        .def_property_readonly("floor", [](const Result& r) { return r.certificate.floor; })
        .def_readonly("iterations", &Result::iterations)
        .def_property_readonly("history", [](const Result& r) {
            Array rows({static_cast<py::ssize_t>(r.history.size()), py::ssize_t{3}});
            double* row = rows.mutable_data();
            for (const Progress& p : r.history) {
                *row++ = p.seconds;
                *row++ = p.objective;
                *row++ = p.gap;
            }
            return rows;
        });
}

void register_prox(py::module_& m) {
    m.def(
        "prox_group_lasso",
        [](const Array& V, Index group_size, const Array& thresholds) {
            if (V.ndim() != 2) throw py::value_error("V must be a matrix (inputs x outputs)");
            expect_shape("thresholds", thresholds, {V.shape(0) / std::max<Index>(group_size, 1)});
            Array out({V.shape(0), V.shape(1)}, V.data());
            const Index block = group_size * V.shape(1);
            for (Index g = 0; g < thresholds.size(); ++g)
                shrink_group({out.mutable_data() + g * block, static_cast<std::size_t>(block)},
                             thresholds.at(g));
            return out;
        },
        py::arg("V").noconvert(), py::arg("group_size"), py::arg("thresholds").noconvert());
}

void register_solvers(py::module_& m) {
    m.def(
        "fista",
        [](const BoundProblem& bound, double lam, const Array& M0, double tol, Index max_iter, bool momentum,
           bool restart, double q, const py::object& callback) {
            Vector start = to_vector(bound, M0);
            return run(callback, [&](const Monitor& monitor) {
                return fista(bound.problem, lam, std::move(start), {momentum, restart, q}, {tol, max_iter},
                             monitor);
            });
        },
        py::arg("problem"), py::arg("lam"), py::arg("M0").noconvert(), py::kw_only(), py::arg("tol"),
        py::arg("max_iter"), py::arg("momentum"), py::arg("restart"), py::arg("q"), py::arg("callback"));
    m.def(
        "alternate_minimization",
        [](const BoundProblem& bound, double lam, const Array& M0, double tol, Index max_iter, Index rounds,
           double epsilon, const py::object& callback) {
            Vector start = to_vector(bound, M0);
            return run(callback, [&](const Monitor& monitor) {
                return alternate_minimization(bound.problem, lam, std::move(start), {rounds, epsilon},
                                              {tol, max_iter}, monitor);
            });
        },
        py::arg("problem"), py::arg("lam"), py::arg("M0").noconvert(), py::kw_only(), py::arg("tol"),
        py::arg("max_iter"), py::arg("rounds"), py::arg("epsilon"), py::arg("callback"));
    m.def(
        "variational",
        [](const BoundProblem& bound, double lam, const Array& scales) {
            expect_shape("scales", scales, {bound.problem.groups()});
            Variational model(bound.problem, lam);
            if (!model.evaluate_all(Vector(scales.data(), scales.data() + scales.size())))
                throw py::value_error("S is not positive definite at these scales");
            const Vector ratios = model.ratios();
            Vector hessian;
            model.hessian(hessian);
            return py::make_tuple(model.phi(), to_array(ratios, ratios.size()),
                                  to_array(hessian, ratios.size(), ratios.size()));
        },
        py::arg("problem"), py::arg("lam"), py::arg("scales").noconvert());
    m.def(
        "newton",
        [](const BoundProblem& bound, double lam, const Array& M0, double tol, Index max_iter,
           const py::object& callback) {
            Vector start = to_vector(bound, M0);
            return run(callback, [&](const Monitor& monitor) {
                return newton(bound.problem, lam, std::move(start), {tol, max_iter}, monitor);
            });
        },
        py::arg("problem"), py::arg("lam"), py::arg("M0").noconvert(), py::kw_only(), py::arg("tol"),
        py::arg("max_iter"), py::arg("callback"));
}

std::vector<Index> checked_groups(const BoundProblem& bound, std::vector<Index> groups) {
    std::vector<bool> seen(static_cast<std::size_t>(bound.problem.groups()));
    for (Index g : groups) {
        if (g < 0 || g >= bound.problem.groups() || seen[static_cast<std::size_t>(g)])
            throw py::value_error("groups must lie within the problem, each once");
        seen[static_cast<std::size_t>(g)] = true;
    }
    return groups;
}

void expect_count(const BoundProblem& bound, Index count) {
    if (count < 0 || count > bound.problem.groups())
        throw py::value_error("a number of groups must lie within 0 and " +
                              std::to_string(bound.problem.groups()));
}

void register_selection(py::module_& m) {
    py::class_<Selection>(m, "Selection")
        .def_readonly("order", &Selection::order)
        .def_property_readonly("change",
                               [](const Selection& s) { return to_array(s.change, s.change.size()); })
        .def_readonly("ridge", &Selection::ridge)
        .def_readonly("largest_inverse", &Selection::largest_inverse);
    m.def(
        "eliminate",
        [](const BoundProblem& bound, const std::vector<double>& ridges, Index smallest) {
            expect_count(bound, smallest);
            return run(py::none(), [&](const Monitor& monitor) {
                return eliminate(bound.problem, ridges, smallest, monitor);
            });
        },
        py::arg("problem"), py::kw_only(), py::arg("ridges"), py::arg("smallest"));
    m.def(
        "forward",
        [](const BoundProblem& bound, double ridge, Index count) {
            expect_count(bound, count);
            return run(py::none(),
                       [&](const Monitor& monitor) { return forward(bound.problem, ridge, count, monitor); });
        },
        py::arg("problem"), py::kw_only(), py::arg("ridge"), py::arg("count"));
    m.def(
        "swap_groups",
        [](const BoundProblem& bound, std::vector<Index> keep, double ridge, Index max_swaps, Index depth) {
            keep = checked_groups(bound, std::move(keep));
            return run(py::none(), [&](const Monitor& monitor) {
                return swap_groups(bound.problem, ridge, std::move(keep), {max_swaps, depth}, monitor);
            });
        },
        py::arg("problem"), py::arg("keep"), py::kw_only(), py::arg("ridge"), py::arg("max_swaps"),
        py::arg("depth"));
}

void register_checks(py::module_& m) {
    m.def(
        "cholesky",
        [](Array matrix) {
            if (matrix.ndim() != 2) throw py::value_error("the matrix must be square");
            const Index n = matrix.shape(0);
            expect_shape("the matrix", matrix, {n, n});
            const MatrixView<double> view{matrix.mutable_data(), n, n, n};
            const Unlocked unlock;
            const Interruptible listening(check_signals);
            return cholesky(view);
        },
        py::arg("matrix").noconvert());
}

void register_obs(py::module_& m) {
    m.def(
        "eliminate_rows",
        [](const Array& inverse, const Array& W) {
            if (W.ndim() != 2) throw py::value_error("W must be a matrix (rows x inputs)");
            const Index h = W.shape(0), d = W.shape(1);
            expect_shape("inverse", inverse, {d, d});
            const RowPaths paths = run(py::none(), [&](const Monitor& monitor) {
                return eliminate_rows({inverse.data(), d, d, d}, {W.data(), h, d, d}, monitor);
            });
            return py::make_tuple(py::array_t<std::int32_t>({h, d}, paths.order.data()),
                                  to_array(paths.change, h, d));
        },
        py::arg("inverse").noconvert(), py::arg("W").noconvert());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The compiled core of pysolve: see csrc/include/pysolve for what each routine solves.";
    register_lock();
    load_blas();
    register_problem(m);
    register_prox(m);
    register_solvers(m);
    register_selection(m);
    register_checks(m);
    register_obs(m);
    register_rounding(m);
    register_sparse(m);
}
