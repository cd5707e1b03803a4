"""The CSV reader: what a spreadsheet may write, and one sentence for each way to be broken."""

from pathlib import Path

import numpy as np
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets.csv_file import read_csv
from mlc.datasets.images import ImageSet


def read(folder: Path, text: str | bytes, unlisted="absent") -> ImageSet:
    path = folder / "photos.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_csv(path, folder, unlisted)


def positives(images: ImageSet) -> dict[str, set[str]]:
    """Return the classes marked present, by file."""
    table = images.labels
    return {
        str(file): {name for name, mark in zip(table.classes, row, strict=True) if mark == 1}
        for file, row in zip(table.file, table.observed, strict=True)
    }


def test_rows_stay_in_order_and_classes_are_sorted(tmp_path: Path) -> None:
    images = read(tmp_path, "file,labels\nz/2.jpg,dog;cat\na/1.jpg,traffic light\n")
    assert images.file.tolist() == ["z/2.jpg", "a/1.jpg"]
    assert images.image_id.tolist() == images.file.tolist()
    assert images.labels.classes == ("cat", "dog", "traffic light")
    assert positives(images) == {"z/2.jpg": {"cat", "dog"}, "a/1.jpg": {"traffic light"}}
    assert images.labels.dataset == "csv-photos"
    assert images.labels.expected_positives is None
    assert images.root == tmp_path


def test_without_a_split_column_no_row_has_a_split(tmp_path: Path) -> None:
    assert read(tmp_path, "file,labels\n1,a\n2,b\n").labels.split.tolist() == ["", ""]


def test_a_split_column_is_kept_and_may_have_gaps(tmp_path: Path) -> None:
    images = read(tmp_path, "split,file,labels\ntrain,1,a\ntest,2,b\n,3,b\nval,4,a\n")
    assert images.labels.split.tolist() == ["train", "test", "", "val"]


def test_columns_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    images = read(tmp_path, "id,file,width,labels\n7,1.jpg,640,a\n")
    assert positives(images) == {"1.jpg": {"a"}}


def test_quoted_fields_may_hold_commas_and_line_breaks(tmp_path: Path) -> None:
    images = read(tmp_path, 'file,labels\n"a, b.jpg","cat;dog, brown"\n"c\nd.jpg",cat\n')
    assert positives(images) == {"a, b.jpg": {"cat", "dog, brown"}, "c\nd.jpg": {"cat"}}


def test_a_space_before_a_quote_does_not_undo_it(tmp_path: Path) -> None:
    images = read(tmp_path, 'file, labels\n1.jpg, "cat;dog"\n2.jpg, "dog, brown"\n')
    assert positives(images) == {"1.jpg": {"cat", "dog"}, "2.jpg": {"dog, brown"}}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_spreadsheets_mark_and_line_ends_are_read(tmp_path: Path, end: str, last: bool) -> None:
    text = end.join(["file,labels", "é.jpg,chat"]) + (end if last else "")
    assert positives(read(tmp_path, b"\xef\xbb\xbf" + text.encode())) == {"é.jpg": {"chat"}}


def test_spaces_around_names_do_not_count(tmp_path: Path) -> None:
    text = "file, labels, split\n1.jpg, cat ; dog , train\n 2.jpg,dog;cat,test\n"
    images = read(tmp_path, text)
    assert positives(images) == {"1.jpg": {"cat", "dog"}, "2.jpg": {"cat", "dog"}}
    assert images.labels.split.tolist() == ["train", "test"]


def test_spaces_behind_names_do_not_count_either(tmp_path: Path) -> None:
    images = read(tmp_path, "file ,labels ,split \n1.jpg ,cat ,train \n")
    assert positives(images) == {"1.jpg": {"cat"}}
    assert images.labels.split.tolist() == ["train"]


def test_empty_names_between_separators_are_no_labels(tmp_path: Path) -> None:
    assert read(tmp_path, "file,labels\n1,;cat;;dog;\n").labels.classes == ("cat", "dog")


def test_an_unlisted_label_is_absent_and_the_truth_is_known(tmp_path: Path) -> None:
    table = read(tmp_path, "file,labels\n1,cat\n2,dog\n").labels
    np.testing.assert_array_equal(table.observed, [[1, -1], [-1, 1]])
    np.testing.assert_array_equal(table.true, [[True, False], [False, True]])


