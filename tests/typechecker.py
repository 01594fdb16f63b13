"""The type checker of the tests: where a float is expected, an integer will do, as it does for Python."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
