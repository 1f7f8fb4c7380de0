import pytest

from deploy.replica.class_index import ClassIndex, class_entries

NAMES = {0: "arrow", 1: "circle", 2: "crane, wader", 3: "crane"}
CLASSES = ClassIndex(class_entries(NAMES, {"1": "n00000001"}, 5))


@pytest.mark.parametrize(
    ("given", "label"),
    [(1, 1), (" Circle ", 1), ("wader", 2), ("class:3", 3), ("Class: 0", 0), ("N00000001", 1), ("crane, wader", 2),
     ("4", 4)],
)  # fmt: skip
def test_classes_are_found_by_id_wnid_and_name(given, label):
    assert CLASSES.find(given) == label


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, r"\[0, 4\], but got 5"),
        (-1, "but got -1"),
        ("class:5", "but got 5"),
        ("class:x", 'expected "class:" and an id'),
        ("class:٣", 'expected "class:" and an id'),
        ("unicorn", "unknown class 'unicorn'; GET /classes lists the 5 known ones"),
        ("crane", r"ambiguous: class:2 \(crane, wader\), class:3 \(crane\); give the id"),
    ],
)
def test_unknown_and_ambiguous_classes_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        CLASSES.find(given)
