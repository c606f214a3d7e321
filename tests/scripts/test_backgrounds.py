"""The trial of the mask: garments on textures, and how far a map keeps to them."""

import backgrounds
import numpy as np
import pytest


def test_a_garment_lies_on_its_texture():
    garment = np.zeros((42, 42), np.uint8)
    garment[10:30, 5:25] = 255
    image, mask = backgrounds.compose(garment, 3, np.random.default_rng(0))
    assert image.shape == mask.shape == (56, 56)
    assert mask.sum() == 20 * 20 and (image[mask == 1] == 255).all()
    assert image[mask == 0].max() < 200  # the texture is darker


def test_a_wrong_label_is_another_class():
    labels = np.arange(1000) % 10
    other = backgrounds.another(labels, np.random.default_rng(0))
    assert (other != labels).all() and set(other) == set(range(10))


def test_how_far_a_map_keeps_to_the_garment_by_hand():
    garment = np.zeros((56, 56))
    garment[:28, :28] = 1  # the first of 2 x 2 cells
    garment[:28, 28:42] = 1  # half of the second
    hit, share = backgrounds.on_garment(np.array([[0.2, 1.0], [0.4, 0.4]]), garment)
    assert hit and share == pytest.approx((0.2 + 0.5) / 2.0)
    hit, share = backgrounds.on_garment(np.array([[0.2, 0.4], [1.0, 0.4]]), garment)
    assert not hit and share == pytest.approx((0.2 + 0.2) / 2.0)
