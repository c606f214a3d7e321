import unicodedata

import pytest

from hnml_hf.data.classes import align_classes


def test_classes_are_matched_by_name():
    assert align_classes(["b", "c", "a"], ["a", "b"]).tolist() == [2, 0]
    assert align_classes(["1", "0"], ["0", "1"]).tolist() == align_classes(["0", "1"], ["1", "0"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"does not know 1 of the dataset's 2 classes: dog. Its own 3 are cat, bird"):
        align_classes(["cat", "bird", "fish"], ["cat", "dog"])


def test_a_model_without_names_has_the_order_of_the_data():
    assert align_classes(["LABEL_0", "LABEL_1"], ["cat", "dog"]).tolist() == [0, 1]
    assert align_classes(["0", "1"], ["cat", "dog"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="does not know"):
        align_classes(["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog"])


def test_accents_and_blanks_do_not_count():
    assert align_classes([unicodedata.normalize("NFD", "é"), "a"], ["a ", "é"]).tolist() == [1, 0]


def test_a_name_that_the_model_has_twice_is_ambiguous():
    twice = ["crane", "heron", "crane"]  # bird and machine, in ImageNet
    assert align_classes(twice, twice).tolist() == [0, 1, 2]
    assert align_classes(twice, ["heron"]).tolist() == [1]
    with pytest.raises(ValueError, match="several outputs called crane"):
        align_classes(twice, ["heron", "crane"])
