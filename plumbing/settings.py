"""Check that a JSON file of settings asks only for what this program computes."""


def check_supported(settings: dict, supported: dict[str, tuple], where):
    """Check the fields of a parsed JSON file against the values that this program computes with.

    supported: name of a field -> its allowed values. A field that is absent passes. where: the file, for the message.
    Raises a ValueError that names the first field with another value.
    """
    for name, allowed in supported.items():
        if name in settings and settings[name] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise ValueError(f"{where}: {name} {settings[name]!r} is not supported, only {choices}")
