"""Configurations that earlier versions wrote, in the fields of today: checkpoints, logs and results keep being read."""

LEARNED = (
    "t2r",
    "hedgehog",
    "hedgehog_exp",
    "hedgehog_window",
    "softmax_window",
)  # maps that took options then
OPTIONS = {"map_init": ("init", "identity"), "map_scale": ("scale", 1.0), "map_features": ("n_features", 0)}


def renewed(values: dict) -> dict:
    """A configuration in the fields of this version: what were fields of their own are options of the attention now.
    Raises ValueError if this version cannot build the model."""
    if "attention" not in values:
        return values
    values, options = dict(values), dict(values.get("options", {}))
    if values.pop("conv", 0):
        raise ValueError("this model has convolutions over time, which only an earlier version can build")
    for old, (new, default) in OPTIONS.items():
        if (value := values.pop(old, default)) != default and values["attention"] in LEARNED:
            options[new] = value
    if (window := values.pop("window", 32)) != 32 and values["attention"].endswith("_window"):
        options["window"] = window
    return {**values, "options": options}


def changes(old: dict, new: dict) -> dict[str, tuple]:
    """Which settings of a run, perhaps of an earlier version, are others today: {name: (old, new)}."""
    old = {"options": {}, "muon": False} | renewed(old)  # not there at first
    return {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}
