r"""Means on the sphere: linear combinations of the models, with coefficients from their inner products.

One pass computes the Gram matrix :math:`G_{ij} = \langle x_i, x_j \rangle`. The coefficients are then small-vector
arithmetic in float64, iterations included. One weighted sum follows.

A vector :math:`v = \sum_i c_i x_i` is kept as its coefficients c; :math:`\langle v, w \rangle = c^T G\, d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, TaskError, printable
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import PerModel, Values, merge_method, sums_to_something
from streammerge.methods.inner_products import Products, solved
from streammerge.methods.linear import Combination, combination

if TYPE_CHECKING:
    import torch

_PARALLEL = 0.9995


def arc(cos: float, t: float) -> tuple[float, float]:
    r"""Returns the coefficients of two vectors for the point ``t`` of the way along the arc between them.

    They are :math:`\sin((1-t)\theta)/\sin\theta` and :math:`\sin(t\theta)/\sin\theta`; ``cos`` is the vectors' cosine.
    """
    theta = math.acos(max(-1.0, min(cos, 1.0)))
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _slerp(products: Products, name: str, based: bool, values: Values) -> Combination:
    t = values["t"]
    (aa, _), (ab, bb) = products
    norms = [norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    cos = ab / (norms[0] * norms[1])
    # Not <=: NaN must reach the output
    return combination((1 - t, t) if abs(cos) > _PARALLEL or math.isnan(cos) else arc(cos, t))


@merge_method("slerp", models=(2, 2), base="model", buffers=4, batch=solved(_slerp), compute="float64")
def slerp(group: TensorGroup, *, t: float) -> Kernel:
    r"""Spherical interpolation between two models.

    .. math:: y = \frac{\sin((1-t)\,\theta)}{\sin\theta}\, a + \frac{\sin(t\,\theta)}{\sin\theta}\, b,
              \qquad \cos\theta = \frac{\langle a, b \rangle}{\|a\| \|b\|}

    Shoemake, *Animating rotation with quaternion curves*, 1985. Each tensor is one vector, whatever its shape. ``a`` is
    the base if one is named, else the first model. ``t`` = 0 gives ``a``, 1 gives the other.

    Edge cases: where :math:`|\cos\theta| > 0.9995`, the result is on the straight line :math:`(1-t)\, a + t\, b`; this
    covers opposite vectors. A tensor with a norm up to 1e-8 has cosine 0.
    """
    return _slerp(group.gram().tolist(), group.name, group.based, {"t": t})


def _check_multislerp(values: Values) -> None:
    if values["eps"] <= 0:
        raise RecipeError("multislerp takes an eps above 0")
    if values["normalize_weights"] and not sums_to_something(values["weight"]):
        raise RecipeError(
            "the weights of multislerp sum to zero; pass `parameters={'normalize_weights': False}` to use them as given"
        )


def _multislerp(products: Products, name: str, based: bool, values: Values) -> Combination:
    count, weight, eps = len(products), values["weight"], values["eps"]
    if count == 1:
        return combination([1.0])
    total = sum(weight) if values["normalize_weights"] else 1.0
    w, gram = [each / total for each in weight], _tensor(products)
    norms = gram.diagonal().sqrt().tolist()
    mean = [each / (norm + eps) for each, norm in zip(w, norms, strict=True)]
    projected = _tensor(mean) @ gram
    length = (projected @ _tensor(mean)).clamp(min=0).sqrt().item()
    if length < eps:
        if count > 2 and any(norms):
            raise TaskError(
                f"the weighted directions of {printable(name)} cancel out, so multislerp has no mean for it; "
                "use other weights"
            )
        return _from_base(w, based)
    centre = [each / length for each in mean]
    along = (projected @ _tensor(centre)).item()
    tangent = _tensor([x - along * y for x, y in zip(mean, centre, strict=True)])
    tau = (tangent @ gram @ tangent).clamp(min=0).sqrt().item() + eps
    ahead, aside = math.cos(tau), math.sin(tau) / tau
    scale = (_tensor(w) @ _tensor(norms)).item()
    return _from_base([(x * ahead + y * aside) * scale for x, y in zip(centre, tangent.tolist(), strict=True)], based)


@merge_method(
    "multislerp",
    base="optional",
    buffers=5,
    batch=solved(_multislerp, deltas=None),
    compute="float64",
    check=_check_multislerp,
)
def multislerp(
    group: TensorGroup, *, weight: PerModel = (1.0,), normalize_weights: bool = True, eps: float = 1e-8
) -> Kernel:
    r"""Weighted barycentre of any number of models on the sphere.

    Let :math:`s_i = x_i` (or :math:`x_i - b` with a base), :math:`u_i = s_i / (\|s_i\| + \epsilon)`, and the weights be
    divided by their sum. The mean is :math:`\mu = \sum_i w_i u_i`, its direction :math:`\hat\mu = \mu / \|\mu\|`. The
    exponential map follows the mean tangent :math:`T = \sum_i w_i (u_i - \langle u_i, \hat\mu \rangle \hat\mu)`:

    .. math:: y = \Big(\hat\mu \cos\tau + T \tfrac{\sin\tau}{\tau}\Big) \sum_i w_i \|s_i\| \; (+\, b),
              \qquad \tau = \|T\| + \epsilon

    Goddard, *Multi-SLERP*, 2025 (goddard.blog). Each tensor is one vector. A single model is returned unchanged.

    Edge cases: where :math:`\|\mu\| < \epsilon`, two models give the line :math:`\sum_i w_i s_i`. So do any number of
    models that are all zero or all equal to the base. Other models raise an error that names the tensor. Deviation from
    mergekit: weights that sum to zero are an error.
    """
    products = group.gram(deltas=group.based).tolist() if group.models > 1 else [[0.0]]
    values = {"weight": weight, "normalize_weights": normalize_weights, "eps": eps}
    return _multislerp(products, group.name, group.based, values)


def _check_karcher(values: Values) -> None:
    if values["max_iter"] < 0:
        raise RecipeError("karcher takes a max_iter of 0 or more")


def _karcher(products: Products, name: str, based: bool, values: Values) -> Combination:
    count, max_iter, tol = len(products), values["max_iter"], values["tol"]
    if count == 1:
        return combination([1.0])
    gram = _tensor(products)
    lengths = gram.diagonal().sqrt().tolist()
    if any(map(math.isnan, lengths)):
        return combination([math.nan] * count)
    valid = [i for i in range(count) if lengths[i] > tol]
    if not valid:
        return combination([0.0] * count)
    rows = [[1 / lengths[i] if i == j else 0.0 for j in range(count)] for i in valid]  # row k: the k-th valid unit vector
    units = _tensor(rows)
    projected = units @ gram

    def length(v: list[float]) -> float:
        vector = _tensor(v)
        squared = (vector @ gram @ vector).item()
        return math.sqrt(squared) if squared >= 0 else squared if math.isnan(squared) else 0.0

    mean = units.mean(0).tolist()
    size = length(mean)
    u = rows[0] if size < tol else [each / size for each in mean]
    for _ in range(max_iter):
        tangent = [0.0] * count
        for row, cos in zip(rows, (projected @ _tensor(u)).tolist(), strict=True):
            cos = max(-1.0, min(cos, 1.0))
            theta = math.acos(cos)
            if tol <= theta <= math.pi - tol:
                pull = theta / math.sin(theta) / len(valid)
                tangent = [t + pull * (x - cos * y) for t, x, y in zip(tangent, row, u, strict=True)]
        step = length(tangent)
        if step < tol:
            break
        along, across = math.cos(step), math.sin(step)
        u = [along * x + across * (t / step) for x, t in zip(u, tangent, strict=True)]
        size = length(u)
        if size > tol:
            u = [each / size for each in u]
    scale = _tensor(lengths).mean().item()
    return combination([each * scale for each in u])


@merge_method("karcher", base="model", buffers=4, batch=solved(_karcher), compute="float64", check=_check_karcher)
def karcher(group: TensorGroup, *, max_iter: int = 10, tol: float = 1e-5) -> Kernel:
    r"""Karcher mean of the models' directions, times their mean norm.

    The weights are equal: :math:`\alpha = 1/N`. The iteration starts at the normalised mean u of the unit vectors
    :math:`\hat x_i`. It stops after ``max_iter`` steps, or when :math:`\|T\| <` ``tol``:

    .. math:: T = \sum_i \alpha\, \frac{\theta_i}{\sin\theta_i} (\hat x_i - \cos\theta_i\, u), \quad
              u \leftarrow \cos\|T\|\, u + \sin\|T\|\, \frac{T}{\|T\|}, \qquad
              y = u\, \tfrac{1}{N} \textstyle\sum_i \|x_i\|

    Karcher, *Riemannian center of mass and mollifier smoothing*, 1977; for models arXiv:2603.04972. Each tensor is one
    vector. A base, if named, is averaged as one more model. A single model is returned unchanged.

    Edge cases: models with a norm up to ``tol`` have no direction, but count in the mean norm. If no model has a
    direction, the result is zero. If the directions cancel out, the iteration starts at the first one. A model exactly
    opposite to u has no pull; mergekit divides rounding errors there.
    """
    products = group.gram().tolist() if group.models > 1 else [[0.0]]
    return _karcher(products, group.name, group.based, {"max_iter": max_iter, "tol": tol})


# Products of vectors and matrices are torch's, and so are most roots, whose last bit is not always that of Python's. All
# else is plain numbers: there are thousands of tensors, and an operation of torch on three numbers takes longer than three
# of Python.


def _tensor(numbers: Sequence[float] | Products) -> torch.Tensor:
    import torch

    return torch.tensor(numbers, dtype=torch.float64)


def _from_base(weights: Sequence[float], based: bool) -> Combination:
    """Returns the kernel of a combination of the models, or of the base plus a combination of their differences from
    it."""
    return combination(weights, of_base=1 - sum(weights) if based else 0.0)
