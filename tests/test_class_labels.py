"""`--classes`: by name, by label, in a text file; and the wnids of ImageNet."""

from pathlib import Path

import pytest

from acs_fast.config import InputError
from acs_fast.data import class_labels, imagenet_classes, parse_classes, select_classes

LISTS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "lists"
KNOWN = ("ant", "bee", "cat", "dog")


def test_wnids_are_a_thousand_sorted_ids():
    wnids = imagenet_classes()
    assert len(set(wnids)) == 1000 and list(wnids) == sorted(wnids)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)
    assert wnids[0] == "n01440764" and wnids[207] == "n02099601" and wnids[999] == "n15075141"


@pytest.mark.skipif(not LISTS.is_dir(), reason="the published class lists are not beside the checkout")
def test_wnids_are_the_published_ones():
    lines = (LISTS / "class_indices.txt").read_text().splitlines()
    assert imagenet_classes() == tuple(line.split()[0] for line in lines)
    names, labels = select_classes(imagenet_classes(), str(LISTS / "class_woof.txt"))
    assert len(names) == 10 and sorted(labels) == [155, 159, 162, 167, 182, 193, 207, 229, 258, 273]


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        (None, KNOWN, [0, 1, 2, 3]),
        ("dog,ant", ("dog", "ant"), [3, 0]),
        (" dog , ant, ", ("dog", "ant"), [3, 0]),
        ("2", ("cat",), [2]),
        ("bee,3,00", ("bee", "dog", "ant"), [1, 3, 0]),
    ],
)
def test_names_and_labels_give_the_same_folders(text, names, labels):
    assert select_classes(KNOWN, text) == (names, labels)


def test_a_file_has_names_or_labels_too(tmp_path):
    (tmp_path / "list").write_text("cat\n\n0\n")
    assert select_classes(KNOWN, str(tmp_path / "list")) == (("cat", "ant"), [2, 0])


def test_imagenet_by_wnid_and_index():
    names = ("n02099601", "n01440764")
    assert select_classes(imagenet_classes(), "n02099601,0") == (names, [207, 0])


def test_digits_that_are_a_name_are_that_name():
    assert class_labels(("2", "1", "0"), ("1", "2", "3")) == [1, 0, 0]


def test_many_names_are_no_file_name():
    wnids = imagenet_classes()
    assert select_classes(wnids, ",".join(wnids)) == (wnids, list(range(1000)))


@pytest.mark.parametrize("name", ["cow", "4", "1000", "-1", "1.0", "²", "٣", "Ant"])
def test_unknown_class_is_named_with_known_ones(name):
    with pytest.raises(InputError) as caught:
        select_classes(KNOWN, f"ant,{name}")
    assert str(caught.value) == f"the model has no class {name!r}; known: ant bee cat dog, or by label 0 to 3"


def test_unknown_wnid_is_named_with_the_first_known_ones():
    with pytest.raises(
        InputError, match=r"no class 'n00000001'; known: (n\d{8} ){10}\.\.\., or by label 0 to 999"
    ):
        select_classes(imagenet_classes(), "n00000001")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant,ant", "'ant' is listed twice"),
        ("ant,0", "'ant' is listed twice"),
        (" , ", "must name classes"),
        ("", "must name classes"),
        ("no/list", "class list no/list cannot be read"),
        ("list.txt", "class list list.txt cannot be read"),
        ("ant,../up", "not a plain folder name"),
    ],
)
def test_unusable_lists_are_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        select_classes(KNOWN, text)


def test_names_of_the_model_itself_are_checked():
    with pytest.raises(InputError, match="not a plain folder name"):
        select_classes(("ant", "../up"), None)


def test_parse_keeps_the_order():
    assert parse_classes("b, a,c") == ("b", "a", "c")