def test_an_unlisted_label_may_be_unknown_and_then_the_truth_is_too(tmp_path: Path) -> None:
    table = read(tmp_path, "file,labels\n1,cat\n2,dog;-cat\n", unlisted="unknown").labels
    np.testing.assert_array_equal(table.observed, [[1, 0], [-1, 1]])
    assert table.true is None


@pytest.mark.parametrize("unlisted", ["absent", "unknown"])
def test_a_label_with_a_minus_is_absent_and_names_a_class(tmp_path: Path, unlisted) -> None:
    table = read(tmp_path, "file,labels\n1,cat;-dog\n", unlisted).labels
    assert table.classes == ("cat", "dog")
    np.testing.assert_array_equal(table.observed, [[1, -1]])


def test_a_space_after_the_minus_does_not_make_another_class(tmp_path: Path) -> None:
    table = read(tmp_path, "file,labels\n1,dog\n2,- dog\n").labels
    assert table.classes == ("dog",)


@pytest.mark.parametrize(("unlisted", "value"), [("absent", -1), ("unknown", 0)])
def test_a_row_without_labels_is_an_image_of_none(tmp_path: Path, unlisted, value: int) -> None:
    table = read(tmp_path, "file,labels\n1,cat;dog\n2,\n", unlisted).labels
    np.testing.assert_array_equal(table.observed[1], [value, value])


@pytest.mark.parametrize("cell", ["-", "cat;-", "- "])
def test_a_minus_without_a_label_is_refused(tmp_path: Path, cell: str) -> None:
    with pytest.raises(MlcError, match=r"photos.csv:3: "):
        read(tmp_path, f"file,labels\n1,cat\n2,{cell}\n")


def test_a_label_that_is_both_present_and_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"photos.csv:3: .*dog"):
        read(tmp_path, "file,labels\n1,cat\n2,dog;-dog\n")


def test_a_file_that_is_named_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"photos.csv:4: image id '1' is there twice, .* line 2"):
        read(tmp_path, "file,labels\n1,a\n2,a\n1,b\n")


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"photos.csv:5: image id '1' is there twice, .* line 2"):
        read(tmp_path, 'file,labels\n1,a\n\n"2",a\n1,b\n')


@pytest.mark.parametrize(
    ("header", "missing"), [("file,label", "labels"), ("path,labels", "file"), ("1.jpg,a", "file")]
)
def test_a_missing_column_is_named_with_those_that_are_there(
    tmp_path: Path, header: str, missing: str
) -> None:
    with pytest.raises(MlcError) as caught:
        read(tmp_path, f"{header}\n1,a\n")
    assert f"no column '{missing}', got '{header.replace(',', ', ')}'" in str(caught.value)


@pytest.mark.parametrize("row", ["2,cat,dog", "2,cat,train,more", "2"])
def test_a_row_of_another_length_is_refused(tmp_path: Path, row: str) -> None:
    header, first = ("file,labels,split", "1,cat,val") if "train" in row else ("file,labels", "1,a")
    with pytest.raises(MlcError, match=r"photos.csv:3: expected .* joined by ';'"):
        read(tmp_path, f"{header}\n{first}\n{row}\n")


def test_a_row_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"photos.csv:3: the column 'file' is empty"):
        read(tmp_path, "file,labels\n1,a\n ,cat\n")


def test_an_unknown_split_gives_its_line_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"photos.csv:3: unknown split 'trian'; .* 'train'\?"):
        read(tmp_path, "file,labels,split\n1,a,val\n2,a,trian\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"no column 'file'"),
        (b"file,labels\n", r"has a header and no rows"),
        (b"file,labels\n1,\n2,\n", r"'labels' is empty in every row"),
        (b"file,labels\n1,caf\xe9\n", r"not a CSV in UTF-8"),
        (b"file,labels\n1," + b"x" * 200_000, r"not a CSV in UTF-8"),
    ],
)
def test_a_file_with_nothing_to_read_is_refused(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    with pytest.raises(MlcError, match=rf"photos.csv: .*{sentence}"):
        read(tmp_path, content)


def test_a_path_without_a_file_says_what_data_takes(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(
            MlcError, match=r"no such file; --data takes the name of a data set or a CSV"
        ):
            read_csv(path, tmp_path)
