"""Lesion-wise detection: which of the separate structures of a region were found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import generate_binary_structure, label
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

LEAST_OVERLAP = 0.1
"""Intersection over union from which a predicted structure may stand for a true one."""


def lesion_f1(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """F1 of structures found: 2 hits / (true structures + predicted structures).

    Structures are connected components (8 neighbours in 2-D, 26 in 3-D). A pair may match from `LEAST_OVERLAP` on, each
    structure once; hits are the most pairs that can be matched so.

    Args:
        prediction: Not empty, (H, W) or (D, H, W).
        truth: Not empty, of the same shape.
    """
    neighbours = generate_binary_structure(truth.ndim, truth.ndim)
    (predicted, found), (true, there) = (label(mask, neighbours) for mask in (prediction, truth))
    common = prediction & truth
    pairs, overlap = np.unique(true[common].astype(np.int64) * (found + 1) + predicted[common], return_counts=True)
    rows, columns = np.divmod(pairs, found + 1)
    sizes = [np.bincount(parts[mask]) for parts, mask in ((true, truth), (predicted, prediction))]
    union = sizes[0][rows] + sizes[1][columns] - overlap
    match = overlap >= LEAST_OVERLAP * union
    if not match.any():
        return 0.0
    edges = rows[match] - 1, columns[match] - 1
    graph = csr_array((np.ones(len(edges[0]), np.int8), edges), shape=(there, found))
    hits = int((maximum_bipartite_matching(graph) >= 0).sum())
    return 2 * hits / (there + found)
