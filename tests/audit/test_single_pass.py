import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from hnml_hf import noise_scores, score_model
from hnml_hf.audit.dynamics import score_predictions


def test_one_pass_of_any_classifier(tiny_dataset):
    """A classifier that looks at the bright quarter, with its classes in another order and one more."""

    def classify(pixels):
        quarters = torch.stack([pixels[:, :, :16, :16], pixels[:, :, :16, 16:], pixels[:, :, 16:, :16]], -1)
        brightness = quarters.mean((1, 2, 3)) * 12
        return torch.stack([brightness[:, 2], brightness[:, 0], torch.zeros(len(pixels)), brightness[:, 1]], -1)

    def transform(image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255

    records = score_model(tiny_dataset, classify, transform, ["bottom", "left", "sky", "right"], batch_size=10)
    table = noise_scores(records, tiny_dataset.features["label"].names).set_index("index").loc[tiny_dataset["index"]]
    wrong = np.array(tiny_dataset["label"]) != np.array(tiny_dataset["clean_label"])
    assert roc_auc_score(wrong, table["noise_score"]) > 0.99
    assert (table["suggested_label"].to_numpy()[wrong] == np.array(tiny_dataset["clean_label"])[wrong]).all()
    assert (table["times_seen"] == 1).all()


def test_images_that_cannot_be_read_have_no_score_of_their_own():
    seen = np.array([True] * 9 + [False])
    p = np.tile([[0.9, 0.1]], (10, 1))
    records = score_predictions(np.arange(10), np.array([0] * 8 + [1, 0]), p, seen=seen)
    table = noise_scores(records, ["a", "b"])
    assert table["times_seen"].tolist() == [1] * 9 + [0] and table["rank"].iloc[9] == 10
