"""Fashion-MNIST as TensorFlow Datasets: the embedded subset and the full official set.

`fashion_mnist_10k` holds the first 10,000 training images and all 10,000 test images, in their original order; it is
small enough to live beside the recipes. `fashion_mnist_full` holds all 60,000 + 10,000. To prepare the full set:

    python data/fashion_mnist.py --full

The four original IDX files are read from TFDS's manual directory if they are there (on Debian,
`apt-get install dataset-fashion-mnist` puts them into /usr/share/datasets/fashion-mnist: name it with `--manual-dir`),
else they are downloaded. Either way their contents are verified before use.

Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv:1708.07747, 2017. MIT licence.
"""

import gzip
import hashlib
import urllib.request
from pathlib import Path

import cyclopts
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import ExistingDirectory

DATA_DIR = Path(__file__).resolve().parent

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# SHA-256 of the uncompressed contents, because packagers compress the same files anew.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

CLASS_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


class FashionMnistFull(tfds.core.GeneratorBasedBuilder):
    """All 60,000 training and 10,000 test images, 28 × 28 pixels, grey, 10 classes."""

    name = "fashion_mnist_full"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Optional: the files {', '.join(f'{name}.gz' for name in SHA256)}, from {URL}."
    TRAINING_IMAGES = 60_000

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Fashion-MNIST: grey 28 × 28 images of clothing in 10 classes. "
            f"The first {self.TRAINING_IMAGES:,} of the 60,000 training images and all 10,000 test images, in order.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(names=CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation="""@article{xiao2017fashion,
  title={Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author={Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal={arXiv preprint arXiv:1708.07747},
  year={2017}
}""",
            license=Path(__file__).with_name("LICENSE").read_text(encoding="utf-8"),
            # The original order is already mixed; keeping it lets a checksum be compared with the IDX files.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        try:
            files = {name: dl_manager.manual_dir / f"{name}.gz" for name in SHA256}
        except AssertionError:  # what TFDS raises when the manual directory is missing or empty
            files = {}
        if not files or not all(path.exists() for path in files.values()):
            # Without a network, TFDS would try again and again for minutes; this fails at once.
            urllib.request.urlopen(URL, timeout=10).close()
            files = dl_manager.download({name: f"{URL}{name}.gz" for name in SHA256})
        return {
            "train": self._generate_examples(files, "train", self.TRAINING_IMAGES),
            "test": self._generate_examples(files, "t10k", 10_000),
        }

    def _generate_examples(self, files, prefix, count):
        images, labels = (
            read_idx(files[name], SHA256[name])
            for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        )
        for index in range(count):
            yield index, {"image": images[index, :, :, np.newaxis], "label": int(labels[index])}


class FashionMnist10k(FashionMnistFull):
    """The first 10,000 training images and all 10,000 test images."""

    name = "fashion_mnist_10k"
    TRAINING_IMAGES = 10_000


def read_idx(path, sha256):
    """Return the uint8 array of a gzip-compressed IDX file whose uncompressed contents must have the given SHA-256.

    Raises:
        ValueError: the contents are not the known ones.
    """
    contents = gzip.decompress(Path(path).read_bytes())
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise ValueError(f"{path} is not the original file: its SHA-256 differs. Fetch it again from {URL}.")
    dimensions = contents[3]  # the fourth byte of the header; each size follows as a big-endian 32-bit integer
    shape = np.frombuffer(contents, ">u4", count=dimensions, offset=4)
    return np.frombuffer(contents, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def main(*, full: bool = False, manual_dir: ExistingDirectory | None = None, data_dir: Path = DATA_DIR):
    """Prepare Fashion-MNIST for `tfds.load`.

    Args:
        full: prepare `fashion_mnist_full` (60,000 + 10,000 images) instead of `fashion_mnist_10k`.
        manual_dir: folder with the four original files; without it, TFDS's own manual directory, then the network.
        data_dir: folder that receives the prepared data set.
    """
    builder = (FashionMnistFull if full else FashionMnist10k)(data_dir=data_dir)
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except OSError as error:
        error.add_note(
            f"{builder.name} was not prepared. Without a network, pass --manual-dir with the four original files."
        )
        raise
    print(f"{builder.name} is in {builder.data_path}: use it with --dataset {builder.name} --data-dir {data_dir}")


if __name__ == "__main__":
    cyclopts.run(main)
