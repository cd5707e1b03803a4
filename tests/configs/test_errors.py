"""The part of a sentence that helps with an unknown name."""

import pytest

from mlc.configs.errors import MlcError, choose, nearest

NAMES = ("bce", "bce_ls", "an", "an_ls", "role")


def test_a_close_name_is_suggested() -> None:
    assert nearest("rol", NAMES) == "did you mean 'role'?"


def test_several_close_names_are_suggested_the_closest_first() -> None:
    assert nearest("bce_l", NAMES) == "did you mean 'bce_ls' or 'bce'?"


def test_case_does_not_matter() -> None:
    assert nearest("ROLE", NAMES) == "did you mean 'role'?"
    assert nearest("PERSON", ["Person", "Bicycle"]) == "did you mean 'Person'?"
    assert nearest("TRAFFIC LIGHT", ["Traffic Light", "Bus"]) == "did you mean 'Traffic Light'?"


def test_without_a_close_one_few_names_are_all_given_in_order() -> None:
    assert nearest("zzz", NAMES) == "choose from an, an_ls, bce, bce_ls, role"


def test_without_a_close_one_many_names_are_counted() -> None:
    many = [f"class {index}" for index in range(21)]
    assert nearest("zzz", many) == "there are 21 names and none is close"
    assert nearest("zzz", many[:20]).startswith("choose from class 0, class 1, class 10")


def test_choose_looks_up_or_says_what_there_is() -> None:
    table = {"linear": 1, "mlp": 2}
    assert choose(table, "mlp", "head") == 2
    with pytest.raises(MlcError, match=r"^unknown head 'liner'; did you mean 'linear'\?$"):
        choose(table, "liner", "head")
    with pytest.raises(MlcError, match=r"^unknown head 'zzz'; choose from linear, mlp$"):
        choose(table, "zzz", "head")
