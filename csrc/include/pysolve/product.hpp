// T = R M for an M that changes little from call to call and is zero on many groups.
#pragma once

#include <vector>

#include "pysolve/problem.hpp"

namespace pysolve {

class Product {
  public:
    explicit Product(const Problem& problem) : problem_(problem) {}

    // T = R M. Only the rows of R of the non-zero groups are used; they stay packed, since the set of groups
    // changes rarely.
    void exact(const Vector& M, Vector& T);

    // T = R M up to single precision of what changed since the last exact product, at half its cost. Exact
    // now and then, where M has groups that were zero, and where the problem is too small to profit.
    void update(const Vector& M, Vector& T);
    bool is_exact() const { return updates_ == 0; }

  private:
    void find_active(const Vector& M);
    bool covered() const;
    void pack();
    void pack_single();
    Index packed_inputs() const;

    const Problem& problem_;
    std::vector<Index> active_, packed_;  // non-zero groups of the last M; groups whose rows are packed
    bool dense_ = false;                  // all rows are in use: R itself serves
    std::vector<Vector> rows_;            // per reader: rows of R of the packed groups
    Vector compact_;                      // the packed rows of M

    bool anchored_ = false;       // updates are wanted, so exact products are remembered
    Vector anchor_M_, anchor_T_;  // the last exact product
    int updates_ = 0;             // since then
    std::vector<std::vector<float>> single_rows_;
    std::vector<float> single_change_, single_T_;
};

}  // namespace pysolve
