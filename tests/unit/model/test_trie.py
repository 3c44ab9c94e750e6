import torch

from granite_ray.model.trie import convolution_windows, visible_nodes

CPU = torch.device("cpu")
PARENTS = (-1, 0, 0, -1, 2)


def test_a_node_sees_its_ancestors_and_itself() -> None:
    seen = [set(row.nonzero()[:, 0].tolist()) for row in visible_nodes(PARENTS, CPU)]
    assert seen == [{0}, {0, 1}, {0, 2}, {3}, {0, 2, 4}]


def test_a_convolution_looks_back_along_the_path_and_then_into_what_is_remembered() -> None:
    # Rows 0 to 2 are remembered, the newest last; nodes follow from 3 on.
    assert convolution_windows(PARENTS, 4, CPU).tolist() == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [1, 2, 3, 5],
        [0, 1, 2, 6],
        [2, 3, 5, 7],
    ]
