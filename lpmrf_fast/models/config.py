"""The constructor's arguments are the config: one decorator records them and refuses names that do not exist."""

import difflib
import functools
import inspect

# Keys that published config.json files carry beside the constructor's arguments.
BOOKKEEPING = ("_class_name", "_diffusers_version", "_name_or_path")


def records_config(init):
    """Decorate a model's `__init__`: `self.config` becomes a JSON-able dict of all arguments, defaults included.

    Bookkeeping keys of published files are dropped; another unknown key raises TypeError with the nearest known one.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k not in BOOKKEEPING}
        for key in kwargs:
            if key not in signature.parameters:
                near = difflib.get_close_matches(key, signature.parameters, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{type(self).__name__} has no option {key!r}{hint}")
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        init(*bound.args, **bound.kwargs)
        names = list(signature.parameters)[1:]
        self.config = {n: _plain(bound.arguments[n]) for n in names}

    return wrapper


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
