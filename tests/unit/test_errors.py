"""Errors: one form of message, a tree that its docstring draws, and parts that survive a process border."""

import inspect
import pickle
import re

import pytest

from kddata import errors

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.KddataError)]


def test_a_message_says_rule_actual_where_and_next():
    error = errors.ConfigError("k is positive", actual=0, where="label.yaml: labels.k", fix="set it to 10")
    assert str(error) == "k is positive; got 0 (in label.yaml: labels.k). Next: set it to 10."
    assert str(errors.ConfigError("k is positive")) == "k is positive."


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind):
    error = kind("rule", actual=[1, "a"], where="file", fix="mend it")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert (back.rule, back.actual, back.where, back.fix) == ("rule", [1, "a"], "file", "mend it")


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tree_in_the_docstring_is_the_real_one(kind):
    lines = [line for line in errors.__doc__.splitlines() if re.search(rf"\b{kind.__name__}\b( |$)", line)]
    drawn = [line for line in lines if "──" in line or "exit code" in line]
    assert len(drawn) == 1, f"{kind.__name__} is drawn once"
    depth = drawn[0].index(kind.__name__) // 4
    assert depth == len([base for base in kind.__mro__ if base in CLASSES])
    if kind is not errors.KddataError:
        assert re.search(rf" {kind.exit_code} ", drawn[0].split(kind.__name__)[1]), "its exit code is drawn"


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("where", "wanted"), [(None, "trial a"), ("labels.k", "trial a: labels.k")])
def test_an_error_within_a_place_names_it_and_stays_what_it_is(kind, where, wanted):
    with pytest.raises(kind) as caught, errors.within("trial a"):
        raise kind("rule", actual=1, where=where, fix="mend it")
    assert type(caught.value) is kind
    assert str(caught.value) == f"rule; got 1 (in {wanted}). Next: mend it."


def test_errors_about_arguments_are_value_errors():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.LabelError, ValueError)
