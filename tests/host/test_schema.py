"""Kinds of values in JSON, and what is said of others."""

import pytest

from dpo_jax.host import schema

SCHEMA = {
  "count": schema.COUNT,
  "eps": schema.FRACTION,
  "names": schema.list_of(schema.STRING, 2),
  "inner": {"rate": schema.POSITIVE},
}


@pytest.mark.parametrize(
  "values, message",
  [
    ({"count": True}, "count=True: must be an integer from 0 to "),
    ({"count": 1.0}, "count=1.0: must be an integer"),
    ({"eps": float("nan")}, "eps=nan: must be a number above 0, at most 1"),
    ({"eps": 0}, "eps=0: must be"),
    ({"names": ["a"]}, "names=['a']: must be a list of 2 times a string"),
    ({"names": ["a", 3]}, "names=['a', 3]: must be"),
    ({"inner": {"rate": 10**400}}, "inner.rate=1000"),
    ({"inner": 3}, "inner=3: must be an object"),
    ({"other": 3}, "'count' is missing"),
  ],
)
def test_a_value_of_another_kind_is_named_with_its_key(values, message):
  with pytest.raises(ValueError) as error:
    schema.check(values, SCHEMA, required=["count"] * ("other" in values))
  assert message in str(error.value) and len(str(error.value)) < 200


def test_what_is_absent_null_or_unknown_may_be_anything():
  schema.check({"count": None, "other": float("nan")}, SCHEMA)
  schema.check({"count": 0, "names": ["", "b"], "inner": {}}, SCHEMA)


def test_a_file_that_is_not_there_and_a_folder_are_told_apart(tmp_path):
  with pytest.raises(ValueError, match=f"no such file {tmp_path}/x"):
    schema.read(tmp_path / "x", {})
  with pytest.raises(ValueError, match=f"{tmp_path} is not a regular file"):
    schema.read(tmp_path, {})
