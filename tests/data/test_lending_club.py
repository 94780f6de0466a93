import hashlib

import numpy as np
import pandas
import pytest
import tensorflow_datasets as tfds

from evidence.recipes import ROOT
from tests.conftest import load_module

SPLITS = ["train", "validation", "test"]

# SHA-256 of the table that R's package modeldata 1.1.0 has, in single precision, as pandas writes it: first the
# numbers, then the categories.
TABLE = "e77a601eeeeb707cf67af245020007dd43765c2e22e311bb813b2468f2a118f7"


@pytest.fixture(scope="module")
def embedded():
    """The rows of each split as a table with the names of categories, and what TFDS says of the set."""
    splits, info = tfds.load("lending_club", data_dir=ROOT / "data", split=SPLITS, batch_size=-1, with_info=True)
    tables = []
    for split in tfds.as_numpy(splits):
        columns = split["loan"] | {"Class": split["label"]}
        features = dict(info.features["loan"]) | {"Class": info.features["label"]}
        for name, feature in features.items():
            if isinstance(feature, tfds.features.ClassLabel):
                columns[name] = np.array(feature.names)[columns[name]]
        tables.append(pandas.DataFrame(columns))
    return dict(zip(SPLITS, tables, strict=True)), info


@pytest.fixture
def builder_module():
    forget_builder()
    yield load_module(ROOT / "data" / "lending_club.py")
    forget_builder()


def forget_builder():
    """Undo what the class does when it is defined: register with TFDS, which it could not do a second time."""
    tfds.core.registered._DATASET_REGISTRY.pop("lending_club", None)


def test_splits_are_those_of_the_rows_in_a_fixed_order(embedded, builder_module):
    tables, _ = embedded
    assert {split: len(table) for split, table in tables.items()} == {"train": 5914, "validation": 1972, "test": 1971}
    # Back into the order of the original, which is known by its digest.
    shuffled = pandas.concat(tables.values(), ignore_index=True)
    table = shuffled.iloc[np.argsort(np.random.default_rng(0).permutation(9857))]
    table = table[[*builder_module.NUMBERS, *builder_module.CATEGORIES, "Class"]]
    assert hashlib.sha256(table.to_csv(index=False).encode()).hexdigest() == TABLE


def test_a_twentieth_is_bad_in_each_split(embedded):
    tables, info = embedded
    assert info.supervised_keys == ("loan", "label")
    assert info.features["label"].names == ["good", "bad"]
    bad = {split: (table["Class"] == "bad").sum() for split, table in tables.items()}
    assert sum(bad.values()) == 517
    for split, count in bad.items():
        assert count / len(tables[split]) == pytest.approx(0.0525, abs=0.01)


def test_licence_stands_beside_the_data():
    licence = (ROOT / "data" / "LICENSE.lending_club").read_text(encoding="utf-8")
    assert "Max Kuhn" in licence
    assert "Permission is hereby granted" in licence
    prepared = (ROOT / "data" / "lending_club" / "1.0.0" / "LICENSE").read_text(encoding="utf-8")
    assert prepared == licence.strip()


def test_without_the_folder_the_error_says_how_to_come_by_it(builder_module, tmp_path):
    with pytest.raises(ValueError, match="data/lending_club.py says how"):
        builder_module.LendingClub(data_dir=tmp_path).download_and_prepare()
