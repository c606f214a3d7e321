import numpy as np
import pytest

from hnml_hf import clean_dataset, load_annotations, load_noisy_dataset


def write_annotations(path, rows, header="index,mark,new_label,new_label_name"):
    path.write_text("\r\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\r\n", encoding="utf-8")
    return path


def test_annotations_that_are_no_text_are_named_by_line(table, tmp_path):
    path = tmp_path / "annotations.csv"
    path.write_bytes(b"index,mark,new_label\n\xff\xfe,wrong,1\n")
    with pytest.raises(ValueError, match=r"annotations.csv:1: no CSV in UTF-8"):
        load_annotations(path, table)
    path.write_text("index,mark,new_label\n" + "1" * 200_000 + ",wrong,1\n")
    with pytest.raises(ValueError, match=r"annotations.csv:2: no CSV in UTF-8"):
        load_annotations(path, table)


def test_annotations_are_checked(table, tmp_path):
    good = int(table["index"][0])
    annotations = load_annotations(write_annotations(tmp_path / "m.csv", [(good, "wrong", 2, "bottom")]), table)
    assert annotations.loc[good].tolist() == ["wrong", 2]
    annotations = load_annotations(write_annotations(tmp_path / "m.csv", [(good, "wrong", "", "")]), table)
    assert annotations.loc[good].tolist() == ["wrong", table["suggested_label"][0]]
    for rows, message in (
        ([(good, "right", 0, ""), (5, "wrong", 0, "")], "m.csv:3: sample id 5 is not among the scored"),
        ([(good, "right", 0, ""), (good, "wrong", 0, "")], "m.csv:3: sample id .* is annotated twice by `m`"),
        ([(good, "maybe", 0, "")], "m.csv:2: the annotation 'maybe' is none of wrong, right, unsure"),
        ([(good, "wrong", 3, "")], "m.csv:2: `new_label` 3 is none of the 3 classes"),
        ([("x", "wrong", 0, "")], "m.csv:2: `index` and `new_label` must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            load_annotations(write_annotations(tmp_path / "m.csv", rows), table)
    with pytest.raises(ValueError, match="m.csv:1: no column annotation, new_label"):
        load_annotations(write_annotations(tmp_path / "m.csv", [], header="index,x"), table)


def test_cleaned_datasets_keep_their_lineage(tiny_dataset, table, tmp_path):
    clean, given = np.array(tiny_dataset["clean_label"]), np.array(tiny_dataset["label"])
    relabelled = clean_dataset(tiny_dataset, table, how="relabel")
    assert relabelled["label"][:] == clean.tolist() and relabelled["original_label"][:] == given.tolist()
    assert relabelled["index"][:] == tiny_dataset["index"][:]
    assert [a == "relabeled" for a in relabelled["audit_action"]] == (clean != given).tolist()
    dropped = clean_dataset(tiny_dataset, table, how="drop")
    assert dropped["index"][:] == np.array(tiny_dataset["index"])[clean == given].tolist()
    weighted = clean_dataset(tiny_dataset, table, how="weight")
    assert len(weighted) == 48 and weighted["label"][:] == given.tolist()
    assert (np.array(weighted["weight"])[clean != given] < 0.5).all()
    assert np.array_equal(
        np.asarray(dropped[0]["image"]), np.asarray(tiny_dataset[int((clean == given).argmax())]["image"])
    )

    dropped.save_to_disk(tmp_path / "cleaned")
    again = load_noisy_dataset(str(tmp_path / "cleaned"))["train"]
    assert again["label"][:] == dropped["label"][:] and again["index"][:] == dropped["index"][:]
    with pytest.raises(ValueError, match="Nothing to do"):
        clean_dataset(tiny_dataset, table)
    with pytest.raises(ValueError, match="none of drop, relabel, weight"):
        clean_dataset(tiny_dataset, table, how="burn")
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        clean_dataset(tiny_dataset, table, how="drop", threshold=2)


def test_annotations_go_before_scores(tiny_dataset, table, tmp_path):
    suspects = table.sort_values("rank")["index"].tolist()
    right, wrong = suspects[0], suspects[-1]  # both against the score
    to = (int(table.set_index("index").loc[wrong, "label"]) + 1) % 3
    annotations = load_annotations(
        write_annotations(tmp_path / "m.csv", [(right, "right", 0, ""), (wrong, "wrong", to, "")]), table
    )
    cleaned = clean_dataset(tiny_dataset, table, how="drop", annotations=annotations).to_pandas().set_index("index")
    assert right in cleaned.index and cleaned.loc[wrong, "label"] == to
    assert cleaned.loc[[right, wrong], "audit_action"].tolist() == ["annotated", "annotated"]
    unknown = load_annotations(write_annotations(tmp_path / "u.csv", [(wrong, "wrong", -1, "")]), table)
    assert wrong not in clean_dataset(tiny_dataset, table, annotations=unknown)["index"]
    only = clean_dataset(tiny_dataset, table, annotations=annotations)
    changed = np.array(only["label"]) != np.array(only["original_label"])
    assert np.array(only["index"])[changed].tolist() == [wrong]
