"""Loans of Lending Club as a TensorFlow Dataset: a real table of numbers and categories, with few positive rows.

The set lives beside the recipes. To make it again, on Debian:

    apt-get download r-cran-modeldata && dpkg-deb --extract r-cran-modeldata_*.deb modeldata
    pip install rdata
    python data/lending_club.py --folder modeldata/usr/lib/R/site-library/modeldata/data

Source: the table `lending_club` of the R package modeldata by M. Kuhn (MIT licence), a sample of the loans of early
2016 that Lending Club has published.
"""

import hashlib
import lzma
from pathlib import Path

import cyclopts
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import ExistingDirectory

DATA_DIR = Path(__file__).resolve().parent

# Of the table as CSV, numbers in single precision, because packagers compress the same table anew.
TABLE_SHA256 = "e77a601eeeeb707cf67af245020007dd43765c2e22e311bb813b2468f2a118f7"

NUMBERS = [
    "funded_amnt",
    "int_rate",
    "annual_inc",
    "delinq_2yrs",
    "inq_last_6mths",
    "revol_util",
    "acc_now_delinq",
    "open_il_6m",
    "open_il_12m",
    "open_il_24m",
    "total_bal_il",
    "all_util",
    "inq_fi",
    "inq_last_12m",
    "delinq_amnt",
    "num_il_tl",
    "total_il_high_credit_limit",
]
STATES = """
AK AL AR AZ CA CO CT DC DE FL GA HI ID IL IN KS KY LA MA MD ME MI MN MO MS MT NC ND NE NH NJ NM NV NY OH OK OR PA RI SC
SD TN TX UT VA VT WA WI WV WY
"""
CATEGORIES = {
    "term": ["term_36", "term_60"],
    "sub_grade": [f"{letter}{number}" for letter in "ABCDEFG" for number in range(1, 6)],
    "addr_state": STATES.split(),
    "verification_status": ["Not_Verified", "Source_Verified", "Verified"],
    "emp_length": ["emp_lt_1", *(f"emp_{years}" for years in range(1, 10)), "emp_ge_10", "emp_unk"],
}

# Shares of the rows, after a fixed shuffle.
SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}


class LendingClub(tfds.core.GeneratorBasedBuilder):
    """9,857 loans with 22 columns, and whether they went bad, as a twentieth of them did."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, folder=None, **arguments):
        super().__init__(**arguments)
        self.folder = folder

    def _info(self):
        columns = dict.fromkeys(NUMBERS, np.float32)
        columns |= {name: tfds.features.ClassLabel(names=names) for name, names in CATEGORIES.items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="9,857 loans with 17 numbers and 5 categories each, good or bad, split by row after a shuffle.",
            features=tfds.features.FeaturesDict(
                {
                    "loan": tfds.features.FeaturesDict(columns),
                    "label": tfds.features.ClassLabel(names=["good", "bad"]),
                }
            ),
            supervised_keys=("loan", "label"),
            homepage="https://modeldata.tidymodels.org/reference/lending_club.html",
            citation="""@misc{modeldata,
  title={modeldata: Data Sets Useful for Modeling Examples},
  author={Kuhn, Max},
  note={R package}
}""",
            license=Path(__file__).with_name("LICENSE.lending_club").read_text(encoding="utf-8"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        if self.folder is None:
            raise ValueError("The folder with Rdata.rdb is missing: data/lending_club.py says how to come by it.")
        table = read_table(self.folder)
        order = np.random.default_rng(0).permutation(len(table))
        parts = {
            split: order[round(begin * len(table)) : round(end * len(table))] for split, (begin, end) in SPLITS.items()
        }
        return {split: self._generate_examples(table.iloc[rows]) for split, rows in parts.items()}

    def _generate_examples(self, table):
        for number, row in enumerate(table.to_dict("records")):
            label = row.pop("Class")
            yield number, {"loan": row, "label": label}


def read_table(folder):
    """Return the table as a pandas.DataFrame, from the folder with the R package's Rdata.rdb and Rdata.rdx.

    Raises:
        ValueError: it is another table.
    """
    # Here, because it is needed but once.
    import rdata

    index = rdata.read_rds(folder / "Rdata.rdx")
    start, size = map(int, index["variables"]["lending_club"])
    # Four bytes say how long it was, and a letter how it is compressed: "Z" is LZMA, without a header.
    packed = (folder / "Rdata.rdb").read_bytes()[start + 5 : start + size]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    unpacked = lzma.decompress(packed, format=lzma.FORMAT_RAW, filters=filters)
    table = rdata.conversion.convert(rdata.parser.parse_data(unpacked))
    table = table.astype(dict.fromkeys(NUMBERS, "float32") | dict.fromkeys([*CATEGORIES, "Class"], str))
    table = table[[*NUMBERS, *CATEGORIES, "Class"]]
    if hashlib.sha256(table.to_csv(index=False).encode()).hexdigest() != TABLE_SHA256:
        raise ValueError(f"The table lending_club in {folder} is not the known one: its SHA-256 differs.")
    return table


def main(*, folder: ExistingDirectory, data_dir: Path = DATA_DIR):
    """Prepare the loans for `tfds.load`.

    Args:
        folder: the R package's folder with Rdata.rdb and Rdata.rdx.
        data_dir: folder that receives the prepared data set.
    """
    builder = LendingClub(folder=folder, data_dir=data_dir)
    builder.download_and_prepare()
    print(f"{builder.name} is in {builder.data_path}: use it with --dataset {builder.name} --data-dir {data_dir}")


if __name__ == "__main__":
    cyclopts.run(main)
