"""Layers whose weight is a sparse matrix: for inference, and for fine-tuning the entries that are left."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, unfold

from pysolve.errors import PysolveError
from pysolve.layer.sparse_matrix import Layout, SparseMatrix
from pysolve.nn.layers.base import Context, Geometry, TwoWay, answers_of, dense_layer, seen


class _Product(torch.autograd.Function):
    """Y = X Aᵀ + b or A X + b for a layer's matrix A, whose gradient goes to X, A's entries and b."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseWeight, layout: Layout
    ) -> Tensor:
        # The values only so that changing them before the backward pass is an error, as elsewhere in torch.
        ctx.save_for_backward(x, values)
        ctx.layer, ctx.layout = layer, layout
        return layer.product(x, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, _), layer, layout = ctx.saved_tensors, ctx.layer, ctx.layout
        matrix, g, threads = layer.matrix(), gradient.numpy(), torch.get_num_threads()
        by_x = by_values = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = torch.from_numpy(layer.flipped().matmul(g, layout, threads=threads))
        if ctx.needs_input_grad[1]:
            by_values = torch.from_numpy(matrix.value_gradient(g, x.numpy(), layout, threads=threads))
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum(0 if layout == "batch" else 1)
        return by_x, by_values, by_bias, None, None


class SparseWeight(TwoWay):
    """An (h, d) matrix whose entries are a parameter, and a bias.

    The matrix that is multiplied shares its memory with ``values``, so any change to them counts. A state
    dict of another number of entries may be loaded. A trace follows the dense weight, made of the entries.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    indptr: Tensor
    indices: Tensor

    def __init__(self, matrix: csr_array, bias: Tensor | None, dense: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.shape: tuple[int, int] = matrix.shape
        self.dense_shape: tuple[int, ...] = dense or matrix.shape
        self._matrix: SparseMatrix | None = None
        self._flipped: tuple[SparseMatrix, npt.NDArray[np.int64]] | None = None
        prepared = SparseMatrix.from_csr(matrix)
        clean = prepared.to_csr()
        self.values = nn.Parameter(torch.from_numpy(clean.data))
        self.register_buffer("indptr", torch.from_numpy(clean.indptr.astype(np.int64)))
        self.register_buffer("indices", torch.from_numpy(clean.indices.astype(np.int32)))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def density(self) -> float:
        """Share of the places that have an entry."""
        return self.values.numel() / max(1, self.shape[0] * self.shape[1])

    @property
    def weight(self) -> Tensor:
        """A tensor without values, for code that asks a layer for the type or the shape of its weight.

        On the meta device nothing can be computed from it.
        """
        return seen(torch.empty(self.dense_shape, dtype=self.values.dtype, device="meta"))

    def matrix(self) -> SparseMatrix:
        """The prepared matrix; from then on ``values`` lies in its memory."""
        values = self.values
        if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
            raise PysolveError(
                "a sparse layer runs on the CPU in float32 or float64, got "
                f"{values.dtype} on {values.device}: move it there, or take to_dense()."
            )
        if self._matrix is None or self._matrix.values.ctypes.data != values.data_ptr() or not values.numel():
            csr = (values.detach().numpy(), self.indices.numpy(), self.indptr.numpy())
            self._matrix = SparseMatrix.from_csr(csr_array(csr, shape=self.shape))
            if self._matrix.nnz != values.numel():
                raise PysolveError("the indices of each row must differ: this layer's state is damaged.")
            self._flipped = None
            values.data = torch.from_numpy(self._matrix.values)
        return self._matrix

    def flipped(self) -> SparseMatrix:
        """The transposed matrix with the values as they are now."""
        matrix = self.matrix()
        if self._flipped is None:
            self._flipped = matrix.transposed()
        flipped, order = self._flipped
        flipped.values[:] = matrix.values[order]
        return flipped

    def scattered(self) -> Tensor:
        """The dense weight; of a matrix of diagonal blocks, as a convolution in groups has, these alone."""
        size, width = math.prod(self.dense_shape), math.prod(self.dense_shape[1:])
        n = self.values.numel()
        # Where the row of each entry begins, by operators whose sizes do not depend on numbers.
        ends = self.indptr[1:-1]
        begins = self.indptr.new_zeros(n + 1).index_add(0, ends, torch.full_like(ends, width)).cumsum(0)[:n]
        places = begins + (self.indices if width == self.shape[1] else self.indices % width)
        return self.values.new_zeros(size).scatter(0, places, self.values).reshape(self.dense_shape)

    def product(self, x: Tensor, layout: Layout) -> Tensor:
        """The product and the bias for a matrix of inputs, without gradients."""
        bias = None if self.bias is None else self.bias.detach().numpy()
        rows, threads = x.detach().numpy(), torch.get_num_threads()
        return torch.from_numpy(self.matrix().matmul(rows, layout, bias=bias, threads=threads))

    def multiplied(self, x: Tensor, layout: Layout) -> Tensor:
        """The product and the bias for a matrix of inputs."""
        if x.dtype != self.values.dtype or x.device != self.values.device:
            raise PysolveError(
                f"expected {self.values.dtype} on {self.values.device} as the layer's values are, got "
                f"{x.dtype} on {x.device}."
            )
        if not torch.is_grad_enabled():
            return self.product(x, layout)
        self.matrix()
        return _Product.apply(x, self.values, self.bias, self, layout)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: Mapping[str, object], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Take the sizes of the loaded tensors, once they are known to be a matrix of this shape."""
        names = ("values", "indices", "indptr")
        given = {name: one for name in names if isinstance(one := state_dict.get(prefix + name), Tensor)}
        if len(given) == len(names):
            csr = csr_array(tuple(tensor.cpu().numpy() for tensor in given.values()), shape=self.shape)
            prepared = SparseMatrix.from_csr(csr)
            if not np.array_equal(prepared.to_csr().indices, csr.indices):
                raise ValueError(f"{prefix}indices must increase within each row.")
            if not self._within_blocks(csr):
                raise ValueError(f"{prefix}indices must stay within the groups of the convolution.")
            for name in ("values", "indices"):
                own = getattr(self, name)
                own.data = own.new_empty(given[name].shape)
            self._matrix = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _within_blocks(self, csr: csr_array) -> bool:
        """Whether all entries are on the diagonal blocks that the dense weight consists of."""
        h, width = self.shape[0], math.prod(self.dense_shape[1:])
        groups = self.shape[1] // max(1, width)
        block = np.repeat(np.arange(h), np.diff(csr.indptr)) * groups // max(1, h)
        return bool(np.array_equal(block, csr.indices // max(1, width)))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_matrix": None, "_flipped": None}

    def extra_repr(self) -> str:
        return f"{self.shape[1]} to {self.shape[0]}, density {self.density:.3g}, bias={self.bias is not None}"


class SparseLinear(SparseWeight):
    """y = A x + b with a sparse A: takes the place of an ``nn.Linear``.

    Runs on the CPU, in float32 or float64. Gradients go to the inputs, the entries and the bias, so that the
    rest of a pruned layer can be fine-tuned; places without an entry stay zero.

    torch.compile runs it as it is, between two graphs, and so not with ``fullgraph=True``. A program of
    torch.export or torch.onnx needs nothing of this package: it holds the entries, and makes the dense weight
    of them in each call. ``pysolve.nn.to_dense`` has it made once and for all.

    Parameters
    ----------
    matrix : (h, d) csr_array
    bias : (h,) tensor, optional
    """

    @classmethod
    def from_dense(cls, layer: nn.Linear, weight: Tensor | None = None) -> SparseLinear:
        """A layer with the non-zero entries of a dense one's weight, or of another in its place."""
        weight = layer.weight.detach() if weight is None else weight
        made = cls(csr_array(weight.numpy()), layer.bias)
        made.answers = answers_of(layer)
        return made.train(layer.training)

    def to_dense(self) -> nn.Linear:
        """The same layer with a dense weight."""
        h, d = self.shape
        return dense_layer(nn.Linear, self.scattered(), self.bias, (d, h)).train(self.training)

    def computed(self, x: Tensor) -> Tensor:
        return self.multiplied(x.reshape(-1, self.shape[1]), "batch").reshape(*x.shape[:-1], self.shape[0])

    def traced(self, x: Tensor) -> Tensor:
        return linear(x, self.scattered(), self.bias)


class SparseConv2d(SparseWeight):
    """A 2-d convolution with a sparse weight: takes the place of an ``nn.Conv2d``.

    Of any stride, padding, dilation and groups; its matrix is the unfolded weight, one row an output channel.
    Make one with ``from_dense``. As ``SparseLinear`` otherwise.
    """

    def __init__(self, matrix: csr_array, bias: Tensor | None, dense: nn.Conv2d) -> None:
        super().__init__(matrix, bias, tuple(dense.weight.shape))
        self.geometry = Geometry.of(dense)
        self.answers = answers_of(dense)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, weight: Tensor | None = None) -> SparseConv2d:
        """A layer with the non-zero entries of a dense one's weight, or of another in its place."""
        weight = layer.weight.detach() if weight is None else weight
        blocks = [block.flatten(1) for block in weight.chunk(layer.groups)]
        matrix = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return cls(csr_array(matrix.numpy()), layer.bias, layer).train(layer.training)

    def to_dense(self) -> nn.Conv2d:
        """The same layer with a dense weight."""
        return self.geometry.dense(self.scattered(), self.bias).train(self.training)

    def computed(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self.computed(x[None])[0]
        form = self.geometry
        x = form.padded(x) if any(form.margins) else x
        columns = unfold(x, form.kernel_size, form.dilation, stride=form.stride)
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(x.shape[2:], form.kernel_size, form.stride, form.dilation, strict=True)
        ]
        together = columns.transpose(0, 1).reshape(self.shape[1], -1)
        return self.multiplied(together, "feature").reshape(self.shape[0], len(x), *size).transpose(0, 1)

    def traced(self, x: Tensor) -> Tensor:
        return self.geometry.convolved(x, self.scattered(), self.bias)
