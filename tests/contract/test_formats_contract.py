"""Shard formats: the shipped contract for every format and codec, and the stock libraries that read their files."""

import pytest

from kddata.testing.formats import CONTRACT, contract_specs, spec_name


@pytest.mark.parametrize("spec", contract_specs(), ids=spec_name)
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_format_keeps_its_contract(check, spec):
    check(spec)
