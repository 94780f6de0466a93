import gzip
import hashlib
import socket
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds

from evidence.recipes import ROOT
from tests.conftest import load_module

CLASS_NAMES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"

# SHA-256 of the uncompressed IDX files, whose gzip-compressed originals have the MD5 that the authors publish:
# t10k-images bef4ecab320f06d8554ea6380940ec79, t10k-labels bb300cfdad3c16e7a12a480ee83cd310.
TEST_IMAGES_IDX = "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
TEST_LABELS_IDX = "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
# SHA-256 of the first 10,000 images and labels after the headers of the IDX files that the authors publish as
# train-images 8d4fb7e6c68d591d4c3dfef9ec88bf0d and train-labels 25c81989df183df01b3e8a0aad5dffbe.
FIRST_TRAINING_IMAGES = "2929ae1c7b89e0ee6587bbe4911fd5f0a5dafe21ae6ed9b737173cbfe20c12c9"
FIRST_TRAINING_LABELS = "1022e4632874e71bb84d924c475e6a3428a2deeb8c5a0f612a015c97e4fce7f0"


def sha256(contents):
    return hashlib.sha256(contents).hexdigest()


@pytest.fixture(scope="module")
def embedded():
    splits, info = tfds.load(
        "fashion_mnist_10k", data_dir=ROOT / "data", split=["train", "test"], as_supervised=True, with_info=True
    )
    return [next(iter(tfds.as_numpy(split.batch(len(split))))) for split in splits], info


def test_counts_shapes_and_balance(embedded):
    (train, test), info = embedded
    for images, labels in (train, test):
        assert images.shape == (10_000, 28, 28, 1)
        assert images.dtype == np.uint8
        assert set(labels) == set(range(10))
    assert np.bincount(test[1]).tolist() == [1000] * 10
    assert np.bincount(train[1]).tolist() == [942, 1027, 1016, 1019, 974, 989, 1021, 1022, 990, 1000]
    assert info.supervised_keys == ("image", "label")
    assert info.features["label"].names == CLASS_NAMES.split(", ")
    assert "Xiao" in info.citation


def test_decoded_pixels_are_those_of_the_original_files(embedded):
    (train, test), _ = embedded
    assert sha256(struct.pack(">4I", 2051, 10_000, 28, 28) + test[0].tobytes()) == TEST_IMAGES_IDX
    assert sha256(struct.pack(">2I", 2049, 10_000) + test[1].astype(np.uint8).tobytes()) == TEST_LABELS_IDX
    assert sha256(train[0].tobytes()) == FIRST_TRAINING_IMAGES
    assert sha256(train[1].astype(np.uint8).tobytes()) == FIRST_TRAINING_LABELS


def test_licence_stands_beside_the_data():
    licence = (ROOT / "data" / "LICENSE").read_text(encoding="utf-8")
    assert "Zalando" in licence
    assert "Permission is hereby granted" in licence
    assert (ROOT / "data" / "fashion_mnist_10k" / "1.0.0" / "LICENSE").read_text(encoding="utf-8") == licence.strip()


@pytest.fixture
def builder_module():
    forget_builders()
    yield load_module(ROOT / "data" / "fashion_mnist.py")
    forget_builders()


def forget_builders():
    """Undo what the classes do when they are defined: register with TFDS, which they could not do a second time."""
    for name in ("fashion_mnist_full", "fashion_mnist_10k"):
        tfds.core.registered._DATASET_REGISTRY.pop(name, None)


def write_idx(path, array):
    """Write a uint8 array as a gzip-compressed IDX file, and return the SHA-256 of its contents."""
    contents = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(contents))
    return sha256(contents)


def test_idx_file_is_read(builder_module, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    digest = write_idx(tmp_path / "images.gz", array)
    np.testing.assert_array_equal(builder_module.read_idx(tmp_path / "images.gz", digest), array)
    with pytest.raises(ValueError, match="not the original file"):
        builder_module.read_idx(tmp_path / "images.gz", sha256(b"other"))


def test_builder_reads_the_manual_directory(builder_module, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    manual = tmp_path / "manual"
    manual.mkdir()
    arrays = {}
    for prefix in ("train", "t10k"):
        arrays[f"{prefix}-images-idx3-ubyte"] = generator.integers(0, 256, (10_000, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = generator.integers(0, 10, 10_000, dtype=np.uint8)
    digests = {name: write_idx(manual / f"{name}.gz", array) for name, array in arrays.items()}
    monkeypatch.setattr(builder_module, "SHA256", digests)
    builder = builder_module.FashionMnist10k(data_dir=tmp_path)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    images, labels = next(iter(tfds.as_numpy(builder.as_dataset(split="train", as_supervised=True, batch_size=10_000))))
    np.testing.assert_array_equal(images[..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(labels, arrays["train-labels-idx1-ubyte"])


def test_without_files_and_network_the_error_names_the_remedy(builder_module, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(OSError) as caught:
        builder_module.main(full=True, data_dir=tmp_path)
    assert "--manual-dir" in caught.value.__notes__[-1]
