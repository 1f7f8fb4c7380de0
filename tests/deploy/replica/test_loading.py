import pytest

from deploy.replica.loading import find_class, index_names, load_model, name_classes
from deploy.settings import Arguments

CLASSES = name_classes({0: "arrow", 1: "circle", 2: "crane, wader", 3: "crane"}, {"1": "n00000001"}, 5)


def test_classes_are_found_by_id_wnid_and_name():
    names = index_names(CLASSES)
    for wanted, label in [(1, 1), (" Circle ", 1), ("wader", 2), ("class:3", 3), ("Class: 0", 0), ("N00000001", 1),
                          ("crane, wader", 2), ("4", 4)]:  # fmt: skip
        assert find_class(wanted, CLASSES, names) == label, wanted


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (5, r"\[0, 4\], but got 5"),
        (-1, "but got -1"),
        ("class:5", "but got 5"),
        ("class:x", 'wanted "class:" and an id'),
        ("class:٣", 'wanted "class:" and an id'),
        ("unicorn", "unknown class 'unicorn'; GET /classes lists the 5 known ones"),
        ("crane", r"several classes: class:2 \(crane, wader\), class:3 \(crane\); name the id"),
    ],
)
def test_unknown_and_shared_classes_are_refused(wanted, words):
    with pytest.raises(ValueError, match=words):
        find_class(wanted, CLASSES, index_names(CLASSES))


def test_a_model_card_says_which_weights_serve(generator_folder, other_folder):
    first, again, second = (
        load_model(str(folder), Arguments(model="x")).card
        for folder in (generator_folder, generator_folder, other_folder)
    )
    assert first.hashes == again.hashes
    assert first.hashes.transformer != second.hashes.transformer
    assert first.hashes.vae == second.hashes.vae
    assert (first.id, first.image_size, first.num_classes, first.takes_guidance) == ("first", 64, 10, False)
    assert load_model(str(generator_folder), Arguments(model="x", served_name="mine")).card.id == "mine"
