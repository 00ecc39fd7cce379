#include "pysolve/product.hpp"

#include <algorithm>
#include <utility>

#include "pysolve/lanes.hpp"

namespace pysolve {
namespace {

// Below this many multiplications a product is too short for the conversions to pay.
constexpr Index worth_single = Index{1} << 21;
// The error of an update is a share of what changed since the last exact product: do not let that grow.
constexpr int max_updates = 50;

bool is_zero(std::span<const double> block) {
    return std::ranges::all_of(block, [](double value) { return value == 0.0; });
}

PYSOLVE_CLONES void narrow_difference(const double* a, const double* b, float* out, Index n) {
    for (Index i = 0; i < n; ++i) out[i] = static_cast<float>(a[i] - b[i]);
}

PYSOLVE_CLONES void widen_sum(const double* a, const float* b, double* out, Index n) {
    for (Index i = 0; i < n; ++i) out[i] = a[i] + static_cast<double>(b[i]);
}

}  // namespace

void Product::exact(const Vector& M, Vector& T) {
    const Problem& p = problem_;
    find_active(M);
    const Index used = dense_ ? p.groups() : std::ssize(packed_);
    if (!covered() || 5 * std::ssize(active_) < 4 * used) pack();

    T.resize(static_cast<std::size_t>(p.size()));
    const Index rows = packed_inputs();
    if (rows == 0) std::ranges::fill(T, 0.0);
    const double* source = M.data();
    if (!dense_) {
        compact_.resize(static_cast<std::size_t>(rows * p.outputs));
        double* destination = compact_.data();
        for (Index g : packed_) destination = std::ranges::copy(p.group(M.data(), g), destination).out;
        source = compact_.data();
    }
    for (std::size_t r = 0; r < p.readers.size() && rows > 0; ++r) {
        const double* R = dense_ ? p.readers[r].xx : rows_[r].data();
        multiply_transposed({R, rows, p.inputs, p.inputs}, p.part(source, rows, r),
                            p.part(T.data(), p.inputs, r), dense_);
    }
    if (anchored_) {
        anchor_M_ = M;
        anchor_T_ = T;
    }
    updates_ = 0;
}

void Product::update(const Vector& M, Vector& T) {
    const Problem& p = problem_;
    find_active(M);
    const Index rows = packed_inputs();
    const bool first = !anchored_;
    anchored_ = rows * p.size() >= worth_single;
    if (first || !anchored_ || updates_ >= max_updates || !covered()) {
        exact(M, T);
        return;
    }
    ++updates_;
    if (single_rows_.empty()) pack_single();
    single_change_.resize(static_cast<std::size_t>(rows * p.outputs));
    single_T_.resize(static_cast<std::size_t>(p.size()));
    if (dense_) narrow_difference(M.data(), anchor_M_.data(), single_change_.data(), p.size());
    for (std::size_t k = 0; k < packed_.size() && !dense_; ++k) {
        const Index from = packed_[k] * p.block(), to = static_cast<Index>(k) * p.block();
        narrow_difference(M.data() + from, anchor_M_.data() + from, single_change_.data() + to, p.block());
    }
    for (std::size_t r = 0; r < p.readers.size(); ++r)
        multiply_transposed({single_rows_[r].data(), rows, p.inputs, p.inputs},
                            p.part(std::as_const(single_change_).data(), rows, r),
                            p.part(single_T_.data(), p.inputs, r), dense_);
    widen_sum(anchor_T_.data(), single_T_.data(), T.data(), p.size());
}

void Product::find_active(const Vector& M) {
    active_.clear();
    for (Index g = 0; g < problem_.groups(); ++g)
        if (!is_zero(problem_.group(M.data(), g))) active_.push_back(g);
}

bool Product::covered() const {
    return dense_ || std::ranges::includes(packed_, active_);
}

Index Product::packed_inputs() const {
    return dense_ ? problem_.inputs : std::ssize(packed_) * problem_.group_size;
}

void Product::pack() {
    const Problem& p = problem_;
    dense_ = 10 * std::ssize(active_) > 9 * p.groups();
    packed_ = active_;
    rows_.assign(p.readers.size(), {});
    single_rows_.clear();
    if (dense_) return;
    const Index stride = p.group_size * p.inputs;
    for (std::size_t r = 0; r < p.readers.size(); ++r) {
        rows_[r].reserve(packed_.size() * static_cast<std::size_t>(stride));
        for (Index g : packed_) {
            const double* first = p.readers[r].xx + g * stride;
            rows_[r].insert(rows_[r].end(), first, first + stride);
        }
    }
}

void Product::pack_single() {
    const Problem& p = problem_;
    for (std::size_t r = 0; r < p.readers.size(); ++r) {
        const double* first = dense_ ? p.readers[r].xx : rows_[r].data();
        single_rows_.emplace_back(first, first + packed_inputs() * p.inputs);
    }
}

}  // namespace pysolve
