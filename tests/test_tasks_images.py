"""Images: pixels are those that were written, splits and columns are found, and one sentence for what cannot be read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from task_fixture import load
from twofold.errors import TwofoldError
from twofold.tasks.digits import handwritten_digits

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
images = pytest.importorskip("PIL.Image")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "cifar-10"
COLOURS = np.random.default_rng(0).integers(0, 256, size=(14, 8, 8, 3), dtype=np.uint8)
LABELS = [number % 3 for number in range(14)]


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    images.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, pixels=COLOURS, labels=LABELS, image="image", label="label") -> None:
    cells = [
        {"bytes": encoded(picture) if isinstance(picture, np.ndarray) else picture, "path": None} for picture in pixels
    ]
    cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({image: pyarrow.array(cells, type=cell), label: labels}), path)


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "train.parquet", COLOURS[:10], LABELS[:10])
    write(tmp_path / "test.parquet", COLOURS[10:], LABELS[10:])
    return tmp_path


def test_pixels_are_those_that_were_written_normalised_by_the_training_part(folder):
    task = load("images", path=str(folder))
    assert task.model_fields == {
        "architecture": "image_classification", "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3,
        "causal": False, "positions": {"kind": "learned", "length": 5},
    }  # fmt: skip
    assert (task.train_size, task.held_out_size, task.tokens_per_example) == (10, 4, 5)
    wanted = torch.from_numpy(COLOURS).permute(0, 3, 1, 2).double()
    mean = wanted[:10].mean(dim=(0, 2, 3), keepdim=True)
    deviation = wanted[:10].std(dim=(0, 2, 3), keepdim=True, correction=0)
    wanted = ((wanted - mean) / deviation).float()
    batch = task.train_batch(torch.tensor([7, 2]))
    torch.testing.assert_close(batch["pixel_values"], wanted[[7, 2]])
    assert batch["labels"].tolist() == [LABELS[7], LABELS[2]]
    held_out = list(task.held_out_batches(3))
    torch.testing.assert_close(torch.cat([part["pixel_values"] for part in held_out]), wanted[10:])
    assert torch.cat([part["labels"] for part in held_out]).tolist() == LABELS[10:]


def test_splits_are_found_by_the_names_of_files_and_folders(folder, tmp_path_factory):
    plain = load("images", path=str(folder)).data_hash
    layouts = {
        "hub": [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/valid-00000-of-00001.parquet",
        ],
        "folders": ["train/0000.parquet", "train/0001.parquet", "validation/0000.parquet"],
    }
    for names in layouts.values():
        root = tmp_path_factory.mktemp("layout")
        for name, rows in zip(names, (slice(0, 6), slice(6, 10), slice(10, 14)), strict=True):
            write(root / name, COLOURS[rows], LABELS[rows])
        assert load("images", path=str(root)).data_hash == plain


def test_columns_are_found_or_named(tmp_path, folder):
    plain = load("images", path=str(folder)).data_hash
    for part, rows in (("train", slice(0, 10)), ("test", slice(10, 14))):
        write(tmp_path / "usual" / f"{part}.parquet", COLOURS[rows], LABELS[rows], image="img", label="fine_label")
        write(tmp_path / "own" / f"{part}.parquet", COLOURS[rows], LABELS[rows], image="picture", label="kind")
    assert load("images", path=str(tmp_path / "usual")).data_hash == plain
    with pytest.raises(
        TwofoldError, match="has no column 'image' or 'img'; there is picture, kind: set the option image_column"
    ):
        load("images", path=str(tmp_path / "own"))
    assert load("images", path=str(tmp_path / "own"), image_column="picture", label_column="kind").data_hash == plain


def test_a_part_of_the_images_is_drawn_by_the_seed(folder):
    few = {seed: load("images", path=str(folder), train_size=4, held_out_size=2, data_seed=seed) for seed in (0, 1)}
    assert (few[0].train_size, few[0].held_out_size) == (4, 2)
    assert few[0].data_hash != few[1].data_hash
    assert few[0].model_fields["num_labels"] == 3  # those of the whole data set
    assert len({tuple(row) for row in few[0].train["pixels"].flatten(1).tolist()}) == 4


def test_images_are_scaled_and_turned_grey_as_told(folder):
    task = load("images", path=str(folder), image_size=4, num_channels=1, patch_size=2)
    assert task.train_batch(torch.tensor([0]))["pixel_values"].shape == (1, 1, 4, 4)
    wanted = images.fromarray(COLOURS[3]).convert("L").resize((4, 4), images.Resampling.BILINEAR)
    assert torch.equal(task.train["pixels"][3, 0], torch.from_numpy(np.array(wanted)))


def test_grey_images_have_one_channel(tmp_path):
    write(tmp_path / "train.parquet", COLOURS[:10, :, :, 0], LABELS[:10])
    write(tmp_path / "test.parquet", COLOURS[10:, :, :, 0], LABELS[10:])
    task = load("images", path=str(tmp_path))
    assert task.model_fields["num_channels"] == 1
    assert torch.equal(task.train["pixels"][:, 0], torch.from_numpy(COLOURS[:10, :, :, 0]))


def test_a_data_set_by_name_gives_what_its_folder_gives(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    by_name = load("images", dataset=str(folder))
    assert by_name.data_hash == load("images", path=str(folder)).data_hash
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TwofoldError, match="The data set 'nobody/nothing' cannot be loaded"):
        load("images", dataset="nobody/nothing")


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (lambda root: (root / "test.parquet").unlink(), {}, "has no split 'test' or 'validation' or 'valid' or 'val'; there is train: set the option held_out_split"),
        (lambda root: [path.unlink() for path in root.glob("*.parquet")], {}, "holds no parquet file"),
        (lambda root: None, {"train_split": "learn"}, "has no split 'learn'; there is test, train: set the option train_split"),
        (lambda root: None, {"held_out_split": "train"}, "train is both the training and the held-out split"),
        (lambda root: None, {"label_column": "kind"}, "split train, has no column 'kind'; there is image, label: set the option label_column"),
        (lambda root: None, {"patch_size": 3}, "patches of 3 pixels do not tile an image of 8 pixels"),
        (lambda root: None, {"train_size": 11}, "train_size is 11, but"),
        (lambda root: write(root / "train.parquet", [], []), {}, "split train, holds no image"),
        (lambda root: write(root / "train.parquet", COLOURS[:2], [0, -1]), {}, "row 1 is labelled -1"),
        (lambda root: write(root / "train.parquet", COLOURS[:2], [0, None]), {}, "row 1 is labelled None"),
        (lambda root: write(root / "train.parquet", COLOURS[:2], ["cat", "dog"]), {}, "row 0 is labelled 'cat'"),
        (lambda root: write(root / "train.parquet", [encoded(COLOURS[0]), b"no image"], [0, 1]), {}, "split train, row 1: this is not an image"),
        (lambda root: write(root / "train.parquet", [encoded(COLOURS[0])[:-60]], [0]), {}, "row 0: this is not an image"),
        (lambda root: write(root / "train.parquet", [None], [0]), {}, "row 0: the cell holds no image file's bytes"),
        (lambda root: (root / "test.parquet").write_bytes(b"PAR1 and no more"), {}, "test.parquet is not a whole parquet file"),
        (lambda root: (root / "test.parquet").write_bytes((root / "test.parquet").read_bytes()[:-9]), {}, "test.parquet is not a whole parquet file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_gets_its_sentence(folder, change, options, sentence):
    change(folder)
    with pytest.raises(TwofoldError) as caught:
        load("images", path=str(folder), **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there():
    with pytest.raises(TwofoldError, match="There is no folder nowhere"):
        load("images", path="nowhere")


def test_handwritten_digits_are_all_used_once():
    task, every = load("digits", held_out_size=360), handwritten_digits()
    assert (task.train_size, task.held_out_size) == (1437, 360)
    joined = torch.cat((task.train["pixels"], task.held_out["pixels"])).flatten(1)
    whole = torch.from_numpy(every.pixels).flatten(1)
    order = lambda rows: sorted(map(tuple, rows.tolist()))  # noqa: E731
    assert order(joined) == order(whole)
    values = task.train_batch(torch.arange(1437))["pixel_values"]
    assert abs(values.mean()) < 1e-4
    assert abs(values.std() - 1) < 1e-3


@pytest.mark.skipif(not SHARED.exists(), reason="no shared/data/cifar-10 beside this checkout")
def test_real_images_are_read():
    task = load("images", path=str(SHARED), train_size=200, held_out_size=100)
    assert task.model_fields["image_size"] == 32
    assert task.model_fields["num_labels"] == 10
    assert "200 of train for training, 100 of test held out" in task.description
