// Rounding of weights to allowed values, one input after the other, each after compensating the errors so
// far.
#pragma once

#include <cstdint>
#include <vector>

#include "pysolve/blas.hpp"

namespace pysolve {

// The values that weights may take, which codes 0, 1, … or those of a grid stand for.
class Levels {
  public:
    virtual ~Levels() = default;

    // For weights of rows `first`, … of one input, the code of least ½ curvature (value − wanted)² + price,
    // and that value.
    virtual void nearest(const double* wanted, const double* curvature, Index first, Index count, Index input,
                         std::int64_t* codes, double* values) const = 0;

    // Code and value of zero.
    virtual std::int64_t zero_code(Index row, Index input) const = 0;
    virtual double zero() const { return 0.0; }
};

// scale · (code − zero) for codes low … high; scales and zeros are rows × parts, for `group` inputs each.
class GridLevels final : public Levels {
  public:
    GridLevels(MatrixView<const double> scales, MatrixView<const double> zeros, double low, double high,
               Index group);
    void nearest(const double* wanted, const double* curvature, Index first, Index count, Index input,
                 std::int64_t* codes, double* values) const override;
    std::int64_t zero_code(Index row, Index input) const override;

  private:
    Index rows_, group_;
    double low_, high_;
    Vector scales_, zeros_;  // parts × rows
};

// Shared values; code 0 is that of zero where weights are masked. The lower of two that are as near.
class SharedLevels final : public Levels {
  public:
    explicit SharedLevels(Vector values);
    void nearest(const double* wanted, const double* curvature, Index first, Index count, Index input,
                 std::int64_t* codes, double* values) const override;
    std::int64_t zero_code(Index, Index) const override { return 0; }
    double zero() const override { return values_.front(); }

  private:
    Vector values_, middles_;
    std::vector<std::int64_t> ascending_;
};

// Shared values that each cost `lam` times so many bits.
class PricedLevels final : public Levels {
  public:
    PricedLevels(Vector values, Vector bits, double lam);
    void nearest(const double* wanted, const double* curvature, Index first, Index count, Index input,
                 std::int64_t* codes, double* values) const override;
    std::int64_t zero_code(Index, Index) const override { return 0; }
    double zero() const override { return values_.front(); }

  private:
    Vector values_, bits_, halves_;
    double lam_;
};

// One block of inputs, in the order in which they are rounded; rows of all matrices are inputs, columns
// outputs.
struct RoundingBlock {
    MatrixView<const double> base;  // what input k's weights are without a change,
    MatrixView<double> slope;       // of which slope_k / divisor_k is taken off first;
    const double* divisor;
    const double* power;  // curvature of output i's weight of input k: power_k · outputs_i
    const double* outputs;
    MatrixView<const double> coupling;  // slope_m += coupling_km · change_k for the inputs m after k
    const std::int64_t* inputs;         // numbers of the inputs among all
    const bool* mask;                   // inputs × outputs, false where a weight is zero; or null
    std::int64_t* codes;                // inputs × outputs
    MatrixView<double> change;          // value − base
};

void round_block(const Levels& levels, const RoundingBlock& block);

}  // namespace pysolve
