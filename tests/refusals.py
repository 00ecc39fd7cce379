"""Options that a verb refuses before it reads any data."""

import pytest


def assert_refused_unread(verb, message, **options):
    """One line says what is wrong, and no batch is asked for."""

    def never():
        raise AssertionError("data were read")
        yield

    with pytest.raises(ValueError, match=message) as caught:
        verb(data=never(), **options)
    assert "\n" not in str(caught.value)
